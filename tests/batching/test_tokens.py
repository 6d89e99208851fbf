"""Token ids against transformers, on text as it comes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens
from minibert.errors import UserError

ODD = [
    "",
    "   ",
    "hello",
    "emoji 😀👍🏽 and 👩‍👩‍👧 ok",
    "日本語のテスト 中文字符 한국어",
    "control a\x00b\x07c\u200bd\u00ade",
    "naïve café Ⅷ ﬁ ＦＵＬＬ Straße İstanbul",
    "[SEP] inside [MASK] the [CLS] text [unused1]",
    "x" * 300,
    "word, " * 20_000,
    "tab\tnew\nline\r\n end",
    "\ufffd \ue000 \u202eright to left\u202c مرحبا",
    "don't #hash @name http://a.b/c?d=e&f 1,234.56",
]


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(minilm)


def row(tokens: Tokens, i: int) -> list[int]:
    return tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()


@pytest.mark.parametrize("length", [8, 17, 128, 512])
@pytest.mark.parametrize(("truncation", "side"), [("head", "right"), ("tail", "left")])
@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
def test_ids_equal_transformers(
    minilm: Path, theirs: transformers.PreTrainedTokenizerBase, length: int, truncation: str, side: str, paired: bool
) -> None:
    theirs.truncation_side = side
    pairs = ODD[5:] + ODD[:5] if paired else None
    ours = Tokenizer.from_folder(minilm).encode(ODD, pairs, length, truncation)
    expected = theirs(ODD, pairs, truncation=True, max_length=length, return_token_type_ids=True)
    for i in range(len(ODD)):
        assert row(ours, i) == expected["input_ids"][i], ODD[i][:30]
        if paired:
            assert ours.type_ids is not None
            types = ours.type_ids[ours.offsets[i] : ours.offsets[i + 1]].tolist()
            assert types == expected["token_type_ids"][i]
    whole = theirs(ODD, pairs, truncation=False)["input_ids"]
    assert ours.truncated.tolist() == [len(w) - len(e) for w, e in zip(whole, expected["input_ids"], strict=True)]


@pytest.mark.parametrize("lower", [True, False], ids=["uncased", "cased"])
def test_vocabulary_alone_gives_the_same_ids(minilm: Path, tmp_path: Path, lower: bool) -> None:
    shutil.copy(minilm / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    expected = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=lower)(ODD)["input_ids"]
    ours = Tokenizer.from_folder(tmp_path).encode(ODD, None, 50_000)
    assert [row(ours, i) for i in range(len(ODD))] == expected


USER = {"content": "<user>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, True),
        ({"added_tokens_decoder": {"30522": USER | {"special": False}}}, False),
        ({"added_tokens_decoder": {"30522": USER | {"special": True, "normalized": False}}}, False),
        ({"additional_special_tokens": ["<user>"]}, False),
        ({"additional_special_tokens": ["<user>"]}, True),
    ],
)
def test_tokens_added_to_a_vocabulary_are_those_of_transformers(
    minilm: Path, tmp_path: Path, options: dict[str, Any], added: bool
) -> None:
    shutil.copy(minilm / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    if added:
        (tmp_path / "added_tokens.json").write_text('{"<user>": 30522}')
    texts = ["The <user> said so", "<user><user>", "a <USER>"]
    ours = Tokenizer.from_folder(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    assert [row(ours.encode(texts, None, 20), i) for i in range(3)] == expected and 30522 in expected[0]
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved", 20)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(texts)["input_ids"] == expected
    (tmp_path / "added_tokens.json").write_text('{"<hole>": 40000}')
    with pytest.raises(UserError, match="added token '<hole>' cannot have the id 40000"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"do_lower_case": False}, {"strip_accents": False}, {"do_lower_case": False, "strip_accents": True}],
)
def test_options_beside_tokenizer_json_win_as_in_transformers(
    minilm: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **options}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(ODD)["input_ids"]
    ours = Tokenizer.from_folder(tmp_path).encode(ODD, None, 50_000)
    assert [row(ours, i) for i in range(len(ODD))] == expected


def test_saved_tokenizer_loads_in_transformers(minilm: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(minilm)
    ours.save(tmp_path, 40)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = ours.encode(ODD, None, 40)
    assert theirs(ODD, truncation=True)["input_ids"] == [row(encoded, i) for i in range(len(ODD))]
    again = Tokenizer.from_folder(tmp_path).encode(ODD, None, 40)
    assert np.array_equal(again.ids, encoded.ids)


def test_real_messages_equal_transformers(
    minilm: Path, theirs: transformers.PreTrainedTokenizerBase, shared_data: Path
) -> None:
    theirs.truncation_side = "right"
    with open(shared_data / "sms_spam" / "spamdata_v2.csv", encoding="utf-8", newline="") as file:
        texts = [line["text"] for line in csv.DictReader(file)]
    ours = Tokenizer.from_folder(minilm).encode(texts, None, 64)
    expected = theirs(texts, truncation=True, max_length=64)["input_ids"]
    assert [row(ours, i) for i in range(len(texts))] == expected


def test_head_tail_keeps_both_ends(minilm: Path) -> None:
    tokenizer = Tokenizer.from_folder(minilm)
    text = " ".join(str(i % 10) for i in range(1000))
    whole = row(tokenizer.encode([text], None, 5000), 0)
    cut = row(tokenizer.encode([text], None, 512, "head_tail"), 0)
    assert len(cut) == 512 and cut[:129] == whole[:129] and cut[-383:] == whole[-383:]
    assert row(tokenizer.encode(["short"], None, 512, "head_tail"), 0) == row(tokenizer.encode(["short"], None, 512), 0)


def test_lone_surrogates_do_not_stop_a_run(minilm: Path) -> None:
    tokens = Tokenizer.from_folder(minilm).encode(["broken \ud800 half", "fine"], None, 16)
    assert len(tokens) == 2 and row(tokens, 0)[-1] == row(tokens, 1)[-1]


def test_no_texts_are_no_tokens(minilm: Path) -> None:
    tokens = Tokenizer.from_folder(minilm).encode([], None, 16)
    assert len(tokens) == 0 and len(tokens.ids) == 0


def test_missing_or_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.json or vocab.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="lacks"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_head_tail_of_a_pair_keeps_both_ends_of_each(minilm: Path) -> None:
    """Each text has the share that --truncation head leaves it, and keeps a quarter of that from its head."""
    tokenizer = Tokenizer.from_folder(minilm)
    first, second = (" ".join(words) for words in (["alpha", *"abcdefgh" * 9, "omega"], ["one", *"nopqrst" * 5, "two"]))
    whole = [row(tokenizer.encode([text], None, 512), 0)[1:-1] for text in (first, second)]
    head = tokenizer.encode([first], [second], 43, "head")
    both = tokenizer.encode([first], [second], 43, "head_tail")
    assert both.type_ids is not None and head.type_ids is not None
    assert both.type_ids.tolist() == head.type_ids.tolist() and both.truncated.tolist() == head.truncated.tolist()
    kept = [piece.tolist() for piece in np.split(both.ids, np.flatnonzero(np.diff(both.type_ids)) + 1)]
    for ids, text in zip((kept[0][1:-1], kept[1][:-1]), whole, strict=True):
        front = round(len(ids) * 128 / 510)
        assert ids == text[:front] + text[len(text) - len(ids) + front :] and 0 < front < len(ids) < len(text)
    short = tokenizer.encode(["a b"], ["c"], 43, "head_tail")
    assert short.ids.tolist() == tokenizer.encode(["a b"], ["c"], 43).ids.tolist()
