"""Metrics as scikit-learn and scipy define them, in numpy: floats ready for JSON, None where one is undefined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def sigmoid(logits: Array) -> Array:
    """Without overflow, whatever the logits."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def classification_metrics(labels: Array, probabilities: Array, names: Sequence[str]) -> dict[str, Any]:
    """labels [n] class numbers, probabilities [n, C]; a binary problem's positive class is number 1."""
    size = len(names)
    predicted = probabilities.argmax(1) if len(labels) else np.zeros(0, dtype=np.int64)
    confusion = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)
    hits, support, given = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall, f1 = precision_recall_f1(hits, support, given)
    occurs = (support + given) > 0
    total = len(labels)
    result: dict[str, Any] = {
        "accuracy": _ratio(hits.sum(), total),
        "macro_f1": float(f1[occurs].mean()) if total else None,
        "weighted_f1": _ratio(f1 @ support, total),
        "weighted_precision": _ratio(precision @ support, total),
        "weighted_recall": _ratio(recall @ support, total),
        "mcc": matthews(confusion) if total else None,
    }
    if size == 2:
        scores = probabilities[:, 1]
        result["f1"] = float(f1[1]) if total else None
        result["roc_auc"] = roc_auc(labels, scores)
        result["average_precision"] = average_precision(labels, scores)
        result["precision_at_recall_50"] = precision_at_recall(labels, scores, 0.5)
    result["per_class"] = _per_class(names, precision, recall, f1, support)
    result["confusion_matrix"] = confusion.tolist()
    return result


def multi_label_metrics(labels: Array, probabilities: Array, names: Sequence[str], thresholds: Array) -> dict[str, Any]:
    """labels [n, C] of 0 and 1, probabilities [n, C]; a label is given from its threshold on."""
    truth, given = labels.astype(bool), probabilities >= thresholds
    hits, support, predicted = (truth & given).sum(0), truth.sum(0), given.sum(0)
    precision, recall, f1 = precision_recall_f1(hits, support, predicted)
    per_class = _per_class(names, precision, recall, f1, support)
    for name, threshold in zip(names, thresholds, strict=True):
        per_class[name]["threshold"] = float(threshold)
    return {
        "micro_f1": float(2 * hits.sum() / max((support + predicted).sum(), 1)) if len(labels) else None,
        "macro_f1": float(f1.mean()) if len(labels) else None,
        "subset_accuracy": _ratio((truth == given).all(1).sum(), len(labels)),
        "per_class": per_class,
        "thresholds": {name: float(threshold) for name, threshold in zip(names, thresholds, strict=True)},
    }


def regression_metrics(targets: Array, predictions: Array) -> dict[str, Any]:
    """targets and predictions [n]"""
    targets, predictions = targets.astype(np.float64), predictions.astype(np.float64)
    errors = targets - predictions
    return {
        "pearson": pearson(targets, predictions),
        "spearman": pearson(average_ranks(targets), average_ranks(predictions)),
        "mse": float((errors**2).mean()) if len(errors) else None,
        "mae": float(np.abs(errors).mean()) if len(errors) else None,
    }


def precision_recall_f1(hits: Array, support: Array, given: Array) -> tuple[Array, Array, Array]:
    """Per class, from its hits, its true rows and the rows that were given it; 0 where undefined."""
    precision = hits / np.maximum(given, 1)
    recall = hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(support + given, 1)


def matthews(confusion: Array) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004), 0 where undefined."""
    confusion = confusion.astype(np.float64)
    total, hits = confusion.sum(), np.trace(confusion)
    truth, given = confusion.sum(1), confusion.sum(0)
    spread = np.sqrt(total**2 - given @ given) * np.sqrt(total**2 - truth @ truth)
    return float((hits * total - truth @ given) / spread) if spread else 0.0


def roc_auc(labels: Array, scores: Array) -> float | None:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties by half."""
    positive = int((labels == 1).sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return None
    ranks = average_ranks(scores)[labels == 1].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def average_ranks(values: Array) -> Array:
    """1-based ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts + 1) / 2)[inverse]


def precision_recall_points(labels: Array, scores: Array) -> tuple[Array, Array, Array]:
    """At each distinct score as the threshold, from the highest down: (precision, recall, threshold)."""
    hits, taken, thresholds = _taken_from_the_highest(labels, scores)
    return hits / taken, hits / max(hits[-1], 1), thresholds


def roc_points(labels: Array, scores: Array) -> tuple[Array, Array]:
    """At each distinct score as the threshold, from the highest down: (false positive rate, true positive rate)."""
    hits, taken, _ = _taken_from_the_highest(labels, scores)
    return (taken - hits) / max(len(labels) - hits[-1], 1), hits / max(hits[-1], 1)


def _taken_from_the_highest(labels: Array, scores: Array) -> tuple[Array, Array, Array]:
    """At each distinct score, from the highest down: (rows of label 1, rows) that score as high, and the score."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return np.cumsum(labels[order] == 1)[last_of_tie], last_of_tie + 1, scores[order][last_of_tie]


def average_precision(labels: Array, scores: Array) -> float | None:
    if not (labels == 1).any():
        return None
    precision, recall, _ = precision_recall_points(labels, scores)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def precision_at_recall(labels: Array, scores: Array, recall: float) -> float | None:
    """The best precision among the thresholds that reach `recall`."""
    if not (labels == 1).any():
        return None
    precisions, recalls, _ = precision_recall_points(labels, scores)
    return float(precisions[recalls >= recall].max())


def tune_thresholds(labels: Array, probabilities: Array) -> Array:
    """For each label [n, C] the threshold of the best F1 on these rows, 0.5 where the rows cannot tell."""
    return np.array([_best_threshold(labels[:, c], probabilities[:, c]) for c in range(labels.shape[1])])


def _best_threshold(labels: Array, scores: Array) -> float:
    positive = labels.sum()
    if positive in (0, len(labels)):
        return 0.5
    precision, recall, thresholds = precision_recall_points(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    halfway = (thresholds + np.append(thresholds[1:], 0.0)) / 2  # between this score and the next lower one
    best = halfway[f1 >= f1.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def expected_calibration_error(labels: Array, probabilities: Array, bins: int = 15) -> float | None:
    """Mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 2017)."""
    if not len(labels):
        return None
    return calibration_gap(probabilities.max(1), probabilities.argmax(1) == labels, bins)


def calibration_gap(confidence: Array, right: Array, bins: int = 15) -> float | None:
    """The same from [n] stated probabilities and [n] 0/1 of whether it was so."""
    counts, stated, found = reliability_bins(confidence, right, bins)
    return float(np.abs(stated - found) @ counts / counts.sum()) if counts.sum() else None


def reliability_bins(confidence: Array, right: Array, bins: int = 15) -> tuple[Array, Array, Array]:
    """For each equal bin of confidence: (rows, mean confidence, share that was right), 0 where a bin is empty."""
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    rows = np.maximum(counts, 1)
    stated, found = (np.bincount(place, values, minlength=bins) / rows for values in (confidence, right))
    return counts, stated, found


def balanced_class_weights(labels: Array, num_classes: int) -> Array:
    """[C] rows / (classes present x rows of the class), scikit-learn's "balanced"; 1 for a class without rows."""
    counts = np.bincount(labels, minlength=num_classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 1.0)


def pearson(x: Array, y: Array) -> float | None:
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else None


def _per_class(names: Sequence[str], precision: Array, recall: Array, f1: Array, support: Array) -> dict[str, Any]:
    rows = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return {name: {"precision": p, "recall": r, "f1": f, "support": int(s)} for name, p, r, f, s in rows}


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None
