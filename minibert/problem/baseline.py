"""The majority baseline: the best answer that never looks at the text, and whether a model is better than it."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from minibert.problem.problem import MULTI, REGRESSION, Problem

NEAR_BASELINE = 0.05  # a run that gains less than this fraction of what the baseline leaves has learned nothing
FAR_BELOW = 0.5  # a run that gains less than this fraction of the median run's gain is far below the others


def majority_baseline(problem: Problem, targets: np.ndarray) -> dict[str, Any]:
    """The metrics of one answer for all rows, the best on these: the labels' frequencies, or the mean of the values.

    The mean absolute error is that of the median, which is the better constant there.
    """
    if problem.kind == REGRESSION:
        constant = targets.mean(keepdims=True)
    else:
        counts = targets.sum(0) if problem.kind == MULTI else np.bincount(targets, minlength=len(problem.labels))
        frequencies = (counts + 1e-3) / (len(targets) + 1e-2)
        odds = 1 - frequencies if problem.kind == MULTI else 1
        constant = np.log(frequencies / odds)
    logits = np.tile(constant.astype(np.float32), (len(targets), 1))
    metrics = Problem(problem.kind, problem.labels).tuned(logits, targets).metrics(logits, targets)
    if problem.kind == REGRESSION:
        metrics["mae"] = float(np.abs(targets - np.median(targets)).mean())
    return metrics


def collapsed(values: list[float | None], baseline: float | None, lower_is_better: bool) -> list[str]:
    """For each run, what is wrong with it, or "": no better than the majority baseline, or far below the other runs.

    Where the baseline is perfect, as on rows of one class, there is nothing to be better than.
    """
    sign = -1 if lower_is_better else 1
    base = baseline or 0.0  # a correlation with a constant is undefined: as good as none
    perfect = 0.0 if lower_is_better else 1.0
    if base == perfect and baseline is not None:
        return [""] * len(values)
    gains = [float("-inf") if value is None else sign * (value - base) for value in values]
    median = statistics.median(gains)
    reasons = []
    for gain in gains:
        if gain <= NEAR_BASELINE * sign * (perfect - base):
            reasons.append(f"collapsed: about as good as the majority baseline ({base:.4f})")
        else:
            reasons.append("is far below the others" if gain < FAR_BELOW * median else "")
    return reasons
