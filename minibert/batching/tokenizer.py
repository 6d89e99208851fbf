"""Texts to token ids: the Rust library splits and looks up words, numpy truncates and puts special tokens around."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, BertWordPieceTokenizer

from minibert.batching.tokens import Tokens, gather_spans, keep_longest_first, kept_spans, offsets_of
from minibert.config import TRUNCATIONS
from minibert.errors import UserError
from minibert.runtime.files import check_regular_file, one_line, read_json, valid_unicode, write_json, write_text

TOKENIZER, TOKENIZER_CONFIG, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
ADDED_TOKENS = "added_tokens.json"
TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NORMALIZER_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
MAX_WORD_LENGTH = 1000  # characters of a word that WordPiece looks up; BERT's is 100
MAX_COMPONENTS = 50  # of a tokenizer's normalizer or pre-tokenizer
ALLOWED_COMPONENTS = """BertNormalizer BertPreTokenizer ByteLevel CharDelimiterSplit Digits Lowercase Metaspace NFC NFD
NFKC NFKD Nmt Precompiled Punctuation Strip StripAccents UnicodeScripts Whitespace WhitespaceSplit""".split()
TEXTS_PER_CALL = 20_000  # texts handed to Rust at once: enough for all cores, little enough memory


class Tokenizer:
    """WordPiece of a checkpoint, giving the ids that transformers gives."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self.backend, self.config = backend, config
        backend.no_truncation()
        backend.no_padding()
        names = {key: _token_text(config.get(f"{key}_token"), default) for key, default in SPECIAL_TOKENS.items()}
        ids = {key: backend.token_to_id(name) for key, name in names.items()}
        if ids["cls"] is None or ids["sep"] is None:
            raise UserError(f"the tokenizer has no {names['cls']} and {names['sep']}; is it a BERT tokenizer?")
        self.cls_id, self.sep_id = int(ids["cls"]), int(ids["sep"])
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # ids may have gaps

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or build from vocab.txt and tokenizer_config.json where that is all there is."""
        config_path = folder / TOKENIZER_CONFIG
        config = read_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, dict):
            raise UserError(f"{config_path}: expected a JSON object")
        try:
            if (folder / TOKENIZER).is_file():
                source = read_json(folder / TOKENIZER)
                check_components(source)
                _set_options(source, config)
                return cls(tokenizers.Tokenizer.from_str(json.dumps(source)), config)
            if (folder / VOCABULARY).is_file():
                backend = _from_vocabulary(folder / VOCABULARY, config)
                _add_tokens(backend, _added_tokens(folder, config))
                for key in ("additional_special_tokens", "extra_special_tokens"):
                    tokens = [_token_text(token, "") for token in config.get(key) or ()]
                    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if t])
                return cls(backend, config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust library raises plain Exception, and panics of no better kind
            raise UserError(f"{folder}: the tokenizer cannot be read ({one_line(error)})") from None
        advice = "copy one there (finetune also takes --tokenizer, a folder with one)"
        raise UserError(f"{folder}: no {TOKENIZER} or {VOCABULARY}; {advice}")

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        max_length: int,
        truncation: str = "head",
        window_stride: int | None = None,
    ) -> Tokens:
        """Encode texts, or pairs of texts, to at most `max_length` tokens each, special tokens included.

        With truncation "window" a longer text becomes several rows, one every `window_stride` tokens.
        """
        assert truncation in TRUNCATIONS
        stride = window_stride or max_length // 2
        parts = []
        for start in range(0, max(len(texts), 1), TEXTS_PER_CALL):
            pieces = [self._pieces(texts[start : start + TEXTS_PER_CALL])]
            if pairs is not None:
                pieces.append(self._pieces(pairs[start : start + TEXTS_PER_CALL]))
            if truncation == "window":
                parts.append(self._windows(pieces, max_length, stride))
            else:
                parts.append(self._assemble(pieces, max_length, truncation))
        return Tokens.joined(parts)

    def encode_one(self, text: str) -> tokenizers.Encoding:
        """The tokens of one text, uncut and without special tokens, with the places they have in it."""
        return self.backend.encode(valid_unicode(text), add_special_tokens=False)

    def _pieces(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """WordPiece ids of each text, without special tokens: (flat int32 ids, int64 lengths)."""
        clean = [text if text.isascii() else valid_unicode(text) for text in texts]
        try:
            encoded = [e.ids for e in self.backend.encode_batch_fast(clean, add_special_tokens=False)]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # as in `from_folder`; a vocabulary without [UNK] fails here, at the first need
            raise UserError(f"the tokenizer cannot encode these texts ({one_line(error)}); use another") from None
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(lengths.sum())), lengths

    def _assemble(self, pieces: list[tuple[np.ndarray, np.ndarray]], max_length: int, truncation: str) -> Tokens:
        """Cut the pieces to fit and put the special tokens around them."""
        lengths = np.stack([piece_lengths for _, piece_lengths in pieces])  # [1 or 2, n]
        kept = keep_longest_first(lengths, max_length - 1 - len(pieces))
        sides = zip(_starts(pieces), lengths, kept, strict=True)
        segments = [kept_spans(starts, own, kept_own, truncation) for starts, own, kept_own in sides]
        flat, offsets, type_ids = self._with_special_tokens(pieces, segments)
        return Tokens(flat, offsets, type_ids, (lengths.sum(0) - kept.sum(0)).astype(np.int32))

    def _windows(self, pieces: list[tuple[np.ndarray, np.ndarray]], max_length: int, stride: int) -> Tokens:
        """A row for each window. The last one ends where its text ends, so none is a short rest.

        Of a pair the longer text is windowed, and the other stands in each window, cut to half of the room.
        """
        lengths = np.stack([piece_lengths for _, piece_lengths in pieces])  # [1 or 2, n]
        room = max_length - 1 - len(pieces)
        windowed = lengths.argmax(0)  # [n] which of the two
        long = lengths.max(0)
        short = np.minimum(lengths.sum(0) - long, np.maximum(room // 2, room - long))
        size = np.minimum(long, room - short)  # [n] tokens of the long one in each window
        step = np.maximum(np.minimum(stride, size), 1)
        counts = 1 + -(-(long - size) // step)
        windows = offsets_of(counts)
        text = np.repeat(np.arange(len(long)), counts)  # [rows]
        place = np.arange(len(text)) - windows[:-1][text]
        skipped = np.minimum(place * step[text], (long - size)[text])
        segments = []
        for segment, starts in enumerate(_starts(pieces)):
            is_long = (windowed == segment)[text]
            span = starts[text] + np.where(is_long, skipped, 0), np.where(is_long, size[text], short[text])
            segments.append([span])
        flat, offsets, type_ids = self._with_special_tokens(pieces, segments)
        cut = lengths.sum(0) - long - short
        whole = lengths.sum(0) + 1 + len(pieces)
        read = np.diff(offsets[windows])
        return Tokens(flat, offsets, type_ids, cut.astype(np.int32), windows, (read - whole + cut).astype(np.int32))

    def _with_special_tokens(
        self, pieces: list[tuple[np.ndarray, np.ndarray]], segments: list[list[tuple[np.ndarray, np.ndarray]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """[CLS] a [SEP] b [SEP] of spans (starts, lengths) in the joined ids of all pieces: ids, offsets, type ids."""
        source = np.concatenate([[self.cls_id, self.sep_id], *(ids for ids, _ in pieces)]).astype(np.int32)
        one = np.ones(len(segments[0][0][0]), np.int64)
        spans = [(0 * one, one)]  # each a (start in source, length) for every row: [CLS] first
        types = [0]
        for segment, own in enumerate(segments):
            spans += [*((2 + starts, lengths) for starts, lengths in own), (one, one)]
            types += [segment] * (len(own) + 1)
        flat, row_lengths, span_lengths = gather_spans(source, spans)
        type_ids = np.repeat(np.tile(np.array(types, np.uint8), len(one)), span_lengths) if len(pieces) == 2 else None
        return flat, offsets_of(row_lengths), type_ids

    def save(self, folder: Path, max_length: int) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        config = {"tokenizer_class": "BertTokenizer", **self.config, "model_max_length": max_length}
        config.setdefault("do_lower_case", _lowercases(self.backend))
        for key, default in SPECIAL_TOKENS.items():
            config.setdefault(f"{key}_token", default)
        write_text(folder / TOKENIZER, self.backend.to_str(pretty=False))
        write_json(folder / TOKENIZER_CONFIG, config)


def _starts(pieces: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """[n] for texts and for second texts: where each begins in the joined ids of all."""
    bases = offsets_of(np.array([len(ids) for ids, _ in pieces]))
    return [base + offsets_of(lengths)[:-1] for base, (_, lengths) in zip(bases, pieces, strict=False)]


def _token_text(value: Any, default: str) -> str:
    """A special token in tokenizer_config.json is a string, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else default


def _from_vocabulary(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer as transformers builds it from a vocabulary and the options of tokenizer_config.json."""
    check_regular_file(path)
    with open(path, encoding="utf-8") as file:  # its lines end at newlines alone: a token may be any other separator
        words = [line.rstrip("\n") for line in file]
    if max(map(len, words), default=0) > MAX_WORD_LENGTH:
        raise UserError(f"{path.name} holds a token of more than {MAX_WORD_LENGTH} characters; is it a vocabulary?")
    vocabulary = {word: index for index, word in enumerate(words)}
    special = {key: _token_text(config.get(f"{key}_token"), default) for key, default in SPECIAL_TOKENS.items()}
    missing = [token for token in special.values() if token not in vocabulary]
    if missing:
        raise UserError(f"{path.name} lacks {', '.join(missing)}; is it a BERT vocabulary?")
    backend = BertWordPieceTokenizer(
        vocabulary,
        **{f"{key}_token": token for key, token in special.items()},
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    return tokenizers.Tokenizer.from_str(backend.to_str())  # of its wrapper, which lacks some methods


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beyond vocab.txt by id: of tokenizer_config.json or, of older versions of transformers, a file."""
    path = folder / ADDED_TOKENS
    older = read_json(path) if path.is_file() else {}
    newer = config.get("added_tokens_decoder") or {}
    found = {int(index): AddedToken(token, normalized=True) for token, index in older.items()}
    for index, token in newer.items():
        options = {key: bool(token[key]) for key in TOKEN_OPTIONS if key in token}
        found[int(index)] = AddedToken(token["content"], **options)
    return found


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[int, AddedToken]) -> None:
    for index in sorted(added):
        token = added[index]
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"the added token {token.content!r} cannot have the id {index}; save tokenizer.json as well"
            )


def _set_options(source: dict[str, Any], config: dict[str, Any]) -> None:
    """What tokenizer_config.json says of the normalizer wins over tokenizer.json, as in transformers."""
    normalizer = source.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        for option, name in NORMALIZER_OPTIONS.items():
            if isinstance(config.get(option), bool):
                normalizer[name] = config[option]


def check_components(source: Any) -> None:
    """Only parts that take time and memory in proportion to the text: a pattern may never end, replacements explode.

    source: a parsed tokenizer.json, perhaps a stranger's.
    """
    if not isinstance(source, dict):
        raise UserError(f"{TOKENIZER}: expected a JSON object")
    for stage in ("normalizer", "pre_tokenizer"):
        pending, count = [source.get(stage)], 0
        while pending:
            part, count = pending.pop(), count + 1
            if part is None:
                continue
            kind = part.get("type") if isinstance(part, dict) else part
            if kind == "Sequence" and isinstance(part.get(f"{stage}s"), list | type(None)):
                pending += part.get(f"{stage}s") or part.get("pretokenizers") or []
            elif kind not in ALLOWED_COMPONENTS or count > MAX_COMPONENTS:
                raise UserError(f"{TOKENIZER}: {stage} {str(kind)[:40]!r} is not of a BERT tokenizer")
    model = source.get("model")
    longest = model.get("max_input_chars_per_word", 100) if isinstance(model, dict) else 100
    if not isinstance(longest, int) or longest > MAX_WORD_LENGTH:
        raise UserError(f"{TOKENIZER}: max_input_chars_per_word {str(longest)[:40]} is more than {MAX_WORD_LENGTH}")


def _lowercases(backend: tokenizers.Tokenizer) -> bool:
    normalizer = json.loads(backend.to_str()).get("normalizer") or {}
    return bool(normalizer.get("lowercase", False))
