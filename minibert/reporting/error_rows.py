"""The rows of the report that are worth reading: confidently wrong ones, and the least certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minibert.problem.problem import MULTI, REGRESSION, SINGLE
from minibert.reporting.figures import SplitResult
from minibert.reporting.format import shorten
from minibert.reporting.render import Section, pieces

TEXTS, TEXT_LENGTH = 20, 400  # the most rows of a table, and the longest text in one
CERTAIN, NEAR = 0.8, 0.25  # among the least certain: rows of less confidence, labels this near to their threshold


@dataclass(frozen=True)
class ErrorRow:
    """A row worth reading: where it is, and how sure the model was."""

    result: SplitResult
    row: int
    rank: float  # the higher, the earlier in the table
    truth: str
    predicted: str
    number: str  # what the table's column of numbers shows

    def cells(self) -> list[str]:
        examples = self.result.examples
        text = shorten(examples.texts[self.row], TEXT_LENGTH)
        if examples.pairs is not None:
            text += "\n— " + shorten(examples.pairs[self.row], TEXT_LENGTH)
        where = f"{self.result.split} {examples.lines[self.row]}"
        return [text, shorten(self.truth, 60), shorten(self.predicted, 60), self.number, where]


def error_sections(results: Sequence[SplitResult]) -> list[Section]:
    """Sections of rows of validation and test: the most confidently wrong, and of the others the least certain."""
    wrong: list[ErrorRow] = []
    unsure: list[ErrorRow] = []
    for result in results:
        find = {SINGLE: single_errors, MULTI: multi_errors, REGRESSION: regression_errors}[result.problem.kind]
        more_wrong, more_unsure = find(result)
        wrong, unsure = wrong + more_wrong, unsure + more_unsure
    wrong = highest_rank(wrong)
    shown = {(row.result.split, row.row) for row in wrong}
    unsure = highest_rank([row for row in unsure if (row.result.split, row.row) not in shown])
    title, how, number = "Most confidently wrong", "sure and wrong", "probability"
    if results[0].problem.kind == REGRESSION:
        title, how, number = "Furthest off", "far off", "off by"
    mistakes = f"Read these first: where a good model is {how}, the mistake is often in the label."
    more = "Rows the model could not decide on: labels like these, more of them, would teach it most."
    return [error_section(title, mistakes, wrong, number), error_section("Least certain", more, unsure, number)]


def highest_rank(rows: list[ErrorRow]) -> list[ErrorRow]:
    return sorted(rows, key=lambda row: -row.rank)[:TEXTS]


def error_section(title: str, advice: str, rows: list[ErrorRow], number: str) -> Section:
    header = ["text", "label", "predicted", number, "split, line"]
    body = pieces.table(header, "tllnn", [row.cells() for row in rows])
    return Section(title, [pieces.muted(advice), body] if rows else [], grid=False)


def single_errors(result: SplitResult) -> tuple[list[ErrorRow], list[ErrorRow]]:
    labels = result.problem.labels
    predicted = result.logits.argmax(1)
    stated = result.problem.probabilities(result.logits).max(1)

    def found(row: int, rank: float) -> ErrorRow:
        truth, given = labels[result.targets[row]], labels[predicted[row]]
        return ErrorRow(result, row, rank, truth, given, f"{stated[row]:.3f}")

    wrong = top(np.where(predicted == result.targets, -np.inf, stated))
    unsure = top(np.where(stated < CERTAIN, -stated, -np.inf))
    return [found(i, stated[i]) for i in wrong], [found(i, -stated[i]) for i in unsure]


def multi_errors(result: SplitResult) -> tuple[list[ErrorRow], list[ErrorRow]]:
    """One label of a row: the one it is most wrong about, or the one nearest to its threshold."""
    p, thresholds = result.problem.probabilities(result.logits), result.problem.threshold_array()  # [n, L], [L]
    given, truth = p >= thresholds, result.targets > 0
    mistakes = np.where(given != truth, np.abs(p - truth), -np.inf)
    distance = np.abs(p - thresholds)
    nearness = np.where(distance < NEAR, -distance, -np.inf)

    def found(row: int, values: np.ndarray) -> ErrorRow:
        label = int(values[row].argmax())
        name = shorten(result.problem.labels[label], 50)
        stated, predicted = (name if has else f"not {name}" for has in (truth[row, label], given[row, label]))
        return ErrorRow(result, row, values[row, label], stated, predicted, f"{p[row, label]:.3f}")

    wrong = [found(i, mistakes) for i in top(mistakes.max(1))]
    return wrong, [found(i, nearness) for i in top(nearness.max(1))]


def regression_errors(result: SplitResult) -> tuple[list[ErrorRow], list[ErrorRow]]:
    values, targets = result.logits[:, 0].astype(np.float64), result.targets.astype(np.float64)
    errors = values - targets
    rows = top(np.abs(errors))
    return [
        ErrorRow(result, i, abs(errors[i]), f"{targets[i]:.4g}", f"{values[i]:.4g}", f"{errors[i]:+.3g}") for i in rows
    ], []


def top(values: np.ndarray, count: int = TEXTS) -> list[int]:
    """Row numbers of the highest values, highest first; rows of -inf are left out."""
    count = min(count, len(values))
    chosen = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, np.int64)
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    return chosen[values[chosen] > -np.inf].tolist()
