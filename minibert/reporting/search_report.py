"""What a search found, from `search.json`: the table on the screen, and a section of the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from minibert.filenames import SEARCH
from minibert.reporting.charts import Series, chart, keys
from minibert.reporting.format import fixed
from minibert.reporting.render import Section, pieces
from minibert.runtime.files import read_json

ROWS = 25  # the most trials of a table, the best first
NAMES = {
    "learning_rate": "learning rate",
    "epochs": "epochs",
    "layer_lr_decay": "layer decay",
    "dropout": "dropout",
    "head": "head",
}


def written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {written(settings[key])}" for key, name in NAMES.items())


def best_first(found: dict[str, Any]) -> list[dict[str, Any]]:
    """All trials: those that came to a value by it, then the others."""
    sign = -1 if found["direction"] == "minimize" else 1
    whole = [trial for trial in found["trials"] if trial["value"] is not None]
    others = [trial for trial in found["trials"] if trial["value"] is None]
    return sorted(whole, key=lambda trial: -sign * trial["value"]) + others


def cells(trial: dict[str, Any]) -> list[str]:
    """A row of either table."""
    value = fixed(trial["value"]) if trial["value"] is not None else trial["reason"] or trial["state"]
    settings = [written(trial["settings"][key]) for key in NAMES]
    return [str(trial["number"]), *settings, f"{trial['seconds']:.0f}", value.split(":")[0]]


def header(found: dict[str, Any]) -> list[str]:
    return ["trial", *NAMES.values(), "seconds", f"validation {found['metric']}"]


def table_lines(found: dict[str, Any]) -> list[str]:
    """The table for the terminal, the best trial first."""
    trials = best_first(found)
    rows = [header(found), *(cells(trial) for trial in trials[:ROWS])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rest = len(trials) - ROWS
    return [*lines, f"... and {rest} more in {SEARCH}"] if rest > 0 else lines


def search_sections(output: Path) -> list[Section]:
    """The report's sections on the search that made the run in `output`; none where there was no search."""
    path = output / SEARCH
    if not path.is_file():
        return []
    found = read_json(path)
    rows = [cells(trial) for trial in best_first(found)[:ROWS]]
    figures = [trials_figure(found), rates_figure(found)]
    return [
        Section("Search", figures),
        Section("Trials", [pieces.table(header(found), "n" * 7 + "t", rows)], grid=False),
    ]


def trials_figure(found: dict[str, Any]) -> Markup:
    """The value of each trial in their order, and the best so far."""
    whole = [trial for trial in found["trials"] if trial["value"] is not None]
    numbers, values = np.array([t["number"] for t in whole]), np.array([t["value"] for t in whole], dtype=np.float64)
    best = (np.minimum if found["direction"] == "minimize" else np.maximum).accumulate(values)
    ended = [trial for trial in found["trials"] if trial["value"] is None and trial["evaluations"]]
    last = np.array([list(trial["evaluations"].values())[-1] for trial in ended], dtype=np.float64)
    series = [
        Series("best so far", numbers, best, 1),
        Series("trial", numbers, values, 2, curve=False, dots=True),
        Series(
            "pruned, at its last evaluation", np.array([t["number"] for t in ended]), last, 0, curve=False, dots=True
        ),
    ]
    series = series if len(ended) else series[:2]
    span = (0.0, max(len(found["trials"]), 1) + 1.0)
    body = chart(series, "trial", f"validation {found['metric']}", x_range=span)
    note = f"{len(whole)} trials came to their end, {len(found['trials']) - len(whole)} were ended early."
    return pieces.figure("Trials", body, legend=keys(series), note=note)


def rates_figure(found: dict[str, Any]) -> Markup:
    """The value of each trial by its learning rate."""
    whole = [trial for trial in found["trials"] if trial["value"] is not None]
    rates = np.array([math.log10(trial["settings"]["learning_rate"]) for trial in whole])
    values = np.array([trial["value"] for trial in whole], dtype=np.float64)
    dots = Series("trial", rates, values, 2, curve=False, dots=True)
    body = chart([dots], "log10 of the learning rate", f"validation {found['metric']}")
    return pieces.figure("Learning rates", body, note="Other settings differ, too, from trial to trial.")
