"""Data files to examples: which columns, which rows can be used, which labels there are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minibert.batching.tokens import Tokens
from minibert.config import RunConfig, flag_name
from minibert.data.columns import (
    Columns,
    as_trained,
    column_names,
    find_columns,
    guessed_text,
    has_header,
    known_names,
    refuse_guessed_label,
    refuse_unlike_training,
)
from minibert.data.labels import guess_kind, indicator_length, is_missing, read_label, respelled, second_thoughts
from minibert.data.rows import BadRow, Table, bad_rows_error, describe_bad
from minibert.data.splits import split
from minibert.data.tables import read_table, stream_table
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem, sorted_labels
from minibert.runtime.files import one_line, valid_unicode

ROOM_FOR_LABELS, ROOM_FOR_ROW = 30, 60  # characters
HEADER_ROWS = 200  # looked at to tell whether there is a header


@dataclass
class Examples:
    """Rows of one file or list: texts, second texts of pairs, and labels as read, with the lines they stand on."""

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)  # rows of the source that are not among these

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        """Some of the rows; `bad` stays behind, for it tells of the whole source."""

        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in rows]

        return Examples(self.source, pick(self.texts), pick(self.pairs), pick(self.labels), pick(self.lines))


@dataclass
class RunData:
    """Everything a run reads: the parts, and what the labels are."""

    parts: dict[str, Examples]  # train, validation and, if there is one, test
    problem: Problem
    columns: Columns
    notes: list[str]  # what was decided without being asked
    skipped: dict[str, list[BadRow]] = field(default_factory=dict)  # by --on-bad-rows skip
    encoded: dict[str, Tokens] | None = None  # of each part, where several runs share them


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
    refuse_unlike_training(own, table.path, columns)
    refuse_guessed_label(own, table.path, config, columns, header)
    if len(columns.label) > 1 and own.label != columns.label:
        missing = [name for name in columns.label if name not in own.label]
        raise UserError(f"{table.path}: no column {', '.join(map(repr, missing))}, which training has for a label")
    return own


def stream_examples(
    path: str, config: RunConfig, with_labels: bool = False, trained: Columns | None = None, alike: bool = True
) -> Iterator[Examples]:
    """Rows of a file, chunk by chunk, so that it may be larger than memory; the first chunk decides on the columns.

    `trained`: where the model's training found its texts, for the columns that no flag names. `alike`: single texts
    for a model of pairs are an error, as are pairs for one of single texts.
    """
    _, config, header = _opened(path, config, trained)
    trained = trained if alike else None

    def checked(examples: Examples, columns: Columns) -> Examples:
        if with_labels:
            return usable(examples, config, _may_lack_labels(columns, config))
        skips = config.on_bad_rows == "skip"
        return usable(examples, config, may_lack_labels=True) if skips else examples  # a blank text has an answer, too

    yield from _stream(path, header, config, trained, with_labels, checked)


def stream_labelled(
    path: str, problem: Problem, config: RunConfig, trained: Columns | None = None
) -> Iterator[Examples]:
    """`stream_examples` with labels that a trained model knows, for `evaluate`."""
    first, config, header = _opened(path, config, trained)
    several = problem.kind == MULTI and len(problem.labels) > 1
    if several and not config.label_column and set(problem.labels) <= column_names(first, header):
        config = replace(config, label_column=tuple(problem.labels))

    def named(examples: Examples, columns: Columns) -> Examples:
        places = columns.label if len(columns.label) > 1 else ()
        if places and (missing := [name for name in problem.labels if name not in places]):
            raise UserError(f"{path}: no column {', '.join(map(repr, missing[:5]))}, which the model has for a label")
        examples = usable(examples, config, _may_lack_labels(columns, config))
        if not places and indicator_length(examples.labels or []) == len(problem.labels):
            places = tuple(problem.labels)
        examples = with_names(examples, problem.kind, places, config)
        if problem.kind == REGRESSION:
            return examples
        return replace(examples, labels=respelled(examples.labels or [], problem.labels))

    for examples in _stream(path, header, config, trained, True, named):
        _refuse_unknown(examples, problem)
        yield examples


def _opened(path: str, config: RunConfig, trained: Columns | None) -> tuple[Table, RunConfig, bool]:
    """(first rows, flags with training's columns, whether there is a header), with a note where that is doubtful."""
    first = _first_rows(path, config)
    config, header = as_trained(config, trained, first)
    doubt = _doubt(first, config, header)
    if not header and has_header(first, config):
        doubt = f"{path}: the first row ({_shown_row(first)}) is read as data, for training's file had no header"
    if doubt:
        print(f"note: {doubt}", file=sys.stderr)
    return first, config, header


def _stream(
    path: str,
    header: bool,
    config: RunConfig,
    trained: Columns | None,
    need_label: bool,
    checked: Callable[[Examples, Columns], Examples],
) -> Iterator[Examples]:
    columns: Columns | None = None
    bad: list[BadRow] = []
    count = 0
    for table in stream_table(path, header=header, encoding=config.encoding, on_bad_rows=config.on_bad_rows):
        if columns is None:
            columns = find_columns(table, config, need_label)
            if not need_label and (guess := guessed_text(columns, table, config)):
                print(f"note: {guess}", file=sys.stderr)
            if trained is not None:
                refuse_unlike_training(columns, path, trained)
                if need_label:
                    refuse_guessed_label(columns, path, config, trained, header)
        examples = checked(examples_from_table(table, columns, need_label), columns)
        bad += examples.bad
        count += len(examples)
        yield examples
    if bad and not count:
        raise UserError(f"{path}: no row can be used; {describe_bad(bad)}")
    if bad:
        print(f"skipped {_rows(bad)} of {path}, {describe_bad(bad)}", file=sys.stderr)


def _doubt(first: Table, config: RunConfig, header: bool) -> str:
    """What to say where a first row is taken for names none of which is known: it may be a row that would be lost."""
    if not header or not first.delimited or not first.lines or known_names(first, config):
        return ""
    row = _shown_row(first)
    return f"{first.path}: the first row ({row}) is taken for the columns' names; --no-header if it is data"


def _shown_row(first: Table) -> str:
    row = ", ".join(str(cells[0]) for cells in first.columns.values() if cells)
    return one_line(row if len(row) <= ROOM_FOR_ROW else row[: ROOM_FOR_ROW - 3] + "...")


def _refuse_unknown(examples: Examples, problem: Problem) -> None:
    known = set(problem.labels)
    for line, value in zip(examples.lines, examples.labels or [], strict=True):
        names = {value} if problem.kind == SINGLE else set(value) if problem.kind == MULTI else set()
        if names - known:
            unknown, some = min(names - known), ", ".join(problem.labels[:8])
            more = f" and {len(known) - 8} more" if len(known) > 8 else ""
            hint = "; --label-delimiter takes several labels apart" if problem.kind == MULTI else ""
            where = f"{examples.source}, line {line}"
            raise UserError(f"{where}: label {unknown!r} is unknown to the model; it knows {some}{more}{hint}")


def _read(path: str, config: RunConfig, notes: list[str], headerless: Table | None = None) -> tuple[Table, bool]:
    """A whole file, and whether it has a header; `headerless`: what training reads, if that has none."""
    first = _first_rows(path, config)
    header = has_header(first, config)
    if headerless is not None and len(first.columns) == len(headerless.columns):
        header = header and bool(known_names(first, config))
    if not header and not config.no_header:
        notes.append(f"{path} has no header: its first row looks like the others")
    if doubt := _doubt(first, config, header):
        notes.append(doubt)
    table = read_table(path, header=header, encoding=config.encoding, on_bad_rows="skip")
    if not table.lines and not table.bad:
        raise UserError(f"{path}: no rows; expected a header and at least one row of data")
    if table.encoding not in ("utf-8", config.encoding):
        notes.append(f"{path} is not UTF-8; read as {table.encoding} (--encoding says otherwise)")
    return table, header


def _first_rows(path: str, config: RunConfig) -> Table:
    """The first rows, a header among them as a row of cells."""
    return next(stream_table(path, header=False, encoding=config.encoding, rows=HEADER_ROWS, on_bad_rows="skip"))


def prepare(parts: dict[str, Examples], columns: Columns, config: RunConfig, notes: list[str]) -> RunData:
    """Check rows, name the labels, and split."""
    may_lack = _may_lack_labels(columns, config)
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
        notes.append(f"skipped {_rows(bad)} of {parts[part].source}, {describe_bad(bad)}")
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


def _may_lack_labels(columns: Columns, config: RunConfig) -> bool:
    """Whether a row without a label is a row with none of several labels."""
    return config.label_delimiter is not None or len(columns.label) > 1


def usable(examples: Examples, config: RunConfig, may_lack_labels: bool) -> Examples:
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


def with_names(examples: Examples, kind: str, places: Sequence[str], config: RunConfig) -> Examples:
    """The rows whose labels can be read, as names, lists of names or numbers; the others are bad, as in `usable`."""
    bad, kept, labels = [], [], []
    for i, value in enumerate(examples.labels or []):
        try:
            labels.append(read_label(value, kind, places, config.label_delimiter))
            kept.append(i)
        except ValueError as error:
            bad.append(BadRow(examples.lines[i], str(error)))
    return replace(_without(examples, kept, bad, config), labels=labels)


def _without(examples: Examples, kept: list[int], bad: list[BadRow], config: RunConfig) -> Examples:
    """The rows `kept`, the others told or refused as --on-bad-rows says."""
    together = sorted([*examples.bad, *bad], key=lambda row: row.line)
    if together and config.on_bad_rows == "error":
        raise bad_rows_error(examples.source, together)
    return replace(examples.take(kept), bad=together) if bad else examples


def _rows(bad: list[BadRow]) -> str:
    return "1 row" if len(bad) == 1 else f"{len(bad)} rows"


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
    parts = {part: replace(rows, labels=respelled(rows.labels or [], names)) for part, rows in parts.items()}
    if gone := sorted_labels(names - _all_names(parts, kind)):
        notes.append(f"labels such as {gone[0]} are taken for {respelled(gone[:1], names)[0]}")
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
    return notes + (second_thoughts(train.labels or []) if is_guess else [])


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
    kept, _ = split(rows, examples.labels or [], kind, 1 - most / len(examples), config.split_seed)
    sample = examples.take(kept)
    seen: Counter[str] = Counter()
    earlier = []  # rows before each that have the same label
    for label in map(str, sample.labels or []):
        earlier.append(seen[label])
        seen[label] += 1
    return sample.take(np.sort(np.argsort(earlier, kind="stable")[:most]))


def _divided(examples: Examples, kind: str, share: float, config: RunConfig) -> tuple[Examples, Examples]:
    kept, taken = split(text_keys(examples), examples.labels or [], kind, share, config.split_seed)
    return examples.take(kept), examples.take(taken)
