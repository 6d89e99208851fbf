"""Data files as people have them -> columns: CSV, TSV, JSON lines, JSON, Parquet, plain lines, also in .gz and .zip.

Files are read in chunks, so a file may be larger than memory. What cannot be read is one line of error that says
where and what to do.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
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
LARGEST_JSON = 2 << 30  # bytes: a JSON array can only be read as a whole
MOST_COLUMNS = 4096  # more is a broken or hostile file, which rows of that width would let fill the memory
EXPANSION, EXPANSION_FREE = 200, 256 << 20  # decompressed over compressed bytes, once that much has come out
SAMPLE = 1 << 18  # characters looked at to guess delimiter and quoting
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, struct.error)


@dataclass
class Table:
    """Rows as columns. Text files give strings; JSON and Parquet keep their types, None where there is nothing."""

    path: str
    columns: dict[str, list[Any]]
    lines: list[int] = field(default_factory=list)  # where each row starts: line, or row number in Parquet and JSON
    encoding: str = "utf-8"


Row = tuple[int, list[Any]]  # line, cells


def read_table(path: str | Path, *, header: bool = True, encoding: str | None = None) -> Table:
    """The whole file. A file with a header alone has columns and no rows."""
    whole: Table | None = None
    for table in stream_table(path, header=header, encoding=encoding):
        if whole is None:
            whole = table
            continue
        _refuse_width(path, len(whole.columns.keys() | table.columns.keys()))
        for name in [name for name in table.columns if name not in whole.columns]:
            whole.columns[name] = [None] * len(whole.lines)
        for name, values in whole.columns.items():
            values += table.columns.get(name, [None] * len(table.lines))
        whole.lines += table.lines
    assert whole is not None
    return whole


def stream_table(
    path: str | Path, *, header: bool = True, encoding: str | None = None, rows: int = 10_000
) -> Iterator[Table]:
    """The file in tables of at most `rows` rows, at least one table."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'is a folder; give a file' if path.is_dir() else 'no such file'}")
    refuse_special(path)
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, rows)
            return
        encoding = _known(encoding) if encoding else _detect_encoding(path)
        reader: Callable[..., Iterator[Table]] = {".jsonl": _json_lines, ".json": _json}.get(suffix, _delimited)
        if suffix in (".txt", ".label"):
            reader = _plain
        with _open(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="") as text:
            for table in reader(path, text, suffix, header, rows):
                table.encoding = encoding.removesuffix("-sig")
                yield table
    except UnicodeError as error:
        raise UserError(f"{path}: not {encoding} text ({one_line(error)}); give --encoding") from None
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({one_line(error) or type(error).__name__})") from None


def _known(encoding: str) -> str:
    """A text encoding that this Python knows."""
    try:
        "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        raise UserError(f"--encoding {encoding}: no such encoding; try utf-8, cp1252 or latin-1") from None
    return encoding


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


def _detect_encoding(path: Path) -> str:
    """UTF-8 or UTF-16 by their marks; UTF-8 if all bytes are; else cp1252, in which every Western file reads."""
    with _open(path) as file:
        block = file.read(1 << 20)
        if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        name = "utf-8-sig" if block.startswith(codecs.BOM_UTF8) else "utf-8"
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block:
                decoder.decode(block)
                block = file.read(1 << 20)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return name


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


def _chunks(path: Path, names: list[str], rows: Iterator[Row], size: int) -> Iterator[Table]:
    """Rows of equal length -> tables of at most `size` rows, one at least."""
    lines: list[int] = []
    cells: list[list[Any]] = []
    yielded = False
    for line, row in rows:
        lines.append(line)
        cells.append(row)
        if len(lines) == size:
            yield _table(path, names, lines, cells)
            lines, cells, yielded = [], [], True
    if lines or not yielded:
        yield _table(path, names, lines, cells)


def _table(path: Path, names: list[str], lines: list[int], cells: list[list[Any]]) -> Table:
    columns = [list(column) for column in zip(*cells, strict=True)] if cells else [[] for _ in names]
    return Table(str(path), dict(zip(names, columns, strict=True)), lines)


def _delimited(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    """CSV and TSV with whatever delimiter and quoting the first rows show."""
    sample = text.read(SAMPLE)
    rest = _lines(path, text)
    if "\0" in sample:
        raise UserError(f"{path}: holds NUL characters; is this a text file?")
    delimiter = _delimiter(sample, "\t" if suffix == ".tsv" else ",")
    csv.field_size_limit(LONGEST_LINE)
    lines = _rejoined(sample, rest)
    if _is_quoted(sample, delimiter):
        reader = csv.reader(lines, delimiter=delimiter)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    rows = _csv_rows(path, reader)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: empty; expected a header and rows")
    if header:
        names = _column_names(path, first[1])
        yield from _chunks(path, names, _checked(path, rows, len(names)), size)
    else:
        yield from _headless(path, first, rows, size)


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


def _csv_rows(path: Path, reader: Any) -> Iterator[Row]:
    """Rows with the line each starts on; blank lines are passed over."""
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: {one_line(error)}; is a quote not closed?") from None
        if row:
            yield start, row


def _checked(path: Path, rows: Iterator[Row], width: int) -> Iterator[Row]:
    for line, row in rows:
        if len(row) != width:
            raise UserError(f"{path}, line {line}: {len(row)} cells where the header has {width}; quote the text")
        yield line, row


def _headless(path: Path, first: Row, rows: Iterator[Row], size: int) -> Iterator[Table]:
    """Columns called 0, 1, 2, ...; rows may differ in length, short ones are filled up with None."""
    lines, cells = [first[0]], [first[1]]
    widest = len(first[1])
    _refuse_width(path, widest)
    for line, row in rows:
        widest = max(widest, len(row))
        _refuse_width(path, widest)
        if len(lines) == size:
            yield _table(path, *_squared(widest), lines, [r + [None] * (widest - len(r)) for r in cells])
            lines, cells = [], []
        lines.append(line)
        cells.append(row)
    yield _table(path, *_squared(widest), lines, [r + [None] * (widest - len(r)) for r in cells])


def _squared(width: int) -> tuple[list[str]]:
    return ([str(i) for i in range(width)],)


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
    """The one that cuts the first rows into equally many cells, the usual one if several do or none does."""
    lines = io.StringIO(sample, newline="").readlines()[:40]
    widths = {}
    for delimiter in (usual, "\t", ",", ";", "|"):
        try:
            rows = [row for row in csv.reader(lines[:-1] or lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        counts = {len(row) for row in rows}
        if len(counts) == 1 and (width := counts.pop()) > 1:
            widths[delimiter] = width
    if usual in widths or not widths:
        return usual
    return max(widths, key=lambda delimiter: widths[delimiter])


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

    yield from _chunks(path, ["label", "text"] if labelled else ["text"], rows(), size)


def _then(head: list[str], rest: Iterator[str]) -> Iterator[str]:
    yield from head
    yield from rest


def _json_lines(path: Path, text: IO[str], suffix: str, header: bool, size: int) -> Iterator[Table]:
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(_lines(path, text), start=1):
            if line.strip():
                yield number, _object(_parse(path, line, number), path, number)

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
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: expected an array of objects")
    yield from _object_chunks(path, ((i, _object(item, path, i)) for i, item in enumerate(value, start=1)), size)


def _parse(path: Path, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({one_line(error)})") from None


def _object(value: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{path}, line {number}: expected an object such as {{"text": ..., "label": ...}}')
    return value


def _object_chunks(path: Path, objects: Iterator[tuple[int, dict[str, Any]]], size: int) -> Iterator[Table]:
    """Objects -> tables; a key that some rows lack is None there."""
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    yielded = False
    for line, row in objects:
        lines.append(line)
        rows.append(row)
        if len(rows) == size:
            yield Table(str(path), _columns_of(path, rows), lines)
            lines, rows, yielded = [], [], True
    if rows or not yielded:
        yield Table(str(path), _columns_of(path, rows), lines)


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
        file = parquet.ParquetFile(path, page_checksum_verification=True)
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
