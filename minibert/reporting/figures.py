"""What the report shows of the predictions: where they are wrong, how they rank, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minibert.data.examples import Examples
from minibert.problem.calibration import confidences
from minibert.problem.metrics import (
    average_precision,
    calibration_gap,
    precision_recall_points,
    reliability_bins,
    roc_auc,
    roc_points,
)
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.reporting.charts import (
    Bars,
    Html,
    Series,
    chart,
    cut,
    figure,
    fixed,
    heat_map,
    keys,
    meter,
    section,
    soft,
    table,
)

CLASSES, MATRIX, TEXTS, TEXT_LENGTH = 60, 20, 20, 400  # the most rows of each table, and the longest text in one
CURVES = 3  # of many labels, as many have curves of their own
MOST_SCORES, MOST_DOTS = 2_000_000, 1500  # of a micro average and of a cloud: more would look the same
CERTAIN, NEAR = 0.8, 0.25  # among the least certain: rows of less confidence, labels this near to their threshold
UNIT = (0.0, 1.0)


@dataclass(frozen=True)
class Judged:
    """The rows of one part, with what the model said of them."""

    part: str
    problem: Problem
    logits: np.ndarray  # [n, L]
    targets: np.ndarray  # [n] class numbers or values, or [n, L] 0/1
    metrics: dict[str, Any]  # of this part, from metrics.json
    examples: Examples


def quality_charts(judged: Judged) -> list[Html]:
    if judged.problem.kind == REGRESSION:
        return regression_charts(judged)
    matrix = judged.metrics.get("confusion_matrix")
    pieces = [] if matrix is None else confusion(judged.problem.labels, np.array(matrix))
    return pieces + ranking_charts(judged)


# Confusion


def confusion(labels: list[str], counts: np.ndarray) -> list[Html]:
    """The confusion matrix [L, L]; of many classes, those with the most errors, and the pairs most often confused."""
    if len(labels) <= MATRIX:
        note = "Rows: the label. Columns: the prediction. Colour: share of the row."
        return [figure("Confusion matrix", heat_map(labels, counts), note=note, wide=len(labels) > 8)]
    wrong = counts - np.diag(np.diag(counts))
    chosen = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[: MATRIX - 1])
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    groups = [*chosen[:, None], others]
    small = np.array([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
    note = f"The {len(chosen)} of {len(labels)} classes with the most errors. Rows: the label. Columns: the prediction."
    names = [*(labels[i] for i in chosen), f"({len(others)} others)"]
    return [
        figure("Confusion matrix", heat_map(names, small), note=note, wide=True),
        *confused_pairs(labels, wrong, counts),
    ]


def confused_pairs(labels: list[str], wrong: np.ndarray, counts: np.ndarray) -> list[Html]:
    """The pairs (label, prediction) with the most rows off the diagonal; nothing where all are right."""
    places = np.argsort(-wrong, axis=None, kind="stable")[:MATRIX]
    pairs = [(a, b) for a, b in (divmod(int(place), len(labels)) for place in places) if wrong[a, b]]
    rows = [
        (cut(labels[a], 60), cut(labels[b], 60), f"{counts[a, b]:,}", f"{counts[a, b] / counts[a].sum():.0%}")
        for a, b in pairs
    ]
    body = table(["label", "predicted", "rows", "of label"], "llnn", rows)
    return [figure("Most often confused", body, wide=True)] if rows else []


# Curves over all thresholds


@dataclass(frozen=True)
class Ranking:
    """What precision-recall and ROC curves are drawn from: scores, and which of them ought to be high."""

    name: str
    truth: np.ndarray  # [n] bool
    scores: np.ndarray  # [n]


def ranking_charts(judged: Judged) -> list[Html]:
    rankings = rankings_of(judged)
    if not rankings:
        return []
    note = ""
    if len(rankings) > 1:
        note = (
            "Each label against the rest. The micro average takes all labels together; the others are the "
            f"{len(rankings) - 1} of {len(judged.problem.labels)} labels with the lowest average precision."
        )
    return [precision_recall_figure(rankings, note), roc_figure(rankings, note)]


def rankings_of(judged: Judged) -> list[Ranking]:
    """The positive class of two; of more labels their micro average and those of the lowest average precision.

    Labels that all rows have, or none, have no curve.
    """
    labels = judged.problem.labels
    scores = judged.problem.probabilities(judged.logits)  # [n, L]
    targets, single = judged.targets, judged.problem.kind == SINGLE
    truth = targets[:, None] == np.arange(len(labels)) if single else targets > 0  # [n, L]
    drawn = np.flatnonzero(truth.any(0) & ~truth.all(0))
    if single and len(labels) == 2:
        drawn = drawn[drawn == 1]
    values = [average_precision(truth[:, i], scores[:, i]) or 0.0 for i in drawn]
    worst = drawn[np.argsort(values, kind="stable")[:CURVES]]
    rankings = [Ranking(labels[i], truth[:, i], scores[:, i]) for i in worst]
    if len(drawn) < 2:
        return rankings
    rows = evenly(len(scores), max(MOST_SCORES // len(labels), 1))
    return [Ranking("micro average", truth[rows].ravel(), scores[rows].ravel()), *rankings]


def evenly(rows: int, most: int) -> np.ndarray:
    """Row numbers, at most `most` of them, from first to last."""
    return np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)


def precision_recall_figure(rankings: Sequence[Ranking], note: str) -> Html:
    curves = []
    for tone, ranking in enumerate(rankings, start=1):
        precision, recall, _ = precision_recall_points(ranking.truth, ranking.scores)
        name = f"{cut(ranking.name, 30)} {fixed(average_precision(ranking.truth, ranking.scores))}"
        curves.append(Series(name, np.append(0, recall), np.append(precision[0], precision), tone))
    if len(rankings) == 1:
        share = float(rankings[0].truth.mean())
        curves.append(Series(f"by chance {share:.3f}", np.array(UNIT), np.array([share, share]), 0, dashed=True))
    body = chart(curves, "recall", "precision", x_range=UNIT, y_range=UNIT)
    note = f"Average precision beside the name. {note}"
    return figure("Precision and recall", body, legend=keys(curves), note=note)


def roc_figure(rankings: Sequence[Ranking], note: str) -> Html:
    curves = []
    for tone, ranking in enumerate(rankings, start=1):
        false, true = roc_points(ranking.truth, ranking.scores)
        name = f"{cut(ranking.name, 30)} {fixed(roc_auc(ranking.truth, ranking.scores))}"
        curves.append(Series(name, np.append(0, false), np.append(0, true), tone))
    curves.append(Series("by chance 0.500", np.array(UNIT), np.array(UNIT), 0, dashed=True))
    body = chart(curves, "false positive rate", "true positive rate", x_range=UNIT, y_range=UNIT)
    return figure("ROC", body, legend=keys(curves), note=f"Area under the curve beside the name. {note}".strip())


# Regression


def regression_charts(judged: Judged) -> list[Html]:
    predictions, targets = judged.logits[:, 0].astype(np.float64), judged.targets.astype(np.float64)
    if not len(targets):
        return []
    shown = evenly(len(targets), MOST_DOTS)
    limits = np.array([min(targets.min(), predictions.min()), max(targets.max(), predictions.max())])
    curves = [
        Series("perfect", limits, limits, 0, dashed=True),
        Series("rows", targets[shown], predictions[shown], 1, curve=False, dots=True),
    ]
    errors = predictions - targets
    counts, edges = np.histogram(errors, 30)
    note = f"Mean {errors.mean():+.3g}, standard deviation {errors.std():.3g}."
    return [
        figure("Predicted and true", chart(curves, "true value", "predicted value"), legend=keys(curves)),
        figure("Errors", chart([], "predicted minus true", "rows", bars=Bars(edges, counts)), note=note),
    ]


# Calibration


def calibration_charts(judged: Judged, fitted: str) -> list[Html]:
    """Reliability without and with the temperature; `fitted` says where that comes from."""
    if judged.problem.kind == REGRESSION:
        return []
    temperature, multi = judged.problem.temperature, judged.problem.kind == MULTI
    what = "stated probability" if multi else "confidence"
    stages = [("without temperature", 1.0, 2), (f"with temperature {temperature:.3g}", temperature, 1)]
    curves = [Series("perfect", np.array(UNIT), np.array(UNIT), 0, dashed=True)]
    errors, stated = [], np.zeros(0)
    for name, value, tone in stages if temperature != 1 else [("as trained", 1.0, 1)]:
        stated, found = confidences(judged.problem, judged.logits, judged.targets, value)
        curves.append(reliability_curve(name, stated, found, tone))
        errors.append(f"{fixed(calibration_gap(stated, found), 4)} {name}")
    body = chart(
        curves, what, "share that had the label" if multi else "share that was right", x_range=UNIT, y_range=UNIT
    )
    note = f"Expected calibration error: {', '.join(errors)}. The area of a dot is its share of the rows. {fitted}"
    counts, edges = np.histogram(stated, 30, UNIT)
    rows = "labels of rows" if multi else "rows"
    return [
        figure("Reliability", body, legend=keys(curves), note=note),
        figure(f"Distribution of {what}", chart([], what, rows, bars=Bars(edges, counts), x_range=UNIT)),
    ]


def reliability_curve(name: str, stated: np.ndarray, found: np.ndarray, tone: int) -> Series:
    """[n] stated probabilities and [n] 0/1 of whether it was so -> a dot for each bin of probabilities."""
    counts, x, y = reliability_bins(stated, found)
    seen = counts > 0
    return Series(name, x[seen], y[seen], tone, dots=True, sizes=counts[seen] / max(counts.sum(), 1))


# Tables


def class_table(judged: Judged) -> list[Html]:
    """Precision, recall, F1 and rows of each class; of very many, those with the lowest F1."""
    per_class: dict[str, dict[str, Any]] = judged.metrics.get("per_class", {})
    if not per_class:
        return []
    items, pieces = list(per_class.items()), []
    if len(items) > CLASSES:
        items = sorted(items, key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))[:CLASSES]
        pieces.append(
            soft(f"The {CLASSES} of {len(per_class)} classes with the lowest F1; all of them are in metrics.json.")
        )
    multi = judged.problem.kind == MULTI
    rows = []
    for name, row in items:
        numbers = [meter(row["precision"]), meter(row["recall"]), meter(row["f1"]), f"{row['support']:,}"]
        rows.append([cut(name, 80), *numbers, *([f"{row['threshold']:.2f}"] if multi else [])])
    names = ["class", "precision", "recall", "F1", "rows", *(["threshold"] if multi else [])]
    return [*pieces, table(names, "lnnnn" + "n" * multi, rows)]


@dataclass(frozen=True)
class Found:
    """A row worth reading: where it is, and how sure the model was."""

    judged: Judged
    row: int
    rank: float  # the higher, the earlier in the table
    truth: str
    predicted: str
    number: str  # what the table's column of numbers shows

    def cells(self) -> list[str]:
        examples = self.judged.examples
        text = cut(examples.texts[self.row], TEXT_LENGTH)
        if examples.pairs is not None:
            text += "\n— " + cut(examples.pairs[self.row], TEXT_LENGTH)
        where = f"{self.judged.part} {examples.lines[self.row]}"
        return [text, cut(self.truth, 60), cut(self.predicted, 60), self.number, where]


def text_tables(parts: Sequence[Judged]) -> list[Html]:
    """Sections of rows of validation and test: the most confidently wrong, and the least certain."""
    wrong: list[Found] = []
    unsure: list[Found] = []
    for judged in parts:
        find = {SINGLE: single_finds, MULTI: multi_finds, REGRESSION: regression_finds}[judged.problem.kind]
        more_wrong, more_unsure = find(judged)
        wrong, unsure = wrong + more_wrong, unsure + more_unsure
    title, how, number = "Most confidently wrong", "sure and wrong", "probability"
    if parts[0].problem.kind == REGRESSION:
        title, how, number = "Furthest off", "far off", "off by"
    mistakes = f"Read these first: where a good model is {how}, the mistake is often in the label."
    more = "Rows the model could not decide on: labels like these, more of them, would teach it most."
    return [find_section(title, mistakes, wrong, number), find_section("Least certain", more, unsure, number)]


def find_section(title: str, advice: str, finds: list[Found], number: str) -> Html:
    if not finds:
        return Html("")
    rows = [found.cells() for found in sorted(finds, key=lambda found: -found.rank)[:TEXTS]]
    body = table(["text", "label", "predicted", number, "part, line"], "tllnn", rows)
    return section(title, [soft(advice), body], grid=False)


def single_finds(judged: Judged) -> tuple[list[Found], list[Found]]:
    labels = judged.problem.labels
    predicted = judged.logits.argmax(1)
    stated = judged.problem.probabilities(judged.logits).max(1)

    def found(row: int, rank: float) -> Found:
        truth, given = labels[judged.targets[row]], labels[predicted[row]]
        return Found(judged, row, rank, truth, given, f"{stated[row]:.3f}")

    wrong = top(np.where(predicted == judged.targets, -np.inf, stated))
    unsure = top(np.where(stated < CERTAIN, -stated, -np.inf))
    return [found(i, stated[i]) for i in wrong], [found(i, -stated[i]) for i in unsure]


def multi_finds(judged: Judged) -> tuple[list[Found], list[Found]]:
    """One label of a row: the one it is most wrong about, or the one nearest to its threshold."""
    p, thresholds = judged.problem.probabilities(judged.logits), judged.problem.threshold_array()  # [n, L], [L]
    given, truth = p >= thresholds, judged.targets > 0
    mistakes = np.where(given != truth, np.abs(p - truth), -np.inf)
    distance = np.abs(p - thresholds)
    nearness = np.where(distance < NEAR, -distance, -np.inf)

    def found(row: int, values: np.ndarray) -> Found:
        label = int(values[row].argmax())
        name = cut(judged.problem.labels[label], 50)
        stated, predicted = (name if has else f"not {name}" for has in (truth[row, label], given[row, label]))
        return Found(judged, row, values[row, label], stated, predicted, f"{p[row, label]:.3f}")

    wrong = [found(i, mistakes) for i in top(mistakes.max(1))]
    return wrong, [found(i, nearness) for i in top(nearness.max(1))]


def regression_finds(judged: Judged) -> tuple[list[Found], list[Found]]:
    values, targets = judged.logits[:, 0].astype(np.float64), judged.targets.astype(np.float64)
    errors = values - targets
    rows = top(np.abs(errors))
    return [
        Found(judged, i, abs(errors[i]), f"{targets[i]:.4g}", f"{values[i]:.4g}", f"{errors[i]:+.3g}") for i in rows
    ], []


def top(values: np.ndarray, count: int = TEXTS) -> list[int]:
    """Row numbers of the highest values, highest first; rows of -inf are left out."""
    count = min(count, len(values))
    chosen = np.argpartition(-values, count - 1)[:count] if count else np.zeros(0, np.int64)
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    return chosen[values[chosen] > -np.inf].tolist()
