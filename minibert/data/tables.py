"""Data files as people have them -> columns: CSV, TSV, JSON lines, JSON, Parquet, plain lines, also in .gz and .zip.

Files are read in chunks, so a file may be larger than memory. What cannot be read is one line of error that says
where and what to do.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from minibert.config import DataSettings
from minibert.data.delimited import GUESSED, Dialect, read_delimited
from minibert.data.rows import (
    BadRow,
    Table,
    bad_rows_error,
    check_width,
    numbered_lines,
    rows_to_columns,
    tables_of,
)
from minibert.data.sources import encoding_of, open_bytes, open_text, reading, suffix_of
from minibert.data.spreadsheet import sheet_as_csv
from minibert.errors import UserError
from minibert.runtime.files import check_regular_file, one_line

MAX_JSON_SIZE = 2 << 30  # bytes: a JSON array, like packed Parquet, can only be read as a whole
NOT_AN_OBJECT = 'expected an object such as {"text": ..., "label": ...}'
PLAIN_SAMPLE = 50  # lines looked at to tell `LABEL text` lines from plain texts
LINE_LABEL = re.compile(r"([A-Za-z]\w*:[\w-]+|__label__\S+)[ \t]")  # as in TREC and in fastText


HEADER_ROWS = 200  # looked at to tell whether there is a header


def read_table(
    path: str | Path,
    *,
    header: bool = True,
    encoding: str | None = None,
    on_bad_rows: str = "error",
    dialect: Dialect = GUESSED,
) -> Table:
    """The whole file. A file with a header alone has columns and no rows."""
    whole: Table | None = None
    for table in stream_table(path, header=header, encoding=encoding, on_bad_rows=on_bad_rows, dialect=dialect):
        if whole is None:
            whole = table
            continue
        check_width(path, len(whole.columns.keys() | table.columns.keys()))
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
    dialect: Dialect = GUESSED,
) -> Iterator[Table]:
    """The file in tables of at most `rows` rows, at least one table; on_bad_rows="skip" leaves bad ones in `bad`."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'is a folder; give a file' if path.is_dir() else 'no such file'}")
    check_regular_file(path)
    with reading(path):
        suffix = suffix_of(path)
        if suffix == ".parquet":
            yield from _parquet(path, rows)
            return
        if suffix == ".xlsx":
            for table in read_delimited(path, sheet_as_csv(path), ".csv", header, rows):
                if table.bad and on_bad_rows == "error":
                    raise bad_rows_error(str(path), table.bad)
                yield table
            return
        encoding = encoding_of(path, encoding)
        with open_text(path, encoding) as text:
            for table in _tables(path, text, suffix, header, rows, dialect):
                table.encoding = encoding.removesuffix("-sig")
                if table.bad and on_bad_rows == "error":
                    raise bad_rows_error(str(path), table.bad)
                yield table


def _tables(
    path: Path, text: io.TextIOWrapper, suffix: str, header: bool, rows: int, dialect: Dialect
) -> Iterator[Table]:
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, text, rows)
    if suffix == ".json":
        return _json(path, text, rows)
    if suffix in (".txt", ".label"):
        return _plain(path, text, suffix, header, rows)
    return read_delimited(path, text, suffix, header, rows, dialect)


def _plain(path: Path, text: io.TextIOWrapper, suffix: str, header: bool, size: int) -> Iterator[Table]:
    """One text a line, unless the lines are tab-separated, or `LABEL text` as in TREC's .label files."""
    lines = numbered_lines(path, text)
    head = list(itertools.islice(lines, PLAIN_SAMPLE))
    if not head:
        raise UserError(f"{path}: empty; expected one text a line")
    filled = [line for line in head if line.strip()]
    if suffix == ".txt" and filled and all("\t" in line for line in filled):
        with open_text(path, text.encoding) as again:  # what is packed cannot be wound back
            yield from read_delimited(path, again, ".tsv", header, size)
        return
    labelled = suffix == ".label" or (bool(filled) and all(map(LINE_LABEL.match, filled)))
    numbered = enumerate(itertools.chain(head, lines), start=1)
    contents = ((number, content) for number, line in numbered if (content := line.rstrip("\r\n")))
    rows = ((number, _label_and_text(content) if labelled else [content]) for number, content in contents)
    yield from tables_of(path, rows, partial(rows_to_columns, ["label", "text"] if labelled else ["text"]), size, [])


def _label_and_text(line: str) -> list[Any]:
    """The first word and the rest; of fastText's lines with several labels, a list of them and the rest."""
    count = max(1, sum(1 for _ in itertools.takewhile(lambda word: word.startswith("__label__"), line.split())))
    cells = line.split(maxsplit=count)
    labels, text = cells[:count], "".join(cells[count:])
    return [labels if count > 1 else "".join(labels), text]


def _json_lines(path: Path, text: IO[str], size: int) -> Iterator[Table]:
    lines = enumerate(numbered_lines(path, text), start=1)
    yield from _object_chunks(path, ((number, _parse(line)) for number, line in lines if line.strip()), size)


def _json(path: Path, text: IO[str], size: int) -> Iterator[Table]:
    """One JSON value, or JSON lines under the wrong name."""
    content = text.read(MAX_JSON_SIZE)
    if len(content) == MAX_JSON_SIZE:
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
        _check_equal_length(path, parts)
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if all(isinstance(part, dict) for part in parts):
        if _are_rows(value, parts):  # {"0": {"text": ..., "label": ...}, ...}
            return parts
        _check_equal_length(path, parts)
        return [{name: column.get(key) for name, column in value.items()} for key in parts[0]]
    return [value]


def _are_rows(value: dict[str, Any], parts: list[dict[str, Any]]) -> bool:
    """Whether an object of objects is one of rows, not of columns: numbers name rows; else there are more of them."""
    outer, inner = (all(name.isdecimal() for name in names) for names in (value, {key for p in parts for key in p}))
    return outer if outer != inner else len(parts) > len(parts[0])


def _check_equal_length(path: Path, columns: list[Any]) -> None:
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

    yield from tables_of(path, objects(), partial(_objects_to_columns, path), size, bad)


def _objects_to_columns(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
        check_width(path, len(names))
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
        check_width(path, len(names))
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
        content = file.read(MAX_JSON_SIZE)
    if len(content) == MAX_JSON_SIZE:
        raise UserError(f"{path}: too large to be unpacked in memory; unpack it first")
    return content


def first_rows(path: str, config: DataSettings) -> Table:
    """The first rows, a header among them as a row of cells."""
    encoding, dialect = config.encoding, Dialect.of(config)
    return next(
        stream_table(path, header=False, encoding=encoding, rows=HEADER_ROWS, on_bad_rows="skip", dialect=dialect)
    )
