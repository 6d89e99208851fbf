"""The templates of the report and of the model card, and how text from data gets into them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minibert.reporting.format import shorten
from minibert.runtime.files import valid_unicode


class Section(NamedTuple):
    """A headline and what stands below it; left out where that is nothing."""

    title: str
    pieces: Sequence[Markup]
    grid: bool = True


INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(value: Any) -> Any:
    """Text as a file can hold it and a reader can see it: "\\n" for line ends, U+FFFD for control characters."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return INVISIBLE.sub("\ufffd", valid_unicode(value).replace("\r\n", "\n").replace("\r", "\n"))


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    finalize=visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters["shorten"] = shorten
pieces: Any = ENVIRONMENT.get_template("pieces.html.jinja").module  # its macros, as functions that give Markup


def render(template: str, **values: Any) -> str:
    return ENVIRONMENT.get_template(template).render(values)
