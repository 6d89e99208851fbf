"""The table of predictions: a row for each text with label, probabilities and, where the truth is known, the loss."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from minibert.data.examples import Examples
from minibert.inference.explain import Word, strongest
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.files import atomic

# What a spreadsheet takes for the start of a formula (OWASP, "CSV Injection"), behind any number of apostrophes.
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
CHUNK = 10_000  # rows that are text at a time
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def columns(
    examples: Examples,
    problem: Problem,
    logits: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    top_k: int = 0,
    words: list[list[Word]] | None = None,
) -> dict[str, list[Any]]:
    """The table, column by column; `row` is the line a text has in its file.

    A probability for each class, or with `top_k` the most probable ones and their names. targets None: no loss.
    """
    probabilities = problem.probabilities(logits)  # [n, L]
    table: dict[str, list[Any]] = {"row": examples.lines, "text": examples.texts}
    if examples.pairs is not None:
        table["text_pair"] = examples.pairs
    if examples.labels is not None:
        table["label"] = examples.labels
    table["predicted"] = problem.decisions(probabilities)
    if problem.kind == SINGLE:
        table["probability"] = probabilities.max(1).tolist()
    if problem.kind != REGRESSION and top_k:
        for rank, column in enumerate(most_probable(probabilities, top_k).T, start=1):
            table[f"top_{rank}"] = [problem.labels[i] for i in column]
            table[f"top_{rank}_probability"] = probabilities[np.arange(len(column)), column].tolist()
    elif problem.kind != REGRESSION:
        table |= {f"probability_{name}": probabilities[:, i].tolist() for i, name in enumerate(problem.labels)}
    if words is not None and problem.kind == MULTI:
        table["explained"] = [problem.labels[k] for k in problem.foremost(probabilities)]
    if words is not None:
        table["words"] = ["; ".join(map(str, strongest(of_text))) for of_text in words]
    if targets is not None:
        table["loss"] = problem.example_losses(logits, targets).tolist()
    return table


def records(
    examples: Examples, problem: Problem, logits: np.ndarray, *, top_k: int = 0, words: list[list[Word]] | None = None
) -> Iterator[dict[str, Any]]:
    """The same for JSON: an object for each text, with the classes and the words as objects in it."""
    probabilities = problem.probabilities(logits)
    order = most_probable(probabilities, top_k) if top_k else None
    foremost = problem.foremost(probabilities)
    for i, decision in enumerate(problem.decisions(probabilities)):
        record: dict[str, Any] = {"row": examples.lines[i], "text": examples.texts[i]}
        if examples.pairs is not None:
            record["text_pair"] = examples.pairs[i]
        record["predicted"] = round(decision, 10) if isinstance(decision, float) else decision
        row = [round(float(p), 10) for p in probabilities[i]]
        if problem.kind == SINGLE:
            record["probability"] = max(row)
        if problem.kind != REGRESSION and order is not None:
            record["top"] = [{"label": problem.labels[k], "probability": row[k]} for k in order[i]]
        elif problem.kind != REGRESSION:
            record["probabilities"] = dict(zip(problem.labels, row, strict=True))
        if words is not None and problem.kind == MULTI:
            record["explained"] = problem.labels[foremost[i]]
        if words is not None:
            record["words"] = [word.to_dict() for word in words[i]]
        yield record


def most_probable(probabilities: np.ndarray, count: int) -> np.ndarray:
    """[n, L] -> [n, count] class numbers, the most probable first; of equals the earlier one."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]


def write_file(path: Path, examples: Examples, problem: Problem, logits: np.ndarray, targets: np.ndarray) -> None:
    """predictions-*.csv of a run."""
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    with atomic(path) as temporary, open(temporary, "w", **options) as file:
        for start in range(0, len(examples), CHUNK) or [0]:  # as text all cells at once would be larger than the data
            rows = np.arange(start, min(start + CHUNK, len(examples)))
            table = columns(examples.take(rows), problem, logits[rows], targets[rows])
            write_csv(file, table, header=start == 0)


def write_csv(file: IO[str], table: dict[str, list[Any]], header: bool = True, spreadsheet_safe: bool = False) -> None:
    """The table as CSV, texts as they are; `spreadsheet_safe` guards cells that would run as formulas."""
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    if header:
        plain.writerow(table)
    cells = [[_cell(name, value, spreadsheet_safe) for value in values] for name, values in table.items()]
    for row in zip(*cells, strict=True):  # csv leaves a lone carriage return bare before Python 3.13
        writer = quoted if any("\r" in cell for cell in row if isinstance(cell, str)) else plain
        writer.writerow(row)


def _cell(name: str, value: Any, spreadsheet_safe: bool) -> Any:
    if isinstance(value, list):
        value = "|".join(value)
    if isinstance(value, str):
        is_number = name not in ("text", "text_pair") and NUMBER.fullmatch(value)  # a label like -1 is no formula
        return safe_cell(value) if spreadsheet_safe and not is_number else value
    return f"{value:.10g}" if isinstance(value, float) and name != "label" else value  # curves can be drawn from it


def safe_cell(text: str) -> str:
    """An apostrophe in front of what a spreadsheet would run as a formula; `plain_cell` takes it away again."""
    return f"'{text}" if FORMULA.match(text) else text


def plain_cell(cell: str) -> str:
    """The text that `safe_cell` was given."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
