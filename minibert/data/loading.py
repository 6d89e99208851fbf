"""Files or lists -> what a run trains on: columns, problem type and label names decided, rows stratified_split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minibert.batching.tokens import Tokens
from minibert.config import RunConfig, flag_name
from minibert.data.columns import (
    Columns,
    check_label_column,
    check_same_kind,
    doubtful_header,
    find_columns,
    has_header,
    known_names,
)
from minibert.data.examples import (
    Examples,
    count_rows,
    examples_from_table,
    rows_may_lack_labels,
    text_keys,
    usable,
    with_names,
)
from minibert.data.labels import guess_kind, indicator_length, label_warnings, normalize_spelling, sorted_labels
from minibert.data.rows import BadRow, Table, describe_bad
from minibert.data.splits import stratified_split
from minibert.data.tables import first_rows, read_table
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem

ROOM_FOR_LABELS = 30  # characters


@dataclass
class RunData:
    """Everything a run reads: the parts, and what the labels are."""

    parts: dict[str, Examples]  # train, validation and, if there is one, test
    problem: Problem
    columns: Columns
    notes: list[str]  # what was decided without being asked
    skipped: dict[str, list[BadRow]] = field(default_factory=dict)  # by --on-bad-rows skip
    encoded: dict[str, Tokens] | None = None  # of each part, where several runs share them


def load_data(config: RunConfig) -> RunData:
    """Read the files that the flags name, decide what the labels are, and split what has no file of its own."""
    assert config.train is not None
    notes: list[str] = []
    tables: dict[str, Table] = {}
    headers: dict[str, bool] = {}
    for part in ("train", "validation", "test"):
        if path := getattr(config, part):
            like = None if part == "train" or headers["train"] else tables["train"]
            tables[part], headers[part] = _read(path, config, notes, like)
    columns = find_columns(tables["train"], config)
    columns = replace(columns, header=headers["train"])
    notes.append(str(columns))
    parts = {}
    for part, table in tables.items():
        own = columns if part == "train" else _columns_like(columns, table, config, headers[part])
        if str(own) != str(columns):
            notes.append(f"in {table.path} {own}")
        parts[part] = examples_from_table(table, own)
    return prepare(parts, columns, config, notes)


def _columns_like(columns: Columns, table: Table, config: RunConfig, header: bool) -> Columns:
    """The columns of a part: those of training, or others that hold the same."""
    if all(name in table.columns for name in columns.names()):
        return columns
    own = find_columns(table, config)
    check_same_kind(own, table.path, columns)
    check_label_column(own, table.path, config, columns, header)
    if len(columns.label) > 1 and own.label != columns.label:
        missing = [name for name in columns.label if name not in own.label]
        raise UserError(f"{table.path}: no column {', '.join(map(repr, missing))}, which training has for a label")
    return own


def _read(path: str, config: RunConfig, notes: list[str], headerless: Table | None = None) -> tuple[Table, bool]:
    """A whole file, and whether it has a header; `headerless`: what training reads, if that has none."""
    first = first_rows(path, config)
    header = has_header(first, config)
    if headerless is not None and len(first.columns) == len(headerless.columns):
        header = header and bool(known_names(first, config))
    if not header and not config.no_header:
        notes.append(f"{path} has no header: its first row looks like the others")
    if doubt := doubtful_header(first, config, header):
        notes.append(doubt)
    table = read_table(path, header=header, encoding=config.encoding, on_bad_rows="skip")
    if not table.lines and not table.bad:
        raise UserError(f"{path}: no rows; expected a header and at least one row of data")
    if table.encoding not in ("utf-8", config.encoding):
        notes.append(f"{path} is not UTF-8; read as {table.encoding} (--encoding says otherwise)")
    return table, header


def prepare(parts: dict[str, Examples], columns: Columns, config: RunConfig, notes: list[str]) -> RunData:
    """Check rows, name the labels, and stratified_split."""
    may_lack = rows_may_lack_labels(columns, config)
    parts = {part: usable(examples, config, may_lack) for part, examples in parts.items()}
    kind, why, places = _decide(parts["train"].labels or [], columns, config)
    parts = {part: with_names(examples, kind, places, config) for part, examples in parts.items()}
    if kind != REGRESSION and not places:
        parts = _with_one_spelling(parts, kind, notes)
    for examples in parts.values():
        if examples.bad and not len(examples):
            raise UserError(f"{examples.source}: no row can be used; {describe_bad(examples.bad)}")
    skipped = {part: examples.bad for part, examples in parts.items() if examples.bad}
    for part, bad in skipped.items():
        notes.append(f"skipped {count_rows(bad)} of {parts[part].source}, {describe_bad(bad)}")
    problem = Problem(kind, _label_names(parts, kind, places, columns))
    if kind == REGRESSION and config.label_smoothing:
        raise UserError("--label-smoothing: regression has no classes; leave the flag out")
    notes += _decision_notes(problem, why, parts["train"], config)
    if config.max_train_samples and config.max_train_samples < len(parts["train"]):
        rows = len(parts["train"])
        parts["train"] = _sampled(parts["train"], kind, config.max_train_samples, config)
        flag = f"--max-train-samples {config.max_train_samples}"
        notes.append(f"{len(parts['train'])} of {rows} training rows are used ({flag})")
    _split_parts(parts, problem, config)
    if kind == REGRESSION:
        problem.choose_unit(problem.targets(parts["train"].labels or []))
    if problem.unit > 1:
        notes.append(f"labels of so wide a spread are counted in units of {problem.unit:.4g} while training")
    if "validation" not in parts:
        notes += [f"there are no validation rows: {flag_name(name)} has no effect" for name in _of_validation(config)]
    return RunData(parts, problem, columns, notes, skipped)


def _of_validation(config: RunConfig) -> list[str]:
    """The flags given that are about evaluations during training."""
    return [name for name in ("metric", "eval_steps", "early_stopping_patience") if getattr(config, name) is not None]


def _decide(values: Sequence[Any], columns: Columns, config: RunConfig) -> tuple[str, str, tuple[str, ...]]:
    """The problem type, why, and what the 0s and 1s of a row stand for, where it has one for each label."""
    kind, why = guess_kind(values, len(columns.label), config.label_delimiter)
    if config.problem_type != "auto":
        kind, why = config.problem_type, "as --problem-type says"
    if len(columns.label) > 1:
        if kind != MULTI:
            raise UserError(f"--problem-type {kind}: takes one label column, not {', '.join(columns.label)}")
        return kind, why, columns.label
    places = tuple(map(str, range(indicator_length(values)))) if kind == MULTI and not config.label_delimiter else ()
    return kind, why, places


def _label_names(parts: dict[str, Examples], kind: str, places: tuple[str, ...], columns: Columns) -> list[str]:
    """The labels of all parts, in the order of their numbers; regression has one, its column's."""
    if kind == REGRESSION:
        return [columns.label[0]]
    names = _all_names(parts, kind)
    if not names:
        raise UserError(f"{parts['train'].source}: no row has a label; a classifier needs some")
    if len(names) < 2 and kind == SINGLE:
        raise UserError(f"{parts['train'].source}: only one label, {names.pop()!r}; a classifier needs two or more")
    return list(places) or sorted_labels(names)


def _with_one_spelling(parts: dict[str, Examples], kind: str, notes: list[str]) -> dict[str, Examples]:
    """The same parts, a label that is a whole number spelled alike in all of them."""
    names = _all_names(parts, kind)
    parts = {part: replace(rows, labels=normalize_spelling(rows.labels or [], names)) for part, rows in parts.items()}
    if gone := sorted_labels(names - _all_names(parts, kind)):
        notes.append(f"labels such as {gone[0]} are taken for {normalize_spelling(gone[:1], names)[0]}")
    return parts


def _all_names(parts: dict[str, Examples], kind: str) -> set[str]:
    return set().union(*(_names_in(examples.labels or [], kind) for examples in parts.values()))


def _names_in(labels: list[Any], kind: str) -> set[str]:
    return set(labels) if kind == SINGLE else {name for row in labels for name in row}


def _decision_notes(problem: Problem, why: str, train: Examples, config: RunConfig) -> list[str]:
    names = problem.labels
    if problem.kind == REGRESSION:
        return [f"{problem.kind}, {why}"]
    notes = [f"{problem.kind}, {why}: {len(names)} labels ({_some_names(names)})"]
    is_guess = problem.kind == SINGLE and config.problem_type == "auto"
    return notes + (label_warnings(train.labels or []) if is_guess else [])


def _some_names(labels: list[str]) -> str:
    """As many labels as a line has room for."""
    shown = labels[:6]
    while len(shown) > 1 and len(", ".join(shown)) > ROOM_FOR_LABELS:
        shown.pop()
    return ", ".join(shown) + (", ..." if len(shown) < len(labels) else "")


def _split_parts(parts: dict[str, Examples], problem: Problem, config: RunConfig) -> None:
    """Give validation and test their share of the training rows, where they have no file."""
    shares = {"test": config.test_split, "validation": config.validation_split}
    total = len(parts["train"])
    for part, share in shares.items():
        if part in parts or share == 0:
            continue
        train = parts["train"]
        parts["train"], parts[part] = _divided(train, problem.kind, share * total / len(train), config)
        if not len(parts[part]) or not len(parts["train"]):
            different = len(set(text_keys(train)))
            texts = f" of {different} different texts" if different < len(train) else ""
            doubtful = 2 * len(problem.labels) > total and not config.max_train_samples
            many = " for so many labels (is --label-column right?)" if doubtful else ""
            raise UserError(
                f"{train.source}: {total} rows{texts} are too few{many} to split off {part}; give --{part}-split 0"
            )


def _sampled(examples: Examples, kind: str, most: int, config: RunConfig) -> Examples:
    """At most so many rows, with the labels' shares kept; the labels with most rows make up for those with few."""
    rows = [str(row) for row in range(len(examples))]  # equal texts may part: the others are not used
    kept, _ = stratified_split(rows, examples.labels or [], kind, 1 - most / len(examples), config.split_seed)
    sample = examples.take(kept)
    seen: Counter[str] = Counter()
    earlier = []  # rows before each that have the same label
    for label in map(str, sample.labels or []):
        earlier.append(seen[label])
        seen[label] += 1
    return sample.take(np.sort(np.argsort(earlier, kind="stable")[:most]))


def _divided(examples: Examples, kind: str, share: float, config: RunConfig) -> tuple[Examples, Examples]:
    kept, taken = stratified_split(text_keys(examples), examples.labels or [], kind, share, config.split_seed)
    return examples.take(kept), examples.take(taken)
