"""Label values as files and lists have them -> the problem type they make, and names or numbers for each row."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minibert.problem.problem import LABEL_TYPES, MULTI, REGRESSION, SINGLE
from minibert.runtime.files import valid_unicode

# An integer as pandas writes it into a column with gaps, or as transformers names a class that has no name.
WHOLE = re.compile(r"(?:LABEL_)?(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
DECIMAL_COMMA = re.compile(r"-?[0-9]+,[0-9]+")
LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
STRINGS_IN_A_ROW = re.compile(r"""['"]\s+['"]""")
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}  # in a column of one label
TRUTH = {"false": "0", "true": "1"}  # JSON's, which typed files have for what others write as 0 and 1
MISSING_NUMBERS = ("nan", "na", "n/a", "null", "none", "inf", "-inf", "-")  # among numbers, a value that is not there
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def is_missing(value: Any) -> bool:
    """Nothing, as JSON, CSV (a blank cell) and pandas (NaN or NA) write it."""
    if isinstance(value, str):
        return not value.strip()
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def guess_kind(values: Sequence[Any], columns: int, delimiter: str | None) -> tuple[str, str]:
    """The problem type of labels, as read from so many columns, and why."""
    if columns > 1:
        return MULTI, "as each label has a column of 0 and 1"
    if delimiter:
        return MULTI, "as --label-delimiter is given"
    if indicator_length(values):
        return MULTI, "as each row has a list of 0 and 1, a place for each label"
    if any(isinstance(value, list | tuple) for value in values) or _are_written_lists(values):
        return MULTI, "as the labels are lists"
    texts = [label_text(value) for value in values]
    names = dict.fromkeys(texts)
    fraction = next((name for name in names if _is_fraction(name)), None)
    if fraction is not None and len(names) > 2 and _are_numbers(texts):
        return REGRESSION, f"as the labels are numbers with fractions, such as {fraction}"
    return SINGLE, "as each row has one label"


def indicator_length(values: Sequence[Any]) -> int:
    """The length of rows of 0 and 1, a place for each label; 0 if they are none, or lists of the labels 0 and 1.

    Two or more are taken for indicators: lists of as many different labels would all be the same.
    """
    if not values or not isinstance(_as_list(values[0]), list | tuple):
        return 0
    rows = [_as_list(value) for value in values]
    if not all(isinstance(row, list | tuple) for row in rows) or len({len(row) for row in rows}) > 1:
        return 0
    are_flags = len(rows[0]) > 1 and all(item in (0, 1) for row in rows for item in row)
    return len(rows[0]) if are_flags else 0


def read_label(value: Any, kind: str, indicators: Sequence[str], delimiter: str | None) -> Any:
    """A name, a list of names (multi-label) or a number; ValueError says why a value is none.

    indicators: what the 0s and 1s of a row stand for, where a row has one for each label.
    """
    if kind == REGRESSION:
        return _number(value)
    if kind == MULTI:
        return _of_flags(_as_list(value), indicators) if indicators else _several(value, delimiter)
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ValueError(f"{len(value)} labels where {SINGLE} takes one")
        value = value[0]
    if isinstance(value, dict | bytes):
        raise ValueError(f"{'bytes' if isinstance(value, bytes) else 'an object'} where a label is expected")
    return label_text(value)


def normalize_spelling(labels: list[Any], known: Iterable[str]) -> list[Any]:
    """Labels (or lists of them) with each integer spelled as in `known`: 1, 1.0, true and LABEL_1 are one."""
    known = set(known)
    longest_first = sorted(known, key=lambda name: (-len(name), name))
    spelling = {_whole(name): name for name in longest_first}  # the shortest, where it has both
    found = {name for label in labels for name in ([label] if isinstance(label, str) else label)}
    other = {name: new for name in found if (new := spelling.get(_whole(name), name)) != name}
    if not other:
        return labels
    return [
        other.get(label, label) if isinstance(label, str) else sorted({other.get(name, name) for name in label})
        for label in labels
    ]


def _whole(name: str) -> str:
    number = WHOLE.fullmatch(name)
    return number[1] if number else TRUTH.get(name.lower(), name)


def label_warnings(labels: list[str]) -> list[str]:
    """What looks as if single labels were meant in another way."""
    names = set(labels)
    comma = sorted(name for name in names if DECIMAL_COMMA.fullmatch(name))
    numbers = bool(comma) and all(is_number(name.replace(",", ".")) for name in names)
    for delimiter in ",|;":
        several = sorted(name for name in names if delimiter in name)
        pieces = Counter(piece.strip() for name in names for piece in name.split(delimiter))
        again = sum(count > 1 for count in pieces.values())  # pieces of several names
        if several and again > len(pieces) / 2:
            hint = f"labels such as {several[0]!r} look like several: --label-delimiter {delimiter!r} takes them apart"
            return [hint + "; if they are numbers, write them with a point" * numbers]
    if numbers:
        return [f"labels such as {comma[0]!r} look like numbers; write them with a point for the comma"]
    if blank := sorted(name for name in names if name.lower() in ("nan", "<na>", "null", "n/a", "-")):
        return [f"label {blank[0]!r} is read as a name; empty these cells if they mean that there is none"]
    if written := sorted(name for name in names if LIST.fullmatch(name)):
        shown = written[0] if len(written[0]) <= 40 else written[0][:39] + "…"
        return [f"label {shown} is read as a name: not all labels are lists as JSON or Python write them"]
    folded = Counter(name.casefold() for name in names)
    if folded and (most := folded.most_common(1)[0])[1] > 1:
        alike = [repr(name) for name in sorted(names) if name.casefold() == most[0]]
        return [f"labels {' and '.join(alike)} differ only in upper and lower case, and are {len(alike)} labels"]
    if len(labels) >= 50 and len(names) > len(labels) / 2:
        return [f"{len(names)} different labels in {len(labels)} rows: is --label-column right?"]
    if len(names) > 2 and all(map(is_number, names)):
        return ["numbers without fractions are classes; --problem-type regression takes them as values"]
    return []


def is_number(text: str) -> bool:
    """A number that fp32 holds, written as files write it."""
    try:
        return abs(float(text)) <= MAX_FLOAT32 and "_" not in text
    except ValueError:
        return False


def _are_numbers(texts: Sequence[str]) -> bool:
    """Whether all are numbers, but for a few that say that there is none."""
    rest = [text for text in texts if not is_number(text)]
    return len(rest) <= len(texts) / 10 and all(text.lower() in MISSING_NUMBERS for text in rest)


def _is_fraction(text: str) -> bool:
    return is_number(text) and not float(text).is_integer()


def _number(value: Any) -> float:
    if isinstance(value, list | tuple) or not is_number(label_text(value)):
        raise ValueError(f"label {str(value)[:40]!r} is not a number, as regression needs")
    return float(value)


def _of_flags(row: Any, indicators: Sequence[str]) -> list[str]:
    """The names of the labels that are 1."""
    if not isinstance(row, list | tuple) or len(row) != len(indicators):
        raise ValueError(f"expected {len(indicators)} values of 0 and 1, one for each label")
    names = []
    for name, value in zip(indicators, row, strict=True):
        flag = FLAGS.get(label_text(value).lower())
        if flag is None:
            raise ValueError(f"column {name}: {str(value)[:40]!r} is neither 0 nor 1, as one column a label needs")
        if flag:
            names.append(name)
    return names


def _several(value: Any, delimiter: str | None) -> list[str]:
    value = _as_list(value)
    if isinstance(value, str):
        value = value.split(delimiter) if delimiter else [value]
    items = value if isinstance(value, list | tuple) else [value]
    return sorted({label_text(item) for item in items if not is_missing(item)})


def _are_written_lists(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(_as_list(value), list) for value in values)


def _as_list(value: Any) -> Any:
    """A list in a text cell, as JSON or as Python writes it, becomes one; anything else stays."""
    if not isinstance(value, str) or not LIST.fullmatch(value):
        return value
    for read in (json.loads, _python_list):
        try:
            items = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return items if all(isinstance(item, str | int | float | None) for item in items) else value
    return value


def _python_list(text: str) -> list[Any]:
    """ValueError also where there is no comma between strings, as numpy writes them: Python would join the two."""
    if STRINGS_IN_A_ROW.search(text):
        raise ValueError(text)
    items: list[Any] = ast.literal_eval(text.strip())
    return items


def label_text(value: Any) -> str:
    """A label's name: text without outer blanks; 1.0 and true from typed files as people write them."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return valid_unicode(str(value)).strip()


def label_type(values: Iterable[Any]) -> str:
    """int, float or bool where all labels, or all members of lists of them, are; else str."""
    items = (item for value in values for item in (value if isinstance(value, list | tuple) else [value]))
    found = {type(item).__name__ for item in items if not is_missing(item)}
    return found.pop() if len(found) == 1 and found <= LABEL_TYPES.keys() else "str"


def sorted_labels(names: set[str]) -> list[str]:
    """Numbers in the order of numbers, anything else in the order of text."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    if any(map(math.isnan, numbers.values())):  # which has no place in an order
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name))
