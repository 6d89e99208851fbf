"""The table of predictions: a row for each text with label, probabilities and, where the truth is known, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.data import Examples
from minibert.problem import REGRESSION, Problem


def header(examples: Examples, problem: Problem) -> list[str]:
    """Column names for examples like these."""
    columns = ["row", "text"]
    columns += ["text_pair"] if examples.pairs is not None else []
    columns += ["label"] if examples.labels is not None else []
    columns += ["predicted"]
    columns += [f"probability_{name}" for name in problem.labels] if problem.kind != REGRESSION else []
    return columns + (["loss"] if examples.labels is not None else [])


def rows(examples: Examples, problem: Problem, logits: np.ndarray, targets: np.ndarray | None) -> Iterator[list[Any]]:
    """One row for each example; `row` is the line it has in its file. targets None: no loss."""
    probabilities = problem.probabilities(logits)
    losses = None if targets is None else problem.example_losses(logits, targets)
    for i, decision in enumerate(problem.decisions(probabilities)):
        row: list[Any] = [examples.lines[i], examples.texts[i]]
        row += [examples.pairs[i]] if examples.pairs is not None else []
        row += [_cell(examples.labels[i])] if examples.labels is not None else []
        row += [_cell(decision)]
        row += [f"{p:.6f}" for p in probabilities[i]] if problem.kind != REGRESSION else []
        yield row + ([f"{losses[i]:.6f}"] if losses is not None else [])


def _cell(label: Any) -> Any:
    return "|".join(label) if isinstance(label, list) else label
