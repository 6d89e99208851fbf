"""Small tables and files for the tests of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minibert.data.rows import Table


def table(**columns: list[Any]) -> Table:
    return Table("data.csv", columns, list(range(2, 2 + len(next(iter(columns.values()))))))


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def data_file(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
