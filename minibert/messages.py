"""Messages of the command line in the words of Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from minibert.config import RunConfig, kind_of
from minibert.errors import UserError

FLAG = re.compile(r"--(?P<name>[a-z][a-z-]*[a-z])(?P<rest>(?: (?P<value>[^\s:;,]+))?:?)")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
IN_MEMORY = re.compile(r"(train|validation|test) (list|table), ")  # where a message begins with the place
IN_MEMORY_ROW = {"list": "text ", "table": "row "}
_of_command: ContextVar[bool] = ContextVar("of_command", default=False)


@contextmanager
def messages_of_command() -> Iterator[None]:
    """While a command runs, which uses the Python API itself: its user has typed flags."""
    token = _of_command.set(True)
    try:
        yield
    finally:
        _of_command.reset(token)


@contextmanager
def messages_in_python() -> Iterator[None]:
    """Messages of the command line as a caller of `minibert.finetune` reads them."""
    try:
        yield
    except UserError as error:
        if _of_command.get():
            raise
        raise UserError(in_python(str(error))) from None


def in_python(message: str) -> str:
    """overwrite=True for --overwrite, max_length=5 for --max-length 5, and rows instead of lines."""
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}

    def named(found: re.Match[str]) -> str:
        name, value, rest = found["name"].replace("-", "_"), found["value"] or "", found["rest"]
        field = fields.get(name) or fields.get(name.removeprefix("no_"))
        if field is None:
            return found[0]
        if kind_of(field) is bool:
            return f"{field.name}={name in fields}{rest}"
        is_number = NUMBER.fullmatch(value) is not None
        if not value or not (is_number or rest.endswith(":") or value in field.metadata["choices"]):
            return f"{name}{rest}"
        return f"{name}={value if is_number else repr(value)}" + ":" * rest.endswith(":")

    message = FLAG.sub(named, message)
    in_memory = IN_MEMORY.match(message)
    return re.sub(r"\bline (?=\d)", IN_MEMORY_ROW[in_memory[2]], message) if in_memory else message
