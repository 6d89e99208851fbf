"""Which columns of a file hold the texts and the labels: as asked for, as in training, or by the names people use."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minibert.config import DataSettings
from minibert.data.labels import (
    FLAGS,
    is_missing,
    is_number,
    label_text,
)
from minibert.data.rows import Table, describe_bad, repeated_name
from minibert.errors import UserError
from minibert.runtime.files import one_line, read_json

# What people call their columns, in the order of trust, as `_plain_name` writes them.
TEXT_NAMES = """text sentence review review_text reviewtext question_text message sms tweet comment comment_text content
question body description document resume utterance statement headline title v2 texts""".split()
LABEL_NAMES = """label labels target category class sentiment intent topic quality score rating stars y is_duplicate
spam v1 gold_label emotion output polarity overall class_index coarse_label fine_label""".split()
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("query", "passage"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "answer"),
    ("#1_string", "#2_string"),
)
KNOWN_NAMES = {*TEXT_NAMES, *LABEL_NAMES, *(name for pair in PAIR_NAMES for name in pair)}


MAX_ROW_LENGTH = 60  # characters


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are which."""

    text: tuple[str, ...]
    pair: str | None
    label: tuple[str, ...]
    delimiter: str | None = None  # between the labels of a cell
    header: bool = True  # whether the file says their names, or they are its columns' numbers

    def texts(self) -> list[str]:
        return [*self.text, *filter(None, [self.pair])]

    def names(self) -> list[str]:
        return [*self.texts(), *self.label]

    def __str__(self) -> str:
        return f"text: {' + '.join(self.texts())} · label: {', '.join(self.label)}"


def find_columns(table: Table, config: DataSettings, need_label: bool = True) -> Columns:
    """The columns named by flags, or else by the names that people use; UserError lists what is there."""
    found = {_plain_name(name): name for name in reversed(table.columns)}
    text = _asked_several(table, config.text_column, found)
    label = _asked_several(table, config.label_column, found)
    pair = _asked(table, config.text_pair_column, found) if config.text_pair_column else None
    if not text and not pair:
        first, second = next(((a, b) for a, b in PAIR_NAMES if a in found and b in found), ("", ""))
        text, pair = ((found[first],), found[second]) if first else ((), None)
    label = label or _first_of(LABEL_NAMES, found, {*text, pair})
    text = text or _first_of(TEXT_NAMES, found, {*label, pair})
    if len(table.columns) == 2 and not pair and not (text and (label or not need_label)):
        text, label = _two_columns(table, text, label, need_label)
    if len(table.columns) == 1 and not text and not label and not need_label:
        text = tuple(table.columns)
    if need_label and text and not label:
        label = _columns_of_flags(table, {*text, pair})
    if not text or (need_label and not label):
        raise _not_found(table, "--label-column" if text else "--text-column")
    columns = Columns(text, pair, label, config.label_delimiter)
    for name in columns.names():
        if columns.names().count(name) > 1:
            raise UserError(f"{table.path}: column {name!r} is asked for twice; text, second text and label differ")
        if repeated_name(name) in table.columns:
            raise UserError(f"{table.path}: column {name!r} appears twice; rename one")
    return columns


def text_column_note(columns: Columns, table: Table, config: DataSettings) -> str:
    """What to say where nothing but its content tells which column is the text; "" where a name or a flag does."""
    known = config.text_column or columns.pair or _plain_name(columns.text[0]) in KNOWN_NAMES
    if known or len(table.columns) == 1:
        return ""
    return f"{table.path}: the texts are taken from column {columns.text[0]!r}; --text-column says otherwise"


def _plain_name(name: str) -> str:
    """One spelling: `Review Text` is review_text."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _asked(table: Table, name: str, found: dict[str, str]) -> str:
    """A column named by a flag; another letter case will do."""
    if name in table.columns:
        return name
    if _plain_name(name) not in found:
        raise UserError(f"{table.path}: no column {name!r}; its columns are {', '.join(table.columns)}")
    return found[_plain_name(name)]


def _asked_several(table: Table, names: tuple[str, ...], found: dict[str, str]) -> tuple[str, ...]:
    """The columns named by a flag, whose commas may be part of a name."""
    whole = ",".join(names)
    if len(names) > 1 and whole in table.columns:
        return (whole,)
    return tuple(_asked(table, name, found) for name in names)


def _first_of(known: Sequence[str], found: dict[str, str], taken: set[str | None]) -> tuple[str, ...]:
    return tuple(found[name] for name in known if name in found and found[name] not in taken)[:1]


def _two_columns(
    table: Table, text: tuple[str, ...], label: tuple[str, ...], need_label: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of two columns, where no name tells, the label is the one of numbers, or has fewer different values.

    Without labels the text is the longer one.
    """
    first, second = table.columns
    known = text or label
    if known:
        other = second if known == (first,) else first
        return (text or (other,)), (label or (other,))

    def like_text(name: str) -> tuple[bool, int, int]:
        values = [str(value) for value in table.columns[name]]
        return not all(map(is_number, values)), len(set(values)) if need_label else 0, sum(map(len, values))

    fewer, more = sorted((first, second), key=like_text)
    return (more,), (fewer,)


def _columns_of_flags(table: Table, taken: set[str | None]) -> tuple[str, ...]:
    """Two or more columns of nothing but 0 and 1, blank cells aside: one for each label."""
    found = []
    for name, values in table.columns.items():
        seen = {label_text(value).lower() for value in values if not is_missing(value)}
        if seen and seen <= FLAGS.keys():
            found.append(name)
    names = tuple(name for name in found if name not in taken)
    return names if len(names) > 1 else ()


def _not_found(table: Table, flag: str) -> UserError:
    names, hint = list(table.columns), ""
    if not names and table.bad:
        return UserError(f"{table.path}: no row can be used; {describe_bad(table.bad)}")
    if names == ["text"] and table.path.lower().endswith(".txt"):
        hint = "; this name says a text a line: name a table .csv, and a file of `label text` lines .label"
    if names != [str(i) for i in range(len(names))]:
        return UserError(f"{table.path}: give {flag}; the columns are {', '.join(names) or 'none'}{hint}")
    first = {name: " ".join(str(cells[0]).split()) if cells else "" for name, cells in table.columns.items()}
    shown = ", ".join(f"{name} ({cell[:24]}{'...' if len(cell) > 24 else ''})" for name, cell in first.items())
    return UserError(f"{table.path}: give {flag}; there is no header; the columns are {shown}")


def has_header(first: Table, config: DataSettings) -> bool:
    """Whether the first row holds names: one is known and no value of its column, or none at all is such a value."""
    if config.no_header:
        return False
    if not first.delimited or not first.lines or any(row.line < first.lines[0] for row in first.bad):
        return True
    columns = [[str(value or "").strip() for value in values] for values in first.columns.values()]
    values = [name for name, *below in columns if name and _is_one_of(name, below)]
    return not values or any(name not in values for name in known_names(first, config))


def known_names(first: Table, config: DataSettings) -> list[str]:
    """Cells of a file's first row that are names which flags ask for, or which people use."""
    asked = {*config.text_column, *config.label_column, *filter(None, [config.text_pair_column])}
    known = {*map(_plain_name, asked), *KNOWN_NAMES}
    cells = [str(values[0] or "").strip() for values in first.columns.values() if values]
    return [name for name in cells if _plain_name(name) in known]


def column_names(first: Table, header: bool) -> set[str]:
    """The names of a file's columns; those of a header are in its first row, which `first` holds as a row of cells."""
    if not (header and first.delimited):
        return set(first.columns)
    return {str(cells[0]).strip() for cells in first.columns.values() if cells}


def _is_one_of(name: str, values: list[str]) -> bool:
    """A name that occurs below itself, in a column of few values or of numbers, is no name."""
    if is_number(name):
        return name in values or (bool(values) and all(map(is_number, values)))
    return name in values and len(set(values)) <= len(values) / 2


def trained_columns(folder: str | Path) -> Columns | None:
    """Where a run's training found its texts and labels, by its run.json; None for a model that has none."""
    try:
        columns = read_json(Path(os.path.expanduser(folder), "run.json"))["columns"]
        text, label, header = tuple(columns["text"]), tuple(columns["label"]), columns.get("header") is not False
        found = Columns(text, columns["pair"], label, columns["delimiter"], header)
    except (UserError, LookupError, TypeError, AttributeError):
        return None
    return found if all(isinstance(name, str) for name in [*found.names(), found.delimiter or ""]) else None


def as_trained(config: DataSettings, trained: Columns | None, first: Table) -> tuple[DataSettings, bool]:
    """The flags, with training's columns for those not given where the file has them, and whether it has a header.

    `first`: the file's first rows, read as if it had none.
    """
    header = has_header(first, config)
    if trained is None:
        return config, header
    above = {*map(_plain_name, column_names(first, header=True))}
    if trained.header:
        header = header or (not config.no_header and {*map(_plain_name, trained.text)} <= above)
    elif first.delimited:
        header = header and bool(known_names(first, config))
    names = {*map(_plain_name, column_names(first, header))}

    def there(*columns: str) -> bool:
        return {*map(_plain_name, columns)} <= names

    text, pair, label = config.text_column, config.text_pair_column, config.label_column
    if not text and not pair and there(*trained.texts()):
        text, pair = trained.text, trained.pair
    if text and not label and there(*trained.label) and not {*text, pair} & {*trained.label}:
        label = trained.label
    delimiter = config.label_delimiter or trained.delimiter
    known = replace(config, text_column=text, text_pair_column=pair, label_column=label, label_delimiter=delimiter)
    return known, header


def check_label_column(columns: Columns, path: str, config: DataSettings, trained: Columns, header: bool) -> None:
    """UserError where only its content makes a column the labels, though training has a name for them.

    A file to measure by may have no labels at all, and what looks most like some is its column of numbers.
    """
    known = _plain_name(columns.label[0]) in {*LABEL_NAMES, *map(_plain_name, trained.label)}
    if config.label_column or not header or len(columns.label) > 1 or known:
        return
    raise UserError(
        f"{path}: no column {trained.label[0]!r}, which training has for labels; give --label-column, or, if it has no "
        "labels, leave the file to minibert.predict"
    )


def check_same_kind(columns: Columns, path: str, trained: Columns) -> None:
    """UserError where a file gives one text a row to a model of two, or the other way round."""
    if (columns.pair is None) == (trained.pair is None):
        return
    flags = "--text-column and --text-pair-column" if trained.pair else "--text-column"
    has = "one text" if columns.pair is None else "two texts"
    raise UserError(f"{path}: {has} a row ({columns}), unlike training ({' + '.join(trained.texts())}); give {flags}")


def header_note(first: Table, config: DataSettings, header: bool) -> str:
    """What to say where a first row is taken for names none of which is known: it may be a row that would be lost."""
    if not header or not first.delimited or not first.lines or known_names(first, config):
        return ""
    row = row_preview(first)
    return f"{first.path}: the first row ({row}) is taken for the columns' names; --no-header if it is data"


def row_preview(first: Table) -> str:
    row = ", ".join(str(cells[0]) for cells in first.columns.values() if cells)
    return one_line(row if len(row) <= MAX_ROW_LENGTH else row[: MAX_ROW_LENGTH - 3] + "...")
