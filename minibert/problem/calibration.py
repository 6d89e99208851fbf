"""Temperature scaling (Guo et al. 2017): one number that makes probabilities honest and changes no decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minibert.problem.metrics import calibration_gap, sigmoid
from minibert.problem.problem import MULTI, REGRESSION, Calibration, Problem

LIMIT = 100.0  # temperatures from 1 / LIMIT to LIMIT


def fit_calibration(problem: Problem, logits: np.ndarray, targets: np.ndarray, temperature: bool) -> Calibration:
    """Temperature (1 where it is not wanted) and thresholds by the rows of validation."""
    fitted = fit_temperature(problem, logits, targets) if temperature else 1.0
    return replace(problem, calibration=Calibration(fitted)).tuned(logits, targets).calibration


def fit_temperature(problem: Problem, logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature of the lowest negative log-likelihood on these rows.

    1 where the rows cannot tell: none, regression, or all of them right, when ever colder would look ever better.
    """
    if problem.kind == REGRESSION or not len(logits):
        return 1.0
    slope = _multi_label_slope(logits, targets) if problem.kind == MULTI else _single_label_slope(logits, targets)
    if slope(LIMIT)[0] <= 0:
        return 1.0
    if slope(1 / LIMIT)[0] >= 0:
        return LIMIT
    return 1 / _root(slope, 1 / LIMIT, LIMIT)


Slope = Callable[[float], tuple[float, float]]  # of the loss and its derivative, at an inverse temperature


def _single_label_slope(logits: np.ndarray, targets: np.ndarray) -> Slope:
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    truth = z[np.arange(len(z)), targets]

    def slope(inverse: float) -> tuple[float, float]:
        p = np.exp(inverse * z)
        p /= p.sum(1, keepdims=True)
        mean = np.einsum("nc,nc->n", p, z)
        return float((mean - truth).mean()), float((np.einsum("nc,nc,nc->n", p, z, z) - mean**2).mean())

    return slope


def _multi_label_slope(logits: np.ndarray, targets: np.ndarray) -> Slope:
    z = logits.astype(np.float64)

    def slope(inverse: float) -> tuple[float, float]:
        p = sigmoid(inverse * z)
        return float(((p - targets) * z).mean()), float((p * (1 - p) * z * z).mean())

    return slope


def _root(slope: Slope, low: float, high: float) -> float:
    """Where a rising slope crosses 0: Newton's steps, halving the bracket where one would leave it."""
    x = 1.0
    for _ in range(100):
        value, rise = slope(x)
        low, high = (low, x) if value > 0 else (x, high)
        step = x - value / rise if rise > 0 else 0.0
        step = step if low < step < high else (low * high) ** 0.5
        if abs(step - x) <= 1e-7 * x:
            return step
        x = step
    return x


def confidences(
    problem: Problem, logits: np.ndarray, targets: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """What reliability compares: stated probabilities, and whether (0 or 1) what they speak of was so.

    Single-label: [n] of the predicted class of each row. Multi-label: [n * L] of every label of every row.
    """
    scaled = logits / np.float32(temperature)
    if problem.kind == MULTI:
        return sigmoid(scaled).ravel(), targets.ravel()
    largest = scaled.max(1, keepdims=True)
    return 1 / np.exp(scaled - largest).sum(1), (logits.argmax(1) == targets).astype(np.float32)


def calibration_metrics(
    problem: Problem, logits: dict[str, np.ndarray], targets: dict[str, np.ndarray]
) -> dict[str, Any]:
    """For metrics.json: the temperature, and calibration error and loss of each part without and with it."""
    result: dict[str, Any] = {"temperature": problem.temperature}
    plain = problem.without_temperature()
    for part, values in logits.items():
        result[part] = {"expected_calibration_error": {}, "loss": {}}
        for name, used in (("before", plain), ("after", problem)):
            error = calibration_gap(*confidences(problem, values, targets[part], used.temperature))
            losses = used.example_losses(values, targets[part])
            result[part]["expected_calibration_error"][name] = error
            result[part]["loss"][name] = float(losses.mean()) if len(losses) else None
    return result
