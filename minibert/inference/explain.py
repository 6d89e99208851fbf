"""Which words moved a result: each word is left out in turn, and the model asked again (occlusion)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minibert.problem.problem import REGRESSION, SINGLE, Problem

if TYPE_CHECKING:
    from minibert.batching.tokenizer import Tokenizer
    from minibert.inference.classifier import Classifier

TEXTS_AT_ONCE = 32  # whose variants, one for each word, are in memory together
MARKED_FRACTION = 0.2  # of the strongest effect: a weaker word is not marked
LISTED_WORDS = 8


@dataclass(frozen=True)
class Word:
    """A word of a text, and how much it speaks for the label that was found.

    `effect` is what the log-odds of that label (of a regression, the value) lose when the word is left out.
    """

    text: str
    start: int  # place in the text, in characters
    end: int
    effect: float
    in_pair: bool = False  # the word is in the second text of a pair

    def to_dict(self) -> dict[str, Any]:
        place = {"word": self.text, "start": self.start, "end": self.end, "effect": round(self.effect, 6)}
        return place | ({"in_pair": True} if self.in_pair else {})

    def __str__(self) -> str:
        return f"{self.text} {self.effect:+.2f}"


Span = tuple[bool, int, int]  # in the second text, start, end


def explain(
    classifier: Classifier, texts: Sequence[str], pairs: Sequence[str] | None, logits: np.ndarray
) -> list[list[Word]]:
    """The words of each text in their order, with their effects on the label found: of several, the most probable.

    It costs a prediction for each word. Words that --max-length cuts off are left out.
    """
    result: list[list[Word]] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        rows = slice(start, start + TEXTS_AT_ONCE)
        result += _explain_batch(classifier, texts[rows], None if pairs is None else pairs[rows], logits[rows])
    return result


def _explain_batch(
    classifier: Classifier, texts: Sequence[str], pairs: Sequence[str] | None, logits: np.ndarray
) -> list[list[Word]]:
    found = [(i, span) for i in range(len(texts)) for span in _spans(classifier, texts, pairs, i)]
    shortened = [[_without(texts[i], span, False) for i, span in found]]
    if pairs is not None:
        shortened.append([_without(pairs[i], span, True) for i, span in found])
    without = classifier.logits(*shortened)
    owner = np.array([i for i, _ in found], dtype=np.int64)
    label = classifier.problem.top_label(classifier.problem.probabilities(logits))[owner]
    effects = log_odds(classifier.problem, logits[owner], label) - log_odds(classifier.problem, without, label)
    words: list[list[Word]] = [[] for _ in texts]
    for (i, (in_pair, start, end)), effect in zip(found, effects.tolist(), strict=True):
        source = pairs[i] if in_pair and pairs is not None else texts[i]
        words[i].append(Word(source[start:end], start, end, effect, in_pair))
    return words


def log_odds(problem: Problem, logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[n, L], [n] class numbers -> [n] log-odds of the class; of regression, the values."""
    logits = logits.astype(np.float64)
    if problem.kind == REGRESSION:
        return logits[:, 0]
    rows = np.arange(len(logits))
    scaled = logits / problem.temperature
    own = scaled[rows, label]
    if problem.kind != SINGLE:
        return own
    scaled[rows, label] = -np.inf
    highest = scaled.max(1)
    return own - highest - np.log(np.exp(scaled - highest[:, None]).sum(1))


def _spans(classifier: Classifier, texts: Sequence[str], pairs: Sequence[str] | None, row: int) -> list[Span]:
    first = _kept(word_spans(classifier.tokenizer, texts[row]), classifier)
    second = [] if pairs is None else _kept(word_spans(classifier.tokenizer, pairs[row]), classifier)
    return [(False, a, b) for a, b in first] + [(True, a, b) for a, b in second]


def _kept(spans: list[tuple[int, int]], classifier: Classifier) -> list[tuple[int, int]]:
    """Without the words that truncation surely drops, for every word is a token at least."""
    limit = classifier.max_length
    if len(spans) <= limit or classifier.truncation == "window":
        return spans
    if classifier.truncation == "tail":
        return spans[-limit:]
    if classifier.truncation == "head":
        return spans[:limit]
    half = limit // 2  # head_tail keeps less than that of the head
    return spans[:half] + spans[max(half, len(spans) - limit) :]


def word_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """(start, end) of the words as BERT's tokenizer sees them: split at blanks, punctuation and ideographs."""
    encoded = tokenizer.encode_one(text)
    spans: list[tuple[int, int]] = []
    before: int | None = None
    for word, (start, end) in zip(encoded.word_ids, encoded.offsets, strict=True):
        while end < len(text) and unicodedata.category(text[end]).startswith("M"):
            end += 1  # the tokenizer drops accents and vowel signs, which are part of the word all the same
        if word is not None and word == before:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
        before = word
    return spans


def _without(text: str, span: Span, in_pair: bool) -> str:
    """The text without the word at `span`, if the word is in this text."""
    return text[: span[1]] + text[span[2] :] if span[0] == in_pair else text


def strongest(words: Sequence[Word]) -> list[Word]:
    """The words with the largest effects, for or against, the largest first; weak ones are left out."""
    threshold = MARKED_FRACTION * max((abs(word.effect) for word in words), default=0)
    chosen = [word for word in words if word.effect and abs(word.effect) >= threshold]
    return sorted(chosen, key=lambda word: -abs(word.effect))[:LISTED_WORDS]


def marked(text: str, words: Sequence[Word], in_pair: bool = False) -> str:
    """The text with its strongest words in brackets: [+for], [++strongly for], [-against], [--strongly against]."""
    chosen = strongest(words)
    if not chosen:
        return text
    half = abs(chosen[0].effect) / 2
    for word in sorted((w for w in chosen if w.in_pair == in_pair), key=lambda word: -word.start):
        sign = ("+" if word.effect > 0 else "-") * (2 if abs(word.effect) > half else 1)
        text = f"{text[: word.start]}[{sign}{word.text}]{text[word.end :]}"
    return text
