"""Texts to predict, embed or measure, chunk by chunk, so that what is read may be larger than memory."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from minibert.config import DataSettings
from minibert.data.columns import (
    Columns,
    as_trained,
    check_label_column,
    check_same_kind,
    column_names,
    find_columns,
    has_header,
    header_note,
    row_preview,
    text_column_note,
)
from minibert.data.delimited import Dialect
from minibert.data.examples import (
    Examples,
    count_rows,
    examples_from_table,
    rows_may_lack_labels,
    usable_rows,
    with_label_names,
    with_parsed_labels,
)
from minibert.data.labels import indicator_length, normalize_spelling
from minibert.data.rows import BadRow, Table, describe_bad
from minibert.data.sources import MAX_LINE_LENGTH, known_encoding
from minibert.data.tables import first_rows, stream_table
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem


def stream_examples(
    path: str, config: DataSettings, with_labels: bool = False, trained: Columns | None = None, same_kind: bool = True
) -> Iterator[Examples]:
    """Rows of a file, chunk by chunk, so that it may be larger than memory; the first chunk decides on the columns.

    `trained`: where the model's training found its texts, for the columns that no flag names. `same_kind`: single texts
    for a model of pairs are an error, as are pairs for one of single texts.
    """
    _, config, header = _opened(path, config, trained)
    trained = trained if same_kind else None

    def checked(examples: Examples, columns: Columns) -> Examples:
        if with_labels:
            return usable_rows(examples, config, rows_may_lack_labels(columns, config))
        skips = config.on_bad_rows == "skip"
        return usable_rows(examples, config, may_lack_labels=True) if skips else examples  # blank texts get an answer

    yield from _stream(path, header, config, trained, with_labels, checked)


def stream_labelled(
    path: str, problem: Problem, config: DataSettings, trained: Columns | None = None
) -> Iterator[Examples]:
    """`stream_examples` with labels that a trained model knows, for `evaluate`."""
    first, config, header = _opened(path, config, trained)
    several = problem.kind == MULTI and len(problem.labels) > 1
    if several and not config.label_column and set(problem.labels) <= column_names(first, header):
        config = replace(config, label_column=tuple(problem.labels))

    def named(examples: Examples, columns: Columns) -> Examples:
        return with_known_labels(examples, columns, problem, config)

    for examples in _stream(path, header, config, trained, True, named):
        check_labels_known(examples, problem)
        yield examples


def with_known_labels(examples: Examples, columns: Columns, problem: Problem, config: DataSettings) -> Examples:
    """The rows that can be used, their labels as a trained model knows them."""
    indicators = columns.label if len(columns.label) > 1 else ()
    if indicators and (missing := [name for name in problem.labels if name not in indicators]):
        raise UserError(
            f"{examples.source}: no column {', '.join(map(repr, missing[:5]))}, which the model has for a label"
        )
    examples = usable_rows(examples, config, rows_may_lack_labels(columns, config))
    if not indicators and indicator_length(examples.labels or []) == len(problem.labels):
        indicators = tuple(problem.labels)
    examples = with_parsed_labels(examples, problem.kind, indicators, config)
    if config.label_names:
        examples = with_label_names(examples, problem.kind, config.label_names)
    if problem.kind == REGRESSION:
        return examples
    return replace(examples, labels=normalize_spelling(examples.labels or [], problem.labels))


def _opened(path: str, config: DataSettings, trained: Columns | None) -> tuple[Table, DataSettings, bool]:
    """(first rows, flags with training's columns, whether there is a header), with a note where that is doubtful."""
    first = first_rows(path, config)
    config, header = as_trained(config, trained, first)
    doubt = header_note(first, config, header)
    if not header and has_header(first, config):
        doubt = f"{path}: the first row ({row_preview(first)}) is read as data, for training's file had no header"
    if doubt:
        print(f"note: {doubt}", file=sys.stderr)
    return first, config, header


def _stream(
    path: str,
    header: bool,
    config: DataSettings,
    trained: Columns | None,
    need_label: bool,
    checked: Callable[[Examples, Columns], Examples],
) -> Iterator[Examples]:
    columns: Columns | None = None
    bad: list[BadRow] = []
    count = 0
    encoding, on_bad_rows, dialect = config.encoding, config.on_bad_rows, Dialect.of(config)
    for table in stream_table(path, header=header, encoding=encoding, on_bad_rows=on_bad_rows, dialect=dialect):
        if columns is None:
            columns = find_columns(table, config, need_label)
            if not need_label and (guess := text_column_note(columns, table, config)):
                print(f"note: {guess}", file=sys.stderr)
            if trained is not None:
                check_same_kind(columns, path, trained)
                if need_label:
                    check_label_column(columns, path, config, trained, header)
        examples = checked(examples_from_table(table, columns, need_label), columns)
        bad += examples.bad
        count += len(examples)
        yield examples
    if bad and not count:
        raise UserError(f"{path}: no row can be used; {describe_bad(bad)}")
    if bad:
        print(f"skipped {count_rows(bad)} of {path}, {describe_bad(bad)}", file=sys.stderr)


def check_labels_known(examples: Examples, problem: Problem) -> None:
    known = set(problem.labels)
    for line, value in zip(examples.lines, examples.labels or [], strict=True):
        names = {value} if problem.kind == SINGLE else set(value) if problem.kind == MULTI else set()
        if names - known:
            unknown, some = min(names - known), ", ".join(problem.labels[:8])
            more = f" and {len(known) - 8} more" if len(known) > 8 else ""
            hint = "; --label-delimiter takes several labels apart" if problem.kind == MULTI else ""
            where = f"{examples.source}, line {line}"
            raise UserError(f"{where}: label {unknown!r} is unknown to the model; it knows {some}{more}{hint}")


def stream_lines(read: Callable[[], bytes], encoding: str) -> Iterator[Examples]:
    """The lines that are there, as soon as they are; blank ones too, so that line n is answered by row n."""
    source, rest, count = "standard input", "", 0
    decoder = codecs.getincrementaldecoder(known_encoding(encoding))()
    data = b"\n"
    while data:
        data = read()
        try:
            *lines, rest = (rest + decoder.decode(data, final=not data)).split("\n")
        except UnicodeError:
            raise UserError(f"{source}, after line {count}: not {encoding} text; give --encoding") from None
        if len(rest) > MAX_LINE_LENGTH:
            raise UserError(
                f"{source}, line {count + len(lines) + 1}: longer than {MAX_LINE_LENGTH >> 20} million characters"
            )
        if lines:
            numbers = list(range(count + 1, count + len(lines) + 1))
            yield Examples(source, [line.removesuffix("\r") for line in lines], lines=numbers)
            count += len(lines)
    if rest:
        yield Examples(source, [rest], lines=[count + 1])
