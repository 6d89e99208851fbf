"""Files or lists -> what a run trains on: columns, problem type and label names decided, rows split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minibert.config import DataSettings
from minibert.data.columns import (
    Columns,
    check_label_column,
    check_same_kind,
    find_columns,
    has_header,
    header_note,
    known_names,
)
from minibert.data.delimited import Dialect
from minibert.data.examples import (
    Examples,
    count_rows,
    examples_from_table,
    first_number,
    rows_may_lack_labels,
    text_keys,
    usable_rows,
    with_label_names,
    with_parsed_labels,
)
from minibert.data.labels import (
    guess_kind,
    indicator_length,
    label_type,
    label_warnings,
    normalize_spelling,
    sorted_labels,
)
from minibert.data.rows import BadRow, Table, describe_bad
from minibert.data.splits import stratified_split
from minibert.data.tables import first_rows, read_table
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem, target_scale

MAX_LABELS_LENGTH = 30  # characters

Splits = dict[str, Examples]  # train, validation and, if there is one, test


@dataclass
class RunData:
    """Everything a run reads: the splits, and what the labels are."""

    splits: Splits
    problem: Problem
    columns: Columns
    notes: list[str]  # decisions that no flag made, for the console and the report
    skipped: dict[str, list[BadRow]] = field(default_factory=dict)  # by --on-bad-rows skip


def load_data(config: DataSettings) -> RunData:
    """Read the files that the flags name, decide what the labels are, and split what has no file of its own."""
    assert config.train is not None
    notes: list[str] = []
    train, header = _read(config.train, config, notes)
    columns = replace(find_columns(train, config), header=header)
    notes.append(str(columns))
    splits = {"train": examples_from_table(train, columns)}
    for name, path in (("validation", config.validation), ("test", config.test)):
        if path:
            table, header = _read(path, config, notes, None if columns.header else train)
            own = columns_like(columns, table, config, header)
            if str(own) != str(columns):
                notes.append(f"in {table.path} {own}")
            splits[name] = examples_from_table(table, own)
    return prepare(splits, columns, config, notes)


def columns_like(columns: Columns, table: Table, config: DataSettings, header: bool) -> Columns:
    """The columns of a validation or test file: those of training, or others that hold the same."""
    if all(name in table.columns for name in columns.names()):
        return columns
    own = find_columns(table, config)
    check_same_kind(own, table.path, columns)
    check_label_column(own, table.path, config, columns, header)
    if len(columns.label) > 1 and own.label != columns.label:
        missing = [name for name in columns.label if name not in own.label]
        raise UserError(f"{table.path}: no column {', '.join(map(repr, missing))}, which is a label in training")
    return own


def _read(path: str, config: DataSettings, notes: list[str], headerless: Table | None = None) -> tuple[Table, bool]:
    """A whole file, and whether it has a header; `headerless`: the training table, if that has none."""
    first = first_rows(path, config)
    header = has_header(first, config)
    if headerless is not None and len(first.columns) == len(headerless.columns):
        header = header and bool(known_names(first, config))
    if not header and not config.no_header:
        notes.append(f"{path} has no header: its first row looks like the others")
    if doubt := header_note(first, config, header):
        notes.append(doubt)
    dialect = Dialect.of(config)
    table = read_table(path, header=header, encoding=config.encoding, on_bad_rows="skip", dialect=dialect)
    if not table.lines and not table.bad:
        raise UserError(f"{path}: no rows; expected a header and at least one row of data")
    if table.encoding not in ("utf-8", config.encoding):
        notes.append(f"{path} is not UTF-8; read as {table.encoding} (--encoding overrides this)")
    return table, header


def prepare(splits: Splits, columns: Columns, config: DataSettings, notes: list[str]) -> RunData:
    """Check rows, name the labels, and split off validation and test rows."""
    may_lack = rows_may_lack_labels(columns, config)
    splits = {name: usable_rows(examples, config, may_lack) for name, examples in splits.items()}
    kind, why, indicators = _problem_type(splits["train"].labels or [], columns, config)
    if len(columns.label) > 1 or config.label_names:
        given_as = "str"
    else:
        given_as = "int" if indicators else label_type(_all_labels(splits))
    splits = {name: with_parsed_labels(examples, kind, indicators, config) for name, examples in splits.items()}
    if kind != REGRESSION and not indicators:
        splits = _with_one_spelling(splits, kind, notes)
    if config.label_names:
        names = indicators = config.label_names
        first = first_number(splits["train"].labels or [], names)
        splits = {name: with_label_names(rows, kind, names, first) for name, rows in splits.items()}
    skipped = _skipped(splits, notes)
    labels = _label_names(splits, kind, indicators, columns)
    if config.positive_label is not None:
        labels = _positive_last(labels, kind, config.positive_label)
    problem = Problem(kind, labels, label_type=given_as)
    notes += _problem_notes(problem, why, splits["train"], config)
    rows, given = len(splits["train"]), config.max_train_samples
    limit = math.ceil(given * rows) if given and given < 1 else int(given or 0)
    if 0 < limit < rows:
        splits["train"] = _sampled(splits["train"], kind, limit, config)
        flag = f"--max-train-samples {100 * given:g}%" if given and given < 1 else f"--max-train-samples {limit}"
        notes.append(f"{len(splits['train'])} of {rows} training rows are used ({flag})")
    _split_off(splits, problem, config)
    if kind == REGRESSION:
        problem = replace(problem, target_scale=target_scale(problem.targets(splits["train"].labels or [])))
    if problem.target_scale > 1:
        notes.append(f"labels of so wide a spread are divided by {problem.target_scale:.4g} while training")
    return RunData(splits, problem, columns, notes, skipped)


def _skipped(splits: Splits, notes: list[str]) -> dict[str, list[BadRow]]:
    """The rows left out of each split, with a note for each; UserError where none is left."""
    skipped = {}
    for name, examples in splits.items():
        if examples.bad and not len(examples):
            raise UserError(f"{examples.source}: no row can be used; {describe_bad(examples.bad)}")
        if examples.bad:
            skipped[name] = examples.bad
            notes.append(f"skipped {count_rows(examples.bad)} of {examples.source}, {describe_bad(examples.bad)}")
    return skipped


def _problem_type(values: Sequence[Any], columns: Columns, config: DataSettings) -> tuple[str, str, tuple[str, ...]]:
    """The problem type, why, and the labels' names where a row has a 0 or 1 for each label."""
    kind, why = guess_kind(values, len(columns.label), config.label_delimiter)
    if config.problem_type != "auto":
        kind, why = config.problem_type, "as --problem-type says"
    if len(columns.label) > 1:
        if kind != MULTI:
            raise UserError(f"--problem-type {kind}: takes one label column, not {', '.join(columns.label)}")
        return kind, why, columns.label
    length = indicator_length(values) if kind == MULTI and not config.label_delimiter else 0
    return kind, why, tuple(map(str, range(length)))


def _label_names(splits: Splits, kind: str, indicators: tuple[str, ...], columns: Columns) -> list[str]:
    """The labels of all splits, in the order of their numbers; regression has one, its column's."""
    if kind == REGRESSION:
        return [columns.label[0]]
    names = _all_names(splits, kind)
    if not names:
        raise UserError(f"{splits['train'].source}: no row has a label; a classifier needs some")
    if len(names) < 2 and kind == SINGLE:
        raise UserError(f"{splits['train'].source}: only one label, {names.pop()!r}; a classifier needs two or more")
    return list(indicators) or sorted_labels(names)


def _positive_last(names: list[str], kind: str, positive: str) -> list[str]:
    """Two labels, the one that metrics of two classes are about behind the other."""
    if kind != SINGLE or len(names) != 2:
        raise UserError(f"--positive-label {positive}: is for one label of two; here are {_some_names(names)}")
    if positive not in names:
        raise UserError(f"--positive-label {positive}: not a label here; give {names[0]} or {names[1]}")
    return [name for name in names if name != positive] + [positive]


def _with_one_spelling(splits: Splits, kind: str, notes: list[str]) -> Splits:
    """The same splits, a label that is an integer spelled alike in all of them."""
    names = _all_names(splits, kind)
    splits = {name: replace(rows, labels=normalize_spelling(rows.labels or [], names)) for name, rows in splits.items()}
    if gone := sorted_labels(names - _all_names(splits, kind)):
        notes.append(f"labels such as {gone[0]} are read as {normalize_spelling(gone[:1], names)[0]}")
    return splits


def _all_labels(splits: Splits) -> Iterator[Any]:
    return (label for examples in splits.values() for label in examples.labels or [])


def _all_names(splits: Splits, kind: str) -> set[str]:
    labels = _all_labels(splits)
    return set(labels) if kind == SINGLE else {name for names in labels for name in names}


def _problem_notes(problem: Problem, why: str, train: Examples, config: DataSettings) -> list[str]:
    if problem.kind == REGRESSION:
        return [f"{problem.kind}, {why}"]
    names = problem.labels
    notes = [f"{problem.kind}, {why}: {len(names)} labels ({_some_names(names)})"]
    if problem.kind == SINGLE and len(names) == 2:
        notes.append(f"the positive class is {names[1]!r}" + ("" if config.positive_label else " (--positive-label)"))
    is_guess = problem.kind == SINGLE and config.problem_type == "auto"
    return notes + (label_warnings(train.labels or []) if is_guess else [])


def _some_names(labels: list[str]) -> str:
    """As many labels as a line has room for."""
    shown = labels[:6]
    while len(shown) > 1 and len(", ".join(shown)) > MAX_LABELS_LENGTH:
        shown.pop()
    return ", ".join(shown) + (", ..." if len(shown) < len(labels) else "")


def _split_off(splits: Splits, problem: Problem, config: DataSettings) -> None:
    """Give test and validation their fraction of the training rows, where they have no file."""
    total = len(splits["train"])
    for name, fraction in (("test", config.test_split), ("validation", config.validation_split)):
        if name in splits or fraction == 0:
            continue
        train = splits["train"]
        keys, of_rest = text_keys(train), fraction * total / len(train)
        kept, taken = stratified_split(keys, train.labels or [], problem.kind, of_rest, config.split_seed)
        if not len(kept) or not len(taken):
            distinct = len(set(keys))
            texts = f" of {distinct} different texts" if distinct < len(train) else ""
            doubtful = 2 * len(problem.labels) > total and not config.max_train_samples
            many = " for so many labels (is --label-column right?)" if doubtful else ""
            raise UserError(
                f"{train.source}: {total} rows{texts} are too few{many} to split off {name}; give --{name}-split 0"
            )
        splits["train"], splits[name] = train.take(kept), train.take(taken)


def _sampled(examples: Examples, kind: str, limit: int, config: DataSettings) -> Examples:
    """At most `limit` rows, stratified by label; the labels with most rows make up for those with few."""
    keys = [str(row) for row in range(len(examples))]  # equal texts may be separated: the others are not used
    kept, _ = stratified_split(keys, examples.labels or [], kind, 1 - limit / len(examples), config.split_seed)
    sample = examples.take(kept)
    seen: Counter[str] = Counter()
    earlier = []  # rows before each that have the same label
    for label in map(str, sample.labels or []):
        earlier.append(seen[label])
        seen[label] += 1
    return sample.take(np.sort(np.argsort(earlier, kind="stable")[:limit]))
