"""Excel's .xlsx: the first sheet, as the lines of a CSV file."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path
from typing import Any

from minibert.data.sources import open_bytes
from minibert.errors import UserError
from minibert.runtime.files import one_line

LARGEST_SHEET = 1 << 29  # characters: a sheet is read as a whole


def sheet_as_csv(path: Path) -> io.StringIO:
    """Every cell between quotes; a number that is an integer is written as one. Needs openpyxl."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{path}: reading .xlsx needs openpyxl; pip install openpyxl") from None
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    try:
        with open_bytes(path) as file:
            book = openpyxl.load_workbook(io.BytesIO(file.read()), read_only=True, data_only=True)
        for row in book.worksheets[0].iter_rows(values_only=True):
            if any(cell is not None for cell in row):
                writer.writerow(_written(cell) for cell in row)
            if text.tell() > LARGEST_SHEET:
                raise UserError(f"{path}: too large for a sheet; save it as .csv")
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as .xlsx ({one_line(error)})") from None
    text.seek(0)
    return text


def _written(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell)
