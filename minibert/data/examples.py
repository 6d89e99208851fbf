"""Texts with their labels, from tables of files and from what Python callers have; which rows can be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minibert.config import DataSettings
from minibert.data.columns import Columns
from minibert.data.labels import is_missing, read_label
from minibert.data.rows import BadRow, Table, bad_rows_error
from minibert.errors import UserError
from minibert.problem.problem import REGRESSION, SINGLE
from minibert.runtime.files import one_line, valid_unicode


@dataclass
class Examples:
    """Rows of one file or list: texts, second texts of pairs, and labels as read, with the lines they stand on."""

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)  # rows of the source that are not among these
    weights: list[float] | None = None  # what each row's loss counts in training

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Some of the rows; `bad` stays behind, for it tells of the whole source."""

        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in rows]

        texts, pairs, labels = pick(self.texts), pick(self.pairs), pick(self.labels)
        return Examples(self.source, texts, pairs, labels, pick(self.lines), weights=pick(self.weights))


def text_keys(examples: Examples) -> list[str]:
    """For each row its text (and second text) with case and blanks evened out: rows of equal keys are duplicates."""
    keys = [" ".join(text.split()).casefold() for text in examples.texts]
    if examples.pairs is None:
        return keys
    return [f"{key}\n{' '.join(pair.split()).casefold()}" for key, pair in zip(keys, examples.pairs, strict=True)]


def examples_from_table(table: Table, columns: Columns, with_labels: bool = True) -> Examples:
    texts = _texts(table, columns.text[0])
    if len(columns.text) > 1:
        parts = (_texts(table, name) for name in columns.text)
        texts = [" ".join(filter(None, cells)) for cells in zip(*parts, strict=True)]
    pairs = _texts(table, columns.pair) if columns.pair else None
    labels: list[Any] | None = None
    if with_labels:
        labels = list(_cells(table, columns.label[0]))
        if len(columns.label) > 1:
            labels = list(zip(*(_cells(table, name) for name in columns.label), strict=True))
    return Examples(table.path, texts, pairs, labels, list(table.lines), list(table.bad))


def _cells(table: Table, name: str) -> list[Any]:
    """A column; later chunks of a JSON file may lack one, as any row may."""
    return table.columns.get(name) or [None] * len(table.lines)


def _texts(table: Table, name: str) -> list[str]:
    texts = []
    for value, line in zip(_cells(table, name), table.lines, strict=True):
        if isinstance(value, dict | list | bytes):
            kind = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "bytes"
            raise UserError(f"{table.path}, line {line}, column {name}: {kind}, not a text")
        is_nothing = not isinstance(value, str) and is_missing(value)  # a text of blanks stays as it is
        texts.append("" if is_nothing else valid_unicode(str(value)))
    return texts


def rows_may_lack_labels(columns: Columns, config: DataSettings) -> bool:
    """Whether a row without a label is a row with none of several labels."""
    return config.label_delimiter is not None or len(columns.label) > 1


def usable_rows(examples: Examples, config: DataSettings, may_lack_labels: bool) -> Examples:
    """The rows that have text and label. The others are an error that names them or, if asked for, left in `bad`."""
    bad, kept = [], []
    labels = None if may_lack_labels else examples.labels
    for i, text in enumerate(examples.texts):
        if not text.strip():
            bad.append(BadRow(examples.lines[i], "no text"))
        elif examples.pairs is not None and not examples.pairs[i].strip():
            bad.append(BadRow(examples.lines[i], "no second text"))
        elif labels is not None and is_missing(labels[i]):
            bad.append(BadRow(examples.lines[i], "no label"))
        else:
            kept.append(i)
    return _without(examples, kept, bad, config)


def with_parsed_labels(examples: Examples, kind: str, indicators: Sequence[str], config: DataSettings) -> Examples:
    """The rows whose labels can be read, as names, lists of names or numbers; the others are bad, as above."""
    bad, kept, labels = [], [], []
    for i, value in enumerate(examples.labels or []):
        try:
            labels.append(read_label(value, kind, indicators, config.label_delimiter))
            kept.append(i)
        except ValueError as error:
            bad.append(BadRow(examples.lines[i], str(error)))
    return replace(_without(examples, kept, bad, config), labels=labels)


def with_label_names(examples: Examples, kind: str, names: tuple[str, ...], first: int = 0) -> Examples:
    """The same with `names` for the labels that are numbers, counted from `first`; a label may also be a name."""
    if kind == REGRESSION:
        raise UserError("--label-names: regression has no classes; leave the flag out")
    known = {str(first + i): name for i, name in enumerate(names)} | {name: name for name in names}
    labels: list[Any] = []
    for line, label in zip(examples.lines, examples.labels or [], strict=True):
        try:
            labels.append(known[label] if kind == SINGLE else sorted(known[each] for each in label))
        except KeyError as error:
            where, last = f"{examples.source}, line {line}", first + len(names) - 1
            raise UserError(
                f"{where}: label {error} is none of --label-names, nor a number from {first} to {last}"
            ) from None
    return replace(examples, labels=labels)


def first_number(labels: list[Any], names: tuple[str, ...]) -> int:
    """1 where labels are counted from 1, else 0."""
    seen = {each for label in labels for each in ([label] if isinstance(label, str) else label)}
    return int("0" not in seen and str(len(names)) in seen)


def _without(examples: Examples, kept: list[int], bad: list[BadRow], config: DataSettings) -> Examples:
    """The rows `kept`, the others told or refused as --on-bad-rows says."""
    together = sorted([*examples.bad, *bad], key=lambda row: row.line)
    if together and config.on_bad_rows == "error":
        raise bad_rows_error(examples.source, together)
    return replace(examples.take(kept), bad=together) if bad else examples


def count_rows(bad: list[BadRow]) -> str:
    return "1 row" if len(bad) == 1 else f"{len(bad)} rows"


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
    given: dict[str, tuple[Iterable[Any], Iterable[Any]]],
    delimiter: str | None = None,
    sample_weight: Iterable[float] | None = None,
) -> tuple[dict[str, Examples], Columns]:
    """(texts, labels) of each split -> its examples, and the columns that a file of the same would have."""
    splits, names_of = {}, {}
    for split, pair in given.items():
        splits[split], names_of[split] = _examples_of(split, pair)
    names = next(iter(names_of.values()))
    for split, own in names_of.items():
        if own != names:
            said = f"labels come in the columns {' and '.join(own)}, those of training in {' and '.join(names)}"
            raise UserError(f"{split}: {said}")
    first = next(iter(splits.values()))
    first.weights = sample_weights(sample_weight, len(first))
    second = "text_pair" if first.pairs is not None else None
    return splits, Columns(("text",), second, names, delimiter)


def _examples_of(split: str, pair: tuple[Iterable[Any], Iterable[Any]]) -> tuple[Examples, tuple[str, ...]]:
    """The examples of (texts, labels), and the names of the columns that the labels come in."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(f"{split}: expected a pair, (texts, labels)")
    texts, pairs = as_texts(pair[0], None, may_lack=True)
    names, values = _labels(pair[1])
    if len(values) != len(texts):
        raise UserError(f"{split}: {len(texts)} texts but {len(values)} labels; give one label for each text")
    if not texts:
        raise UserError(f"{split}: no texts; leave it out or give some")
    return Examples(f"{split} list", texts, pairs, values, list(range(len(texts)))), names


def sample_weights(sample_weight: Iterable[float] | None, rows: int) -> list[float] | None:
    """A weight of at least 0 for each row."""
    if sample_weight is None:
        return None
    try:
        weights = np.asarray(plain_values(sample_weight), dtype=np.float32)
    except (TypeError, ValueError):
        raise UserError("sample_weight: expected a number for each text") from None
    if weights.shape != (rows,):
        raise UserError(f"sample_weight: {rows} texts, but weights of shape {weights.shape}; give one per text")
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise UserError("sample_weight: weights are finite numbers of at least 0, not all of them 0")
    return weights.tolist()


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
    rows = plain_values(labels)
    if not isinstance(rows, Iterable):
        raise UserError(f"expected a list of labels, not {one_line(repr(labels))[:60]}")
    if len(names) > 1:
        return names, [tuple(row) for row in rows]
    return names, [plain_values(row) for row in rows]


def plain_values(value: Any) -> Any:
    """Python's own value or list for one of numpy, pandas, polars, torch or Arrow; a list for a set."""
    if isinstance(value, set | frozenset):
        return list(value)
    for convert in ("tolist", "to_list", "to_pylist", "as_py"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value
