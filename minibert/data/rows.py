"""What all readers of tables share: rows as columns in chunks, the rows that cannot be used, and limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from minibert.data.sources import MAX_LINE_LENGTH
from minibert.errors import UserError

MAX_COLUMNS = 4096  # more is a broken or hostile file, which rows of that width would let fill the memory
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


def bad_rows_error(source: str, bad: list[BadRow]) -> UserError:
    return UserError(f"{source}, {describe_bad(bad)}; fix or remove them, or give --on-bad-rows skip")


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


def numbered_lines(path: Path, text: IO[str], first: int = 1) -> Iterator[str]:
    """Lines with their endings, from the line number `first` on; no line may fill the memory."""
    for number in range(first, 1 << 62):
        line = text.readline(MAX_LINE_LENGTH)
        if not line:
            return
        if len(line) == MAX_LINE_LENGTH:
            raise UserError(f"{path}, line {number}: longer than {MAX_LINE_LENGTH >> 20} million characters; split it")
        if "\0" in line:
            raise UserError(f"{path}, line {number}: holds a NUL character; is this a text file?")
        yield line


def tables_of(
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


def rows_to_columns(names: list[str], rows: list[list[Any]]) -> dict[str, list[Any]]:
    """Rows as long as `names` -> columns."""
    columns = map(list, zip(*rows, strict=True)) if rows else ([] for _ in names)
    return dict(zip(names, columns, strict=True))


def repeated_name(name: str, number: int = 2) -> str:
    """What a further column of the same name is called."""
    return f"{name} ({number})"


def check_width(path: Path | str, width: int) -> None:
    if width > MAX_COLUMNS:
        raise UserError(f"{path}: {width} columns; minibert reads at most {MAX_COLUMNS}")
