"""CSV and TSV as people have them: delimiter, quoting and header are told by the first rows."""

from __future__ import annotations

import csv
import io
import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from minibert.config import DataSettings
from minibert.data.rows import BadRow, Table, check_width, numbered_lines, repeated_name, rows_to_columns, tables_of
from minibert.data.sources import MAX_LINE_LENGTH
from minibert.errors import UserError
from minibert.runtime.files import one_line

MIN_FIT = 0.6  # fraction of the first rows that a delimiter must cut as it cuts the header
ROWS_COMPARED = 50  # with the header
NO_DELIMITER = "\x1f"  # which no text holds
SAMPLED_LINES = 1000  # of them, to choose between kinds of quotes
SAMPLE = 1 << 18  # characters looked at to guess delimiter and quoting


class Dialect(NamedTuple):
    """What --delimiter and --quote say of CSV files; None is told by the first rows."""

    delimiter: str | None = None
    quote: str | None = None  # "none": quotes are part of the texts

    @classmethod
    def of(cls, settings: DataSettings) -> Dialect:
        return cls("\t" if settings.delimiter in ("tab", "\\t") else settings.delimiter, settings.quote)


GUESSED = Dialect()


class CsvRow(NamedTuple):
    line: int
    cells: list[str]
    last_line: int  # later than `line` where quotes hold line breaks
    runs_on: bool = False  # over lines that are rows by themselves: a quote was not closed


class _LongFields:
    """While entered, csv takes fields as long as a line may be; the limit is the whole process's, hence the lock."""

    def __init__(self) -> None:
        self.lock, self.before = threading.Lock(), 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.before = csv.field_size_limit(MAX_LINE_LENGTH)

    def __exit__(self, *_: object) -> None:
        csv.field_size_limit(self.before)
        self.lock.release()


_LONG_FIELDS = _LongFields()


def read_delimited(
    path: Path, text: IO[str], suffix: str, header: bool, size: int, dialect: Dialect = GUESSED
) -> Iterator[Table]:
    """CSV and TSV with whatever delimiter and quoting the first rows show, where `dialect` leaves them open."""
    sample = text.read(SAMPLE)
    if "\0" in sample:
        raise UserError(f"{path}: holds NUL characters; is this a text file? (other encodings need --encoding)")
    delimiter = dialect.delimiter or _delimiter(sample, "\t" if suffix == ".tsv" else ",")
    quoting = _quoting(sample, delimiter) if dialect.quote is None else _given_quoting(dialect.quote)
    if header and dialect == (None, None) and _is_one_column(sample, delimiter):
        delimiter, quoting = NO_DELIMITER, {"quoting": csv.QUOTE_NONE}
    rest = numbered_lines(path, text, first=sample.count("\n") + 1)
    rows = _csv_rows(path, _rejoined(sample, rest), {"delimiter": delimiter, **quoting})
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: empty; expected a header and rows")
    if header:
        bad: list[BadRow] = []
        head = list(itertools.islice(rows, ROWS_COMPARED))
        if _has_row_names(first.cells, head):
            first = first._replace(cells=["", *first.cells])
        rows = itertools.chain(head, rows)
        names = _column_names(path, first.cells)
        tables = tables_of(path, _checked(rows, first.cells, bad), partial(rows_to_columns, names), size, bad)
    else:
        tables = _without_header(path, first, rows, size, extra_cells=quoting["quoting"] == csv.QUOTE_NONE)
    for table in tables:
        table.delimited = True
        yield table


def _is_one_column(sample: str, delimiter: str) -> bool:
    """Whether lines are texts as people type them, below one name: now with delimiters, now without, none quoted."""
    name, *lines = [line for line in sample.splitlines() if line.strip()] or [""]
    return '"' not in sample and delimiter not in name and len({line.count(delimiter) for line in lines}) > 1


def _has_row_names(header: list[str], rows: list[CsvRow]) -> bool:
    """Whether each row has one cell more than the header, a number of its own in front, as R's write.table has it."""
    longer = all(len(row.cells) == len(header) + 1 and row.cells[0].isdecimal() for row in rows)
    return longer and len(rows) > 1 and len({row.cells[0] for row in rows}) == len(rows)


def _rejoined(sample: str, rest: Iterator[str]) -> Iterator[str]:
    """The lines of the sample, its last one completed from the rest of the file."""
    lines = io.StringIO(sample, newline="").readlines()
    last = lines.pop() if lines else ""
    yield from lines
    if last.endswith("\n"):
        yield last
    else:
        following = next(rest, "")
        yield from io.StringIO(last + following, newline="").readlines()  # a lone \r may have ended the sample
    yield from rest


def _csv_rows(path: Path, lines: Iterator[str], options: dict[str, Any]) -> Iterator[CsvRow]:
    """The rows that are not blank, without the line `sep=;` that spreadsheets write for each other."""
    taken: list[str] = []  # lines of the row

    def noted() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = csv.reader(noted(), **options)
    while True:
        start = reader.line_num + 1
        taken.clear()
        try:
            with _LONG_FIELDS:  # not around the `yield`: what reads the rows may use csv, too
                cells = next(reader)
                runs_on = len(taken) > 1 and _runs_on(taken, cells, options)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: {one_line(error)}; is a quote not closed?") from None
        if cells and not (start == 1 and cells[0].lower() == "sep=" and len(cells) == 2):
            yield CsvRow(start, cells, reader.line_num, runs_on)


def _runs_on(lines: list[str], cells: list[str], options: dict[str, Any]) -> bool:
    """Whether a quote that was not closed has swallowed the rows up to the next one.

    That one then has text behind it, where only a delimiter may stand, or the cell holds tabs beside its lines.
    """
    if options["delimiter"] == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
        return True
    try:
        list(csv.reader(lines, strict=True, **options))
    except csv.Error:
        return True
    return False


def _checked(rows: Iterable[CsvRow], header: list[str], bad: list[BadRow]) -> Iterator[tuple[int, list[str]]]:
    """Rows as wide as the header; empty cells at the end of a row may be too many, the others are bad."""
    width = len(header)
    for row in rows:
        if row.cells == header:
            bad.append(BadRow(row.line, "the header again"))
        elif row.runs_on:
            bad.append(_unclosed(row))
        elif len(row.cells) == width or (len(row.cells) > width and not any(row.cells[width:])):
            yield row.line, row.cells[:width]
        else:
            bad.append(_of_wrong_width(row, f"the header has {width}"))


def _unclosed(row: CsvRow) -> BadRow:
    more = row.last_line - row.line
    return BadRow(row.line, f"a quote is not closed, and takes in {more} more line{'s' * (more != 1)}")


def _of_wrong_width(row: CsvRow, expected: str) -> BadRow:
    cells, more = len(row.cells), row.last_line - row.line
    span = f" and {more} more lines; is a quote not closed?" if more else ""
    return BadRow(row.line, f"{cells} cell{'s' * (cells != 1)} where {expected}{span}")


def _without_header(path: Path, first: CsvRow, rows: Iterator[CsvRow], size: int, extra_cells: bool) -> Iterator[Table]:
    """Columns called 0, 1, 2, ...; short rows are filled up with None.

    A row longer than most holds a text with the delimiter in it, unless nothing is quoted: then (`extra_cells`) the
    text cannot hold one, and what comes at the end of some rows is columns of its own.
    """
    head = [first, *itertools.islice(rows, size - 1)]
    widths = Counter(len(row.cells) for row in head)
    usual = widest = max(widths, key=lambda width: (widths[width], width))
    bad: list[BadRow] = []

    def fitting() -> Iterator[tuple[int, list[str]]]:
        for row in itertools.chain(head, rows):
            if row.runs_on:
                bad.append(_unclosed(row))
            elif len(row.cells) > usual and not extra_cells:
                bad.append(_of_wrong_width(row, f"most rows have {usual}"))
            else:
                check_width(path, len(row.cells))
                yield row.line, row.cells

    def squared(rows: list[list[str]]) -> dict[str, list[Any]]:
        nonlocal widest
        widest = max([widest, *map(len, rows)])
        return rows_to_columns([str(i) for i in range(widest)], [row + [None] * (widest - len(row)) for row in rows])

    yield from tables_of(path, fitting(), squared, size, bad)


def _column_names(path: Path, cells: list[str]) -> list[str]:
    check_width(path, len(cells))
    given = {cell.strip() for cell in cells}
    names, seen = [], Counter[str]()
    for i, cell in enumerate(cells):
        name = cell.strip() or (f"unnamed {i}" if str(i) in given else str(i))
        seen[name] += 1
        names.append(name if seen[name] == 1 else repeated_name(name, seen[name]))
    return names


def _delimiter(sample: str, usual: str) -> str:
    """The one that cuts the most rows into as many cells as the first, more than one; the usual one if in doubt."""
    if given := re.match(r"sep=([^\w\s]|\t)\r?\n", sample, re.IGNORECASE):
        return given[1]
    lines = io.StringIO(sample, newline="").readlines()
    if len(sample) == SAMPLE:
        lines = lines[:-1] or lines
    fitting: dict[str, tuple[float, bool, int]] = {}
    for delimiter, quote in itertools.product("\t,;|^~", "\"'"):
        rows = _parsed(lines[:40], delimiter=delimiter, quotechar=quote, skipinitialspace=True)
        width = len(rows[0]) if rows else 0
        if width > 1:
            fit = (sum(len(row) == width for row in rows) / len(rows), delimiter == usual, width)
            fitting[delimiter] = max(fit, fitting.get(delimiter, fit))
    best = max(fitting, key=lambda delimiter: fitting[delimiter], default=usual)
    return best if best in fitting and fitting[best][0] >= MIN_FIT else usual


def _quoting(sample: str, delimiter: str) -> dict[str, Any]:
    """csv.reader's options: which quotes there are, and how a quote inside of quotes is written."""
    if not _is_quoted(sample, delimiter):
        return {"quoting": csv.QUOTE_NONE}
    edge = re.escape(delimiter)
    spaced = re.search(rf'{edge} +"[^"\r\n]*"(?={edge}|\r?$)', sample, re.MULTILINE)  # "text", "label"
    is_spaced = spaced is not None and re.search(rf'{edge}"', sample) is None
    options: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL, "skipinitialspace": is_spaced}
    single = len(re.findall(rf"(?:^|{edge})'[^'\r\n]*'(?={edge}|\r?$)", sample, re.MULTILINE))
    double = len(re.findall(rf'(?:^|{edge})"', sample, re.MULTILINE))
    in_single = options | {"quotechar": "'"}
    if single > double and single >= len(sample.splitlines()) / 2:
        return in_single
    if single and _equal_rows(sample, delimiter, in_single) > _equal_rows(sample, delimiter, options):
        return in_single
    escaped = re.search(rf'\\"(?!{edge}|\r?$)', sample, re.MULTILINE)
    if escaped and not re.search(rf'[^{edge}\r\n]""[^{edge}\r\n]', sample):
        return options | {"doublequote": False, "escapechar": "\\"}
    return options


def _given_quoting(quote: str) -> dict[str, Any]:
    return {"quoting": csv.QUOTE_NONE} if quote == "none" else {"quoting": csv.QUOTE_MINIMAL, "quotechar": quote}


def _equal_rows(sample: str, delimiter: str, options: dict[str, Any]) -> int:
    """How many rows of the sample have as many cells as the first: writers quote only cells that need it."""
    lines = io.StringIO(sample, newline="").readlines()
    rows = _parsed(lines[:SAMPLED_LINES], delimiter=delimiter, **options)
    return sum(len(row) == len(rows[0]) for row in rows)


def _parsed(lines: list[str], **options: Any) -> list[list[str]]:
    """The rows that are not blank; none where csv gives up."""
    try:
        with _LONG_FIELDS:
            return list(filter(None, csv.reader(lines, **options)))
    except csv.Error:
        return []


def _is_quoted(sample: str, delimiter: str) -> bool:
    """CSV is. A tab-separated file is if every quote stands at the edge of a cell, and quotes come in pairs."""
    if delimiter != "\t":
        return True
    cells = re.findall(r'(?:^|\t)"([^"]*)"', sample, re.MULTILINE)
    if any("\n" in cell.partition("\t")[2] for cell in cells):  # no cell would hold tabs and lines
        return False
    bare = re.search(r'[^\t\r\n"]"[^\t\r\n"]', sample)
    starts, ends = (len(re.findall(edge, sample, re.MULTILINE)) for edge in (r'(?:^|\t)"', r'"(?:\t|\r?$)'))
    return bare is None and 0 <= starts - ends <= (len(sample) == SAMPLE)  # whose end may stand inside quotes
