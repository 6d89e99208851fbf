"""Data files as people have them -> columns: CSV, TSV, JSON lines, JSON, Parquet, plain lines, also in .gz and .zip.

Files are read in chunks, so a file may be larger than memory. What cannot be read is one line of error that says
where and what to do.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from minibert.data.sources import LONGEST_LINE, encoding_of, open_bytes, open_text, reading, suffix_of
from minibert.errors import UserError
from minibert.runtime.files import one_line, refuse_special

LARGEST_JSON = 2 << 30  # bytes: a JSON array, like packed Parquet, can only be read as a whole
MOST_COLUMNS = 4096  # more is a broken or hostile file, which rows of that width would let fill the memory
LEAST_FIT = 0.6  # share of the first rows that a delimiter must cut as it cuts the header
NOT_AN_OBJECT = 'expected an object such as {"text": ..., "label": ...}'
ROWS_COMPARED = 50  # with the header
NO_DELIMITER = "\x1f"  # which no text holds
SAMPLE = 1 << 18  # characters looked at to guess delimiter and quoting
PLAIN_SAMPLE = 50  # lines looked at to tell `LABEL text` lines from plain texts
LINE_LABEL = re.compile(r"([A-Za-z]\w*:[\w-]+|__label__\S+)[ \t]")  # as in TREC and in fastText

Row = TypeVar("Row")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it starts, and why."""

    line: int
    reason: str


@dataclass
class Table:
    """Rows as columns. Text files give strings; JSON and Parquet keep their types, None where there is nothing."""

    path: str
    columns: dict[str, list[Any]]
    lines: list[int] = field(default_factory=list)  # where each row starts: line, or row number in Parquet and JSON
    encoding: str = "utf-8"
    bad: list[BadRow] = field(default_factory=list)  # the rows left out
    delimited: bool = False  # rows of cells, the first of which may hold names


class CsvRow(NamedTuple):
    line: int
    cells: list[str]
    last_line: int  # later than `line` where quotes hold line breaks
    runs_on: bool = False  # over lines that are rows by themselves: a quote was not closed


def read_table(
    path: str | Path, *, header: bool = True, encoding: str | None = None, on_bad_rows: str = "error"
) -> Table:
    """The whole file. A file with a header alone has columns and no rows."""
    whole: Table | None = None
    for table in stream_table(path, header=header, encoding=encoding, on_bad_rows=on_bad_rows):
        if whole is None:
            whole = table
            continue
        _refuse_width(path, len(whole.columns.keys() | table.columns.keys()))
        for name in [name for name in table.columns if name not in whole.columns]:
            whole.columns[name] = [None] * len(whole.lines)
        for name, values in whole.columns.items():
            values += table.columns.get(name, [None] * len(table.lines))
        whole.lines += table.lines
        whole.bad += table.bad
    assert whole is not None
    return whole


def stream_table(
    path: str | Path,
    *,
    header: bool = True,
    encoding: str | None = None,
    rows: int = 10_000,
    on_bad_rows: str = "error",
) -> Iterator[Table]:
    """The file in tables of at most `rows` rows, at least one table; on_bad_rows="skip" leaves bad ones in `bad`."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'is a folder; give a file' if path.is_dir() else 'no such file'}")
    refuse_special(path)
    with reading(path):
        suffix = suffix_of(path)
        if suffix == ".parquet":
            yield from _parquet(path, rows)
            return
        encoding = encoding_of(path, encoding)
        with open_text(path, encoding) as text:
            for table in _tables(path, text, suffix, header, rows):
                table.encoding = encoding.removesuffix("-sig")
                if table.bad and on_bad_rows == "error":
                    raise bad_rows_error(str(path), table.bad)
                yield table


def _tables(path: Path, text: io.TextIOWrapper, suffix: str, header: bool, rows: int) -> Iterator[Table]:
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, text, rows)
    if suffix == ".json":
        return _json(path, text, rows)
    if suffix in (".txt", ".label"):
        return _plain(path, text, suffix, header, rows)
    return _delimited(path, text, suffix, header, rows)


def bad_rows_error(source: str, bad: list[BadRow]) -> UserError:
    return UserError(f"{source}, {describe_bad(bad)}; mend or remove them, or give --on-bad-rows skip")


def describe_bad(bad: list[BadRow], named: int = 5) -> str:
    """`line 3, 9: 2 rows have no text`, reason by reason, with the first few lines of each."""
    lines: dict[str, list[int]] = {}
    for row in bad:
        lines.setdefault(row.reason, []).append(row.line)
    texts = []
    for reason, where in list(lines.items())[:named]:
        shown = ", ".join(map(str, where[:named])) + (", ..." if len(where) > named else "")
        count = "1 row" if len(where) == 1 else f"{len(where)} rows"
        verb = ("has " if len(where) == 1 else "have ") if reason.startswith("no ") else ""
        texts.append(f"line {shown}: {f'{count} {verb}' if verb else f'{count}: ' * (len(where) > 1)}{reason}")
    more = len(bad) - sum(len(where) for where in list(lines.values())[:named])
    return "; ".join(texts) + (f"; and {more} more rows" if more else "")


def _lines(path: Path, text: IO[str], first: int = 1) -> Iterator[str]:
    """Lines with their endings, from the line number `first` on; no line may fill the memory."""
    for number in range(first, 1 << 62):
        line = text.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} million characters; split it")
        if "\0" in line:
            raise UserError(f"{path}, line {number}: holds a NUL character; is this a text file?")
        yield line


def _chunks(
    path: Path,
    rows: Iterator[tuple[int, Row]],
    columns: Callable[[list[Row]], dict[str, list[Any]]],
    size: int,
    bad: list[BadRow],
) -> Iterator[Table]:
    """(line, row) pairs -> tables of at most `size` rows, one at least; what `rows` adds to `bad` goes along."""
    is_first = True
    while (part := list(itertools.islice(rows, size))) or bad or is_first:
        yield Table(str(path), columns([row for _, row in part]), [line for line, _ in part], bad=bad.copy())
        bad.clear()
        is_first = False


def _named(names: list[str], rows: list[list[Any]]) -> dict[str, list[Any]]:
    """Rows as long as `names` -> columns."""
    columns = map(list, zip(*rows, strict=True)) if rows else ([] for _ in names)
    return dict(zip(names, columns, strict=True))


def _delimited(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    """CSV and TSV with whatever delimiter and quoting the first rows show."""
    sample = text.read(SAMPLE)
    if "\0" in sample:
        raise UserError(f"{path}: holds NUL characters; is this a text file? (other encodings need --encoding)")
    delimiter = _delimiter(sample, "\t" if suffix == ".tsv" else ",")
    csv.field_size_limit(LONGEST_LINE)
    quoting = _quoting(sample, delimiter)
    if header and _is_one_column(sample, delimiter):
        delimiter, quoting = NO_DELIMITER, {"quoting": csv.QUOTE_NONE}
    rest = _lines(path, text, first=sample.count("\n") + 1)
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
        tables = _chunks(path, _checked(rows, first.cells, bad), partial(_named, names), size, bad)
    else:
        tables = _headless(path, first, rows, size, extra_cells=quoting["quoting"] == csv.QUOTE_NONE)
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
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: {one_line(error)}; is a quote not closed?") from None
        if cells and not (start == 1 and cells[0].lower() == "sep=" and len(cells) == 2):
            yield CsvRow(start, cells, reader.line_num, len(taken) > 1 and _runs_on(taken, cells, options))


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


def _headless(path: Path, first: CsvRow, rows: Iterator[CsvRow], size: int, extra_cells: bool) -> Iterator[Table]:
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
                _refuse_width(path, len(row.cells))
                yield row.line, row.cells

    def squared(rows: list[list[str]]) -> dict[str, list[Any]]:
        nonlocal widest
        widest = max([widest, *map(len, rows)])
        return _named([str(i) for i in range(widest)], [row + [None] * (widest - len(row)) for row in rows])

    yield from _chunks(path, fitting(), squared, size, bad)


def _column_names(path: Path, cells: list[str]) -> list[str]:
    _refuse_width(path, len(cells))
    given = {cell.strip() for cell in cells}
    names, seen = [], Counter[str]()
    for i, cell in enumerate(cells):
        name = cell.strip() or (f"unnamed {i}" if str(i) in given else str(i))
        seen[name] += 1
        names.append(name if seen[name] == 1 else again(name, seen[name]))
    return names


def again(name: str, number: int = 2) -> str:
    """What a further column of the same name is called."""
    return f"{name} ({number})"


def _refuse_width(path: Path | str, width: int) -> None:
    if width > MOST_COLUMNS:
        raise UserError(f"{path}: {width} columns; minibert reads at most {MOST_COLUMNS}")


def _delimiter(sample: str, usual: str) -> str:
    """The one that cuts the most rows into as many cells as the first, more than one; the usual one if in doubt."""
    if given := re.match(r"sep=([^\w\s]|\t)\r?\n", sample, re.IGNORECASE):
        return given[1]
    lines = io.StringIO(sample, newline="").readlines()
    if len(sample) == SAMPLE:
        lines = lines[:-1] or lines
    fitting: dict[str, tuple[float, bool, int]] = {}
    for delimiter, quote in itertools.product("\t,;|^~", "\"'"):
        try:
            reader = csv.reader(lines[:40], delimiter=delimiter, quotechar=quote, skipinitialspace=True)
            rows = list(filter(None, reader))
        except csv.Error:
            continue
        width = len(rows[0]) if rows else 0
        if width > 1:
            fit = (sum(len(row) == width for row in rows) / len(rows), delimiter == usual, width)
            fitting[delimiter] = max(fit, fitting.get(delimiter, fit))
    best = max(fitting, key=lambda delimiter: fitting[delimiter], default=usual)
    return best if best in fitting and fitting[best][0] >= LEAST_FIT else usual


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
    if single > double and single >= len(sample.splitlines()) / 2:
        return options | {"quotechar": "'"}
    escaped = re.search(rf'\\"(?!{edge}|\r?$)', sample, re.MULTILINE)
    if escaped and not re.search(rf'[^{edge}\r\n]""[^{edge}\r\n]', sample):
        return options | {"doublequote": False, "escapechar": "\\"}
    return options


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


def _plain(path: Path, text: io.TextIOWrapper, suffix: str, header: bool, size: int) -> Iterator[Table]:
    """One text a line, unless the lines are tab-separated, or `LABEL text` as in TREC's .label files."""
    lines = _lines(path, text)
    head = list(itertools.islice(lines, PLAIN_SAMPLE))
    if not head:
        raise UserError(f"{path}: empty; expected one text a line")
    filled = [line for line in head if line.strip()]
    if suffix == ".txt" and filled and all("\t" in line for line in filled):
        with open_text(path, text.encoding) as again:  # what is packed cannot be wound back
            yield from _delimited(path, again, ".tsv", header, size)
        return
    labelled = suffix == ".label" or (bool(filled) and all(map(LINE_LABEL.match, filled)))
    numbered = enumerate(itertools.chain(head, lines), start=1)
    contents = ((number, content) for number, line in numbered if (content := line.rstrip("\r\n")))
    rows = ((number, _label_and_text(content) if labelled else [content]) for number, content in contents)
    yield from _chunks(path, rows, partial(_named, ["label", "text"] if labelled else ["text"]), size, [])


def _label_and_text(line: str) -> list[Any]:
    """The first word and the rest; of fastText's lines with several labels, a list of them and the rest."""
    count = max(1, sum(1 for _ in itertools.takewhile(lambda word: word.startswith("__label__"), line.split())))
    cells = line.split(maxsplit=count)
    labels, text = cells[:count], "".join(cells[count:])
    return [labels if count > 1 else "".join(labels), text]


def _json_lines(path: Path, text: IO[str], size: int) -> Iterator[Table]:
    lines = enumerate(_lines(path, text), start=1)
    yield from _object_chunks(path, ((number, _parse(line)) for number, line in lines if line.strip()), size)


def _json(path: Path, text: IO[str], size: int) -> Iterator[Table]:
    """One JSON value, or JSON lines under the wrong name."""
    content = text.read(LARGEST_JSON)
    if len(content) == LARGEST_JSON:
        raise UserError(f"{path}: too large for one JSON value; convert it to .jsonl")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        first = next(filter(str.strip, content.split("\n")), "")
        if not isinstance(_parse(first), dict):
            raise UserError(f"{path}: not JSON ({one_line(error)})") from None
        yield from _json_lines(path, io.StringIO(content), size)
        return
    rows = _json_rows(path, value)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an array of objects")
    yield from _object_chunks(path, enumerate(rows, start=1), size)


def _json_rows(path: Path, value: Any) -> Any:
    """A list of rows: of itself, under one key, or in a form of pandas' to_json: columns, index or split."""
    if not isinstance(value, dict) or not value:
        return value
    parts = list(value.values())
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = [str(name) for name in value["columns"]]
        fits = [isinstance(row, list) and len(row) == len(names) for row in value["data"]]
        return [
            dict(zip(names, row, strict=True)) if fit else row for fit, row in zip(fits, value["data"], strict=True)
        ]
    lists = [part for part in parts if isinstance(part, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0][:1]):
        return lists[0]  # {"version": ..., "data": [{...}, ...]}
    if len(lists) == len(parts):
        _refuse_unequal(path, parts)
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if all(isinstance(part, dict) for part in parts):
        if _are_rows(value, parts):  # {"0": {"text": ..., "label": ...}, ...}
            return parts
        _refuse_unequal(path, parts)
        return [{name: column.get(key) for name, column in value.items()} for key in parts[0]]
    return [value]


def _are_rows(value: dict[str, Any], parts: list[dict[str, Any]]) -> bool:
    """Whether an object of objects is one of rows, not of columns: numbers name rows; else there are more of them."""
    outer, inner = (all(name.isdecimal() for name in names) for names in (value, {key for p in parts for key in p}))
    return outer if outer != inner else len(parts) > len(parts[0])


def _refuse_unequal(path: Path, columns: list[Any]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: the columns differ in length")


def _parse(line: str) -> Any:
    """The value of a line, or the error why there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _object_chunks(path: Path, values: Iterator[tuple[int, Any]], size: int) -> Iterator[Table]:
    """Objects -> tables; a key that some rows lack is None there. An exception in place of one says why."""
    bad: list[BadRow] = []

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, value in values:
            if isinstance(value, dict):
                yield line, value
            else:
                is_broken = isinstance(value, Exception)
                bad.append(BadRow(line, f"not JSON ({one_line(value)})" if is_broken else NOT_AN_OBJECT))

    yield from _chunks(path, objects(), partial(_columns_of, path), size, bad)


def _columns_of(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
        _refuse_width(path, len(names))
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path, size: int) -> Iterator[Table]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        packed = path.name.lower().endswith((".gz", ".zip"))
        file = parquet.ParquetFile(io.BytesIO(_unpacked(path)) if packed else path, page_checksum_verification=True)
        names = file.schema_arrow.names
        _refuse_width(path, len(names))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: two columns are named {twice[0]!r}; rename one")
        start, yielded = 1, False
        for batch in file.iter_batches(batch_size=size):
            lines = list(range(start, start + len(batch)))
            yield Table(str(path), {name: _as_text(cells) for name, cells in batch.to_pydict().items()}, lines)
            start, yielded = start + len(batch), True
        if not yielded:
            yield Table(str(path), {name: [] for name in names})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _as_text(cells: list[Any]) -> list[Any]:
    """Spark and Hive write text as bytes, where UTF-8 is meant; other bytes stay."""
    if not any(isinstance(cell, bytes) for cell in cells):
        return cells
    try:
        return [cell.decode() if isinstance(cell, bytes) else cell for cell in cells]
    except UnicodeDecodeError:
        return cells


def _unpacked(path: Path) -> bytes:
    """Parquet is read from its end, so what is packed is unpacked whole."""
    with open_bytes(path) as file:
        content = file.read(LARGEST_JSON)
    if len(content) == LARGEST_JSON:
        raise UserError(f"{path}: too large to be unpacked in memory; unpack it first")
    return content
