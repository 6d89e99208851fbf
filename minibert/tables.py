"""Data files as people have them -> columns: CSV, TSV, JSON lines, JSON, Parquet, plain lines, also in .gz and .zip.

Files are read in chunks, so a file may be larger than memory. What cannot be read is one line of error that says
where and what to do.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minibert.errors import UserError
from minibert.files import one_line, refuse_special

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".label")
LONGEST_LINE = 64 << 20  # characters: a longer one is a broken or hostile file, not a text
LARGEST_JSON = 2 << 30  # bytes: a JSON array, like packed Parquet, can only be read as a whole
MOST_COLUMNS = 4096  # more is a broken or hostile file, which rows of that width would let fill the memory
EXPANSION, EXPANSION_FREE = 200, 256 << 20  # decompressed over compressed bytes, once that much has come out
LEAST_FIT = 0.6  # share of the first rows that a delimiter must cut as it cuts the header
NOT_AN_OBJECT = 'expected an object such as {"text": ..., "label": ...}'
SAMPLE = 1 << 18  # characters looked at to guess delimiter and quoting
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, struct.error)


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
    headed: bool = False  # the column names are the file's first row


Row = tuple[int, list[Any]]  # line, cells


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
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, rows)
            return
        encoding = _exact_name(_known(encoding)) if encoding else _detect_encoding(path)
        reader: Callable[..., Iterator[Table]] = {".jsonl": _json_lines, ".json": _json}.get(suffix, _delimited)
        if suffix in (".txt", ".label"):
            reader = _plain
        with _open(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="") as text:
            for table in reader(path, text, suffix, header, rows):
                table.encoding = encoding.removesuffix("-sig")
                if table.bad and on_bad_rows == "error":
                    raise bad_rows_error(str(path), table.bad)
                yield table
    except UnicodeError as error:
        name = str(encoding).removesuffix("-sig")
        raise UserError(f"{path}: not {name} text ({one_line(error)}); give --encoding") from None
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({one_line(error) or type(error).__name__})") from None


def _known(encoding: str) -> str:
    """A text encoding that this Python knows."""
    try:
        "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        raise UserError(f"--encoding {encoding}: no such encoding; try utf-8, cp1252 or latin-1") from None
    return encoding


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


def _suffix(path: Path) -> str:
    """The suffix that tells the format, seen through .gz and .zip."""
    name = path.name.lower()
    if name.endswith(".zip"):
        name = _zip_member(path).lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; minibert reads {' '.join(SUFFIXES)}, also in .gz and .zip")
    return suffix


def _zip_member(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
            locked = any(entry.flag_bits & 1 for entry in archive.infolist())
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read as zip ({one_line(error)})") from None
    if len(names) != 1:
        raise UserError(f"{path}: holds {len(names)} files; expected one data file")
    if locked:
        raise UserError(f"{path}: is encrypted; decrypt it first")
    return names[0]


def _open(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".zip"):
        return io.BufferedReader(Expanding(zipfile.ZipFile(path).open(_zip_member(path)), path), 1 << 16)
    if name.endswith(".gz"):
        return io.BufferedReader(Expanding(gzip.open(path), path), 1 << 16)  # type: ignore[arg-type]
    return open(path, "rb")


class Expanding(io.RawIOBase):
    """A compressed file as it comes out; one that grows as no text does is refused before it fills the memory."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.most = max(EXPANSION_FREE, EXPANSION * path.stat().st_size)
        self.out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        self.out += len(data)
        if self.out > self.most:
            raise UserError(f"{self.path}: grows more than {EXPANSION}-fold when decompressed; give it decompressed")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _exact_name(encoding: str) -> str:
    """UTF-8 with or without its mark is read by one codec; else the mark would become part of a column's name."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _detect_encoding(path: Path) -> str:
    """UTF-8 or UTF-16 by their marks; UTF-8 if all bytes are; else cp1252, or latin-1, in which any bytes read."""
    with _open(path) as file:
        start = file.read(3)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _decodes(path, "utf-8"):
        return "utf-8-sig" if start == codecs.BOM_UTF8 else "utf-8"
    _refuse_damaged_utf8(path)
    return "cp1252" if _decodes(path, "cp1252") else "latin-1"


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    with _open(path) as file:
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _refuse_damaged_utf8(path: Path) -> None:
    """A few bad bytes among much good UTF-8: read as anything else, every accent of the file would be wrong."""
    good = bad = first = 0
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            if line.isascii():
                continue
            text = line.decode("utf-8", "replace")
            broken = text.count("\ufffd") - line.count(b"\xef\xbf\xbd")
            good, bad = good + sum(ord(c) > 127 for c in text) - broken, bad + broken
            first = first or (number if broken else 0)
    if good > bad:
        raise UserError(f"{path}, line {first}: not UTF-8, which the rest of the file is; mend it or give --encoding")


def _lines(path: Path, text: IO[str]) -> Iterator[str]:
    """Lines with their endings; no line may fill the memory."""
    for number in range(1, 1 << 62):
        line = text.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} million characters; split it")
        if "\0" in line:
            raise UserError(f"{path}, line {number}: holds a NUL character; is this a text file?")
        yield line


def _chunks(path: Path, names: list[str], rows: Iterator[Row], size: int, bad: list[BadRow]) -> Iterator[Table]:
    """Rows of equal length -> tables of at most `size` rows, one at least; what `rows` adds to `bad` goes along."""
    lines: list[int] = []
    cells: list[list[Any]] = []
    yielded = False
    for line, row in rows:
        lines.append(line)
        cells.append(row)
        if len(lines) == size:
            yield _table(path, names, lines, cells, bad)
            lines, cells, yielded = [], [], True
    if lines or bad or not yielded:
        yield _table(path, names, lines, cells, bad)


def _table(path: Path, names: list[str], lines: list[int], cells: list[list[Any]], bad: list[BadRow]) -> Table:
    """A table that takes over the bad rows."""
    columns = [list(column) for column in zip(*cells, strict=True)] if cells else [[] for _ in names]
    taken, bad[:] = bad[:], []
    return Table(str(path), dict(zip(names, columns, strict=True)), lines, bad=taken)


def _delimited(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    """CSV and TSV with whatever delimiter and quoting the first rows show."""
    sample = text.read(SAMPLE)
    rest = _lines(path, text)
    if "\0" in sample:
        raise UserError(f"{path}: holds NUL characters; is this a text file?")
    delimiter = _delimiter(sample, "\t" if suffix == ".tsv" else ",")
    csv.field_size_limit(LONGEST_LINE)
    quoting = _quoting(sample, delimiter)
    rows = _csv_rows(path, csv.reader(_rejoined(sample, rest), delimiter=delimiter, **quoting))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: empty; expected a header and rows")
    bad: list[BadRow] = []
    if header:
        names = _column_names(path, first[1])
        for table in _chunks(path, names, _checked(rows, len(names), bad), size, bad):
            table.headed = True
            yield table
    else:
        yield from _headless(path, first, rows, size, extra_cells=quoting["quoting"] == csv.QUOTE_NONE)


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


def _csv_rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str], int]]:
    """(first line, cells, last line) of each row; blank lines are passed over."""
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: {one_line(error)}; is a quote not closed?") from None
        if row:
            yield start, row, reader.line_num


def _checked(rows: Iterator[tuple[int, list[str], int]], width: int, bad: list[BadRow]) -> Iterator[Row]:
    for line, row, last in rows:
        if len(row) == width:
            yield line, row
        else:
            bad.append(BadRow(line, _wrong_width(len(row), f"the header has {width}", last - line)))


def _wrong_width(cells: int, expected: str, more_lines: int) -> str:
    span = f" and {more_lines} more lines; is a quote not closed?" if more_lines else ""
    return f"{cells} cells where {expected}{span}"


def _headless(
    path: Path, first: tuple[int, list[str], int], rows: Iterator[Any], size: int, extra_cells: bool
) -> Iterator[Table]:
    """Columns called 0, 1, 2, ...; short rows are filled up with None.

    A row longer than most holds a text with the delimiter in it, unless nothing is quoted: then (`extra_cells`) the
    text cannot hold one, and what comes at the end of some rows is columns of its own.
    """
    head = [first, *(row for _, row in zip(range(size - 1), rows, strict=False))]
    widths = Counter(len(cells) for _, cells, _ in head)
    usual = max(widths, key=lambda width: (widths[width], width))
    bad: list[BadRow] = []
    lines: list[int] = []
    cells: list[list[Any]] = []
    widest = usual
    for line, row, last in itertools.chain(head, rows):
        if len(row) > usual and not extra_cells:
            bad.append(BadRow(line, _wrong_width(len(row), f"most rows have {usual}", last - line)))
            continue
        widest = max(widest, len(row))
        _refuse_width(path, widest)
        if len(lines) == size:
            yield _squared(path, widest, lines, cells, bad)
            lines, cells = [], []
        lines.append(line)
        cells.append(row)
    yield _squared(path, widest, lines, cells, bad)


def _squared(path: Path, width: int, lines: list[int], cells: list[list[Any]], bad: list[BadRow]) -> Table:
    names = [str(i) for i in range(width)]
    return _table(path, names, lines, [row + [None] * (width - len(row)) for row in cells], bad)


def _column_names(path: Path, cells: list[str]) -> list[str]:
    _refuse_width(path, len(cells))
    names = [cell.strip() or str(i) for i, cell in enumerate(cells)]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{path}, line 1: column {twice[0]!r} appears twice; rename one, or give --no-header")
    return names


def _refuse_width(path: Path | str, width: int) -> None:
    if width > MOST_COLUMNS:
        raise UserError(f"{path}: {width} columns; minibert reads at most {MOST_COLUMNS}")


def _delimiter(sample: str, usual: str) -> str:
    """The one that cuts the most rows into as many cells as the first, more than one; the usual one if in doubt."""
    lines = io.StringIO(sample, newline="").readlines()
    if len(sample) == SAMPLE:
        lines = lines[:-1] or lines
    fitting: dict[str, tuple[float, bool, int]] = {}
    for delimiter, quote in itertools.product("\t,;|", "\"'"):
        try:
            rows = [row for row in csv.reader(lines[:40], delimiter=delimiter, quotechar=quote) if row]
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
    edge = re.escape(delimiter)
    if not _is_quoted(sample, delimiter):
        return {"quoting": csv.QUOTE_NONE}
    single = len(re.findall(rf"(?:^|{edge})'[^'\r\n]*'(?={edge}|\r?$)", sample, re.MULTILINE))
    double = len(re.findall(rf'(?:^|{edge})"', sample, re.MULTILINE))
    if single > double and single >= len(sample.splitlines()) / 2:
        return {"quoting": csv.QUOTE_MINIMAL, "quotechar": "'"}
    escaped = re.search(rf'\\"(?!{edge}|\r?$)', sample, re.MULTILINE)
    if escaped and not re.search(rf'[^{edge}\r\n]""[^{edge}\r\n]', sample):
        return {"quoting": csv.QUOTE_MINIMAL, "doublequote": False, "escapechar": "\\"}
    return {"quoting": csv.QUOTE_MINIMAL}


def _is_quoted(sample: str, delimiter: str) -> bool:
    """CSV is. A tab-separated file is if every quote stands at the edge of a cell, and quotes come in pairs."""
    if delimiter != "\t":
        return True
    bare = re.search(r'[^\t\r\n"]"[^\t\r\n"]', sample)
    starts, ends = re.findall(r'(?:^|\t)"', sample, re.MULTILINE), re.findall(r'"(?:\t|\r?$)', sample, re.MULTILINE)
    return bare is None and len(starts) == len(ends)


def _plain(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    """One text a line, unless the lines are tab-separated, or `LABEL text` as in TREC's .label files."""
    lines = _lines(path, text)
    head = [line for _, line in zip(range(50), lines, strict=False)]
    if not head:
        raise UserError(f"{path}: empty; expected one text a line")
    tabs = {line.count("\t") for line in head}
    if suffix == ".txt" and len(tabs) == 1 and tabs != {0}:
        text.seek(0)
        yield from _delimited(path, text, ".tsv", header, size)
        return
    labelled = suffix == ".label" or all(re.match(r"\S+:\S+ ", line) for line in head)

    def rows() -> Iterator[Row]:
        for number, line in enumerate(_then(head, lines), start=1):
            content = line.rstrip("\r\n")
            if content:
                label, _, rest = content.partition(" ")
                yield number, [label, rest] if labelled else [content]

    yield from _chunks(path, ["label", "text"] if labelled else ["text"], rows(), size, [])


def _then(head: list[str], rest: Iterator[str]) -> Iterator[str]:
    yield from head
    yield from rest


def _json_lines(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    def objects() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(_lines(path, text), start=1):
            if line.strip():
                yield number, _parse(line)

    yield from _object_chunks(path, objects(), size)


def _json(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    """An array of objects, an object of columns, or JSON lines under the wrong name."""
    content = text.read(LARGEST_JSON)
    if len(content) == LARGEST_JSON:
        raise UserError(f"{path}: too large for one JSON value; convert it to .jsonl")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        yield from _json_lines(path, io.StringIO(content), suffix, header, size)
        return
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise UserError(f"{path}: the columns differ in length")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, dict):
        inner = [column for column in value.values() if isinstance(column, list)]
        value = inner[0] if len(inner) == 1 else [value]  # {"version": ..., "data": [...]}
    if not isinstance(value, list):
        raise UserError(f"{path}: expected an array of objects")
    yield from _object_chunks(path, enumerate(value, start=1), size)


def _parse(line: str) -> Any:
    """The value of a line, or the error why there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _object_chunks(path: Path, values: Iterator[tuple[int, Any]], size: int) -> Iterator[Table]:
    """Objects -> tables; a key that some rows lack is None there. An exception in place of one says why."""
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    yielded = False
    for line, value in values:
        if not isinstance(value, dict):
            is_broken = isinstance(value, Exception)
            bad.append(BadRow(line, f"not JSON ({one_line(value)})" if is_broken else NOT_AN_OBJECT))
            continue
        lines.append(line)
        rows.append(value)
        if len(rows) == size:
            yield Table(str(path), _columns_of(path, rows), lines, bad=bad)
            lines, rows, bad, yielded = [], [], [], True
    if rows or bad or not yielded:
        yield Table(str(path), _columns_of(path, rows), lines, bad=bad)


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
        raise UserError(f'{path}: reading Parquet needs pyarrow; pip install "minibert[parquet]"') from None
    try:
        packed = path.name.lower().endswith((".gz", ".zip"))
        file = parquet.ParquetFile(io.BytesIO(_unpacked(path)) if packed else path, page_checksum_verification=True)
        _refuse_width(path, len(file.schema_arrow.names))
        start, yielded = 1, False
        for batch in file.iter_batches(batch_size=size):
            lines = list(range(start, start + len(batch)))
            yield Table(str(path), batch.to_pydict(), lines)
            start, yielded = start + len(batch), True
        if not yielded:
            yield Table(str(path), {name: [] for name in file.schema_arrow.names})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _unpacked(path: Path) -> bytes:
    """Parquet is read from its end, so what is packed is unpacked whole."""
    with _open(path) as file:
        content = file.read(LARGEST_JSON)
    if len(content) == LARGEST_JSON:
        raise UserError(f"{path}: too large to be unpacked in memory; unpack it first")
    return content
