"""What the report shows of the predictions: where they are wrong, how they rank, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

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
from minibert.reporting.charts import Bars, Series, chart, keys
from minibert.reporting.format import fixed, shorten
from minibert.reporting.render import pieces

CLASSES, MATRIX, PAIRS = 60, 20, 10  # the most rows of each table
CURVES = 3  # of many labels, as many have curves of their own
MOST_SCORES, MOST_DOTS = 2_000_000, 1500  # of a micro average and of a cloud: more would look the same
UNIT = (0.0, 1.0)


@dataclass(frozen=True)
class SplitResult:
    """The rows of one split, with what the model said of them."""

    split: str
    problem: Problem
    logits: np.ndarray  # [n, L]
    targets: np.ndarray  # [n] class numbers or values, or [n, L] 0/1
    metrics: dict[str, Any]  # of this split, from metrics.json
    examples: Examples


def quality_charts(result: SplitResult) -> list[Markup]:
    if result.problem.kind == REGRESSION:
        return regression_charts(result)
    matrix = result.metrics.get("confusion_matrix")
    figures = [] if matrix is None else confusion(result.problem.labels, np.array(matrix))
    return figures + ranking_charts(result)


# Confusion


def confusion(labels: list[str], counts: np.ndarray) -> list[Markup]:
    """The confusion matrix [L, L]; of many classes, those with the most errors; and the pairs most often confused."""
    wrong = counts - np.diag(np.diag(counts))
    note = "Rows: the label. Columns: the prediction. Colour: fraction of the row."
    names, shown = labels, counts
    if len(labels) > MATRIX:
        chosen = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[: MATRIX - 1])
        others = np.setdiff1d(np.arange(len(labels)), chosen)
        groups = [*chosen[:, None], others]
        shown = np.array([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
        names = [*(labels[i] for i in chosen), f"({len(others)} others)"]
        note = f"The {len(chosen)} of {len(labels)} classes with the most errors. {note}"
    fractions = shown / np.maximum(shown.sum(1, keepdims=True), 1)
    cells = [list(zip(*row, strict=True)) for row in zip(shown.tolist(), fractions.tolist(), strict=True)]
    matrix = pieces.heat_map(names, list(zip(names, cells, strict=True)))
    figure = pieces.figure("Confusion matrix", matrix, note=note, wide=len(names) > 8)
    return [figure, *(confused_pairs(labels, wrong, counts) if len(labels) > 2 else [])]


def confused_pairs(labels: list[str], wrong: np.ndarray, counts: np.ndarray) -> list[Markup]:
    """The pairs (label, prediction) with the most rows off the diagonal; nothing where all are right."""
    places = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(a, b) for a, b in (divmod(int(place), len(labels)) for place in places) if wrong[a, b]]
    rows = [
        (shorten(labels[a], 60), shorten(labels[b], 60), f"{counts[a, b]:,}", f"{counts[a, b] / counts[a].sum():.0%}")
        for a, b in pairs
    ]
    body = pieces.table(["label", "predicted", "rows", "of label"], "llnn", rows)
    return [pieces.figure("Most often confused", body, wide=True)] if rows else []


# Curves over all thresholds


@dataclass(frozen=True)
class Ranking:
    """What precision-recall and ROC curves are drawn from: scores, and which of them ought to be high."""

    name: str
    truth: np.ndarray  # [n] bool
    scores: np.ndarray  # [n]


def ranking_charts(result: SplitResult) -> list[Markup]:
    rankings = rankings_of(result)
    if not rankings:
        return []
    note = ""
    if len(rankings) > 1:
        note = (
            "Each label against the rest. The micro average takes all labels together; the others are the "
            f"{len(rankings) - 1} of {len(result.problem.labels)} labels with the lowest average precision."
        )
    figures = [precision_recall_figure(rankings, note), roc_figure(rankings, note)]
    two_classes = result.problem.kind == SINGLE and len(result.problem.labels) == 2
    return [*figures, thresholds_figure(rankings[0])] if two_classes else figures


def rankings_of(result: SplitResult) -> list[Ranking]:
    """The positive class of two; of more labels their micro average and those of the lowest average precision.

    Labels that all rows have, or none, have no curve.
    """
    labels = result.problem.labels
    scores = result.problem.probabilities(result.logits)  # [n, L]
    targets, single = result.targets, result.problem.kind == SINGLE
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


def precision_recall_figure(rankings: Sequence[Ranking], note: str) -> Markup:
    curves = []
    for tone, ranking in enumerate(rankings, start=1):
        precision, recall, _ = precision_recall_points(ranking.truth, ranking.scores)
        name = f"{shorten(ranking.name, 30)} {fixed(average_precision(ranking.truth, ranking.scores), 3)}"
        curves.append(Series(name, np.append(0, recall), np.append(precision[0], precision), tone))
    if len(rankings) == 1:
        share = float(rankings[0].truth.mean())
        curves.append(Series(f"by chance {share:.3f}", np.array(UNIT), np.array([share, share]), 0, dashed=True))
    body = chart(curves, "recall", "precision", x_range=UNIT, y_range=UNIT)
    note = f"Average precision beside the name. {note}"
    return pieces.figure("Precision and recall", body, legend=keys(curves), note=note)


def roc_figure(rankings: Sequence[Ranking], note: str) -> Markup:
    curves = []
    for tone, ranking in enumerate(rankings, start=1):
        false, true = roc_points(ranking.truth, ranking.scores)
        name = f"{shorten(ranking.name, 30)} {fixed(roc_auc(ranking.truth, ranking.scores), 3)}"
        curves.append(Series(name, np.append(0, false), np.append(0, true), tone))
    curves.append(Series("by chance 0.500", np.array(UNIT), np.array(UNIT), 0, dashed=True))
    body = chart(curves, "false positive rate", "true positive rate", x_range=UNIT, y_range=UNIT)
    return pieces.figure("ROC", body, legend=keys(curves), note=f"Area under the curve beside the name. {note}".strip())


def thresholds_figure(ranking: Ranking) -> Markup:
    """What precision, recall and F1 of the positive class would be, were it predicted from another probability on."""
    precision, recall, thresholds = precision_recall_points(ranking.truth, ranking.scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    names = {"precision": precision, "recall": recall, "F1": f1}
    curves = [Series(name, thresholds, values, tone) for tone, (name, values) in enumerate(names.items(), start=1)]
    best = int(f1.argmax())
    note = f"F1 is highest, {f1[best]:.3f}, from {thresholds[best]:.2f} on. Predictions are made from 0.5 on."
    x_name = f"probability of {shorten(ranking.name, 30)}"
    body = chart(curves, x_name, "metric", marks=[(0.5, "0.5")], x_range=UNIT, y_range=UNIT)
    return pieces.figure("Thresholds", body, legend=keys(curves), note=note)


# Regression


def regression_charts(result: SplitResult) -> list[Markup]:
    predictions, targets = result.logits[:, 0].astype(np.float64), result.targets.astype(np.float64)
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
        pieces.figure("Predicted and true", chart(curves, "true value", "predicted value"), legend=keys(curves)),
        pieces.figure("Errors", chart([], "predicted minus true", "rows", bars=Bars(edges, counts)), note=note),
    ]


# Calibration


def calibration_charts(result: SplitResult, fitted: str) -> list[Markup]:
    """Reliability without and with the temperature; `fitted` says where that comes from."""
    if result.problem.kind == REGRESSION:
        return []
    temperature, multi = result.problem.temperature, result.problem.kind == MULTI
    what = "stated probability" if multi else "confidence"
    stages = [("without temperature", 1.0, 2), (f"with temperature {temperature:.3g}", temperature, 1)]
    curves = [Series("perfect", np.array(UNIT), np.array(UNIT), 0, dashed=True)]
    errors, stated = [], np.zeros(0)
    for name, value, tone in stages if temperature != 1 else [("as trained", 1.0, 1)]:
        stated, found = confidences(result.problem, result.logits, result.targets, value)
        curves.append(reliability_curve(name, stated, found, tone))
        errors.append(f"{fixed(calibration_gap(stated, found), 4)} {name}")
    body = chart(
        curves, what, "share that had the label" if multi else "share that was right", x_range=UNIT, y_range=UNIT
    )
    note = f"Expected calibration error: {', '.join(errors)}. The area of a dot is its share of the rows. {fitted}"
    counts, edges = np.histogram(stated, 30, UNIT)
    rows = "labels of rows" if multi else "rows"
    return [
        pieces.figure("Reliability", body, legend=keys(curves), note=note),
        pieces.figure(f"Distribution of {what}", chart([], what, rows, bars=Bars(edges, counts), x_range=UNIT)),
    ]


def reliability_curve(name: str, stated: np.ndarray, found: np.ndarray, tone: int) -> Series:
    """[n] stated probabilities and [n] 0/1 of whether it was so -> a dot for each bin of probabilities."""
    counts, x, y = reliability_bins(stated, found)
    seen = counts > 0
    return Series(name, x[seen], y[seen], tone, dots=True, sizes=counts[seen] / max(counts.sum(), 1))


# Tables


def class_table(result: SplitResult) -> list[Markup]:
    """Precision, recall, F1 and rows of each class; of very many, those with the lowest F1."""
    per_class: dict[str, dict[str, Any]] = result.metrics.get("per_class", {})
    if not per_class:
        return []
    items, multi = list(per_class.items()), result.problem.kind == MULTI
    note = ""
    if len(items) > CLASSES:
        items = sorted(items, key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))[:CLASSES]
        note = f"The {CLASSES} of {len(per_class)} classes with the lowest F1; all of them are in metrics.json."
    rows = []
    for name, row in items:
        meters = [pieces.meter(row[key]) for key in ("precision", "recall", "f1")]
        threshold = [f"{row['threshold']:.2f}"] if multi else []
        rows.append([shorten(name, 80), *meters, f"{row['support']:,}", *threshold])
    names = ["class", "precision", "recall", "F1", "rows", *(["threshold"] if multi else [])]
    body = pieces.table(names, "lnnnn" + "n" * multi, rows)
    return [pieces.muted(note), body] if note else [body]
