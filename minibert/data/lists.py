"""What a Python caller has for data, lists or arrays or columns of pandas -> the examples that files give, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minibert.data.columns import Columns
from minibert.data.examples import Examples
from minibert.data.labels import is_missing
from minibert.errors import UserError
from minibert.runtime.files import one_line


def as_texts(
    texts: Iterable[Any], pairs: Sequence[str] | None, may_lack: bool = False
) -> tuple[list[str], list[str] | None]:
    """Texts and second texts from a list of texts, or of (first, second) pairs; a single string is a mistake.

    may_lack: None and NaN are empty texts, which whoever asks has a word for.
    """
    if hasattr(texts, "columns"):
        raise UserError("expected a column of texts, not a whole table; choose one: frame['text']")
    texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
    if isinstance(texts, str):
        raise UserError("expected a list of texts, not one string; put it in brackets: [text]")
    if isinstance(texts, dict) or not isinstance(texts, Iterable):
        raise UserError(f"expected a list of texts, not {one_line(repr(texts))[:60]}")
    items = list(texts)
    if items and all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        items, pairs = [first for first, _ in items], [second for _, second in items]
    pairs = None if pairs is None else list(pairs)
    if may_lack:
        items = ["" if is_missing(item) else item for item in items]
        pairs = pairs and ["" if is_missing(item) else item for item in pairs]
    for name, values in (("text", items), ("second text", pairs or [])):
        for i, item in enumerate(values):
            if not isinstance(item, str):
                raise UserError(f"{name} {i} is {type(item).__name__}, not a string: {one_line(item)[:60]}")
    if pairs is not None and len(pairs) != len(items):
        raise UserError(f"{len(items)} texts but {len(pairs)} second texts; give one for each text")
    return items, pairs


def examples_from_lists(
    given: dict[str, tuple[Iterable[Any], Iterable[Any]]], delimiter: str | None
) -> tuple[dict[str, Examples], Columns]:
    """(texts, labels) of each part -> its examples, and the columns that a file of the same would have."""
    parts, labels_of = {}, {}
    for part, pair in given.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"{part}: expected a pair, (texts, labels)")
        texts, pairs = as_texts(pair[0], None, may_lack=True)
        labels_of[part], values = _labels(pair[1])
        if len(values) != len(texts):
            raise UserError(f"{part}: {len(texts)} texts but {len(values)} labels; give one label for each text")
        if not texts:
            raise UserError(f"{part}: no texts; leave it out or give some")
        if labels_of[part] != labels_of["train"]:
            named = [" and ".join(names) for names in (labels_of[part], labels_of["train"])]
            raise UserError(f"{part}: labels come in the columns {named[0]}, those of training in {named[1]}")
        parts[part] = Examples(f"{part} list", texts, pairs, values, list(range(len(texts))))
    second = "text_pair" if parts["train"].pairs is not None else None
    return parts, Columns(("text",), second, labels_of["train"], delimiter)


def _labels(labels: Iterable[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Names of the columns that the labels come in, and a value for each row: of several columns a tuple."""
    if labels is None or isinstance(labels, str | dict):
        raise UserError(f"expected a list of labels, not {one_line(repr(labels))[:60]}")
    names: tuple[str, ...] = ("label",)
    if hasattr(labels, "columns") and hasattr(labels, "to_numpy"):  # a whole table: a column of 0 and 1 a label
        names = tuple(map(str, labels.columns)) if len(labels.columns) > 1 else names
        labels = labels.to_numpy()
    if hasattr(labels, "toarray"):  # a sparse matrix of scipy's, as MultiLabelBinarizer can give
        labels = labels.toarray()
    if isinstance(labels, np.ndarray) and labels.ndim == 2 and labels.shape[1] == 1:  # as scikit-learn reads it
        labels = labels[:, 0]
    rows = _plain(labels)
    if not isinstance(rows, Iterable):
        raise UserError(f"expected a list of labels, not {one_line(repr(labels))[:60]}")
    if len(names) > 1:
        return names, [tuple(row) for row in rows]
    return names, [_plain(row) for row in rows]


def _plain(value: Any) -> Any:
    """Python's own value or list for one of numpy, pandas, polars, torch or Arrow; a list for a set."""
    if isinstance(value, set | frozenset):
        return list(value)
    for convert in ("tolist", "to_list", "to_pylist", "as_py"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value
