"""Encoded texts in flat int32 arrays with offsets: a million texts are three arrays; a length costs a subtraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?": 128 of 510 tokens from the head, the rest the tail.
HEAD_FRACTION = 128 / 510


@dataclass
class Tokens:
    """Encoded texts: row i is ids[offsets[i] : offsets[i + 1]], a text or, with `windows`, one of them."""

    ids: np.ndarray  # [total] int32
    offsets: np.ndarray  # [n + 1] int64
    type_ids: np.ndarray | None  # [total] uint8, 1 on the second text of a pair; None where there are no pairs
    truncated: np.ndarray  # [texts] int32: tokens that truncation cut off
    windows: np.ndarray | None = None  # [texts + 1] int64: text i is rows windows[i] to windows[i + 1]
    repeated: np.ndarray | None = None  # [texts] int32: tokens that a text's windows have more than the text

    def __len__(self) -> int:
        """Rows, which are texts where there are no windows."""
        return len(self.offsets) - 1

    @property
    def texts(self) -> int:
        return len(self.truncated)

    @property
    def text_lengths(self) -> np.ndarray:
        """Tokens that the model reads of each text, in all its windows."""
        return self.lengths if self.windows is None else np.diff(self.offsets[self.windows])

    def mean_of_windows(self, values: np.ndarray) -> np.ndarray:
        """[rows, D] -> [texts, D]"""
        if self.windows is None or not len(values):
            return values
        return np.add.reduceat(values, self.windows[:-1], axis=0) / np.diff(self.windows)[:, None].astype(values.dtype)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def full_lengths(self) -> np.ndarray:
        """Tokens of each text before truncation."""
        return self.text_lengths + self.truncated - (0 if self.repeated is None else self.repeated)

    def take(self, texts: np.ndarray) -> Tokens:
        rows, windows, repeated = texts, None, None
        if self.windows is not None and self.repeated is not None:
            rows, repeated = flat_indices(self.windows, texts), self.repeated[texts]
            windows = offsets_of(np.diff(self.windows)[texts])
        index = flat_indices(self.offsets, rows)
        types = None if self.type_ids is None else self.type_ids[index]
        return Tokens(self.ids[index], offsets_of(self.lengths[rows]), types, self.truncated[texts], windows, repeated)

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        lengths = np.concatenate([part.lengths for part in parts])
        types = [part.type_ids for part in parts if part.type_ids is not None]
        windows = [np.diff(part.windows) for part in parts if part.windows is not None]
        repeated = [part.repeated for part in parts if part.repeated is not None]
        return cls(
            np.concatenate([part.ids for part in parts]),
            offsets_of(lengths),
            np.concatenate(types) if types else None,
            np.concatenate([part.truncated for part in parts]),
            offsets_of(np.concatenate(windows)) if windows else None,
            np.concatenate(repeated) if repeated else None,
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [n + 1] offsets, int64"""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def flat_indices(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[T] places in a flat array of what belongs to `rows`, where row i has offsets[i] to offsets[i + 1]."""
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(offsets[rows] - (ends - lengths), lengths)


def keep_longest_first(lengths: np.ndarray, budget: int) -> np.ndarray:
    """How many tokens of each segment stay when together they may have `budget`: the longer one loses first.

    lengths: [1 or 2, n]. For pairs the outcome equals the tokenizers library's LongestFirst strategy.
    """
    if len(lengths) == 1:
        return np.minimum(lengths, budget)
    short, long = lengths.min(0), lengths.max(0)
    fitting_long = np.maximum(short, budget - short)
    halved = short + np.minimum(long, fitting_long) > budget
    short = np.where(halved, budget // 2, short)
    long = np.where(halved, budget - budget // 2, np.minimum(long, fitting_long))
    first_is_longer = lengths[0] > lengths[1]
    return np.stack([np.where(first_is_longer, long, short), np.where(first_is_longer, short, long)])


def kept_spans(
    starts: np.ndarray, lengths: np.ndarray, kept: np.ndarray, truncation: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two (start, length) spans of each row that keep `kept` of its tokens: one from the head, one from the tail."""
    if truncation == "head":
        head = kept
    elif truncation == "tail":
        head = np.where(kept < lengths, 0, kept)
    else:
        head = np.where(kept < lengths, np.round(kept * HEAD_FRACTION).astype(np.int64), kept)
    tail = kept - head
    return [(starts, head), (starts + lengths - tail, tail)]


def gather_spans(
    source: np.ndarray, spans: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copy spans of `source`, row by row, into one flat array.

    spans: k arrays pairs (starts [n], lengths [n]); returns (flat, row lengths [n], span lengths [n * k]).
    """
    starts = np.stack([start for start, _ in spans], axis=1).reshape(-1)  # [n * k]
    lengths = np.stack([length for _, length in spans], axis=1)  # [n, k]
    flat_lengths = lengths.reshape(-1)
    ends = np.cumsum(flat_lengths)
    index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - flat_lengths), flat_lengths)
    return source[index], lengths.sum(1), flat_lengths
