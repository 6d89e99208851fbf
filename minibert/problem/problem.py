"""What the labels are: names and numbers, the loss, probabilities, predictions and metrics of each problem type."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.errors import UserError
from minibert.problem import metrics
from minibert.runtime.files import parse_json, read_json

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

LABEL_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda name: name == "1",
}
ROWS_FOR_OWN_THRESHOLD = 5
WIDE_SPREAD = 2.0  # standard deviation of a regression's labels; of STS-B's, from 0 to 5, it is 1.5


@dataclass(frozen=True)
class Calibration:
    """What is fitted on validation once training is over: how logits become probabilities, and those become labels."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()  # multi-label: from which probability on each label is given; (): from 0.5 on


@dataclass(frozen=True)
class Problem:
    """The problem type with its label names; regression has one, its column's."""

    kind: str
    labels: list[str]
    calibration: Calibration = Calibration()
    label_type: str = "str"  # of the labels as they were given, one of LABEL_TYPES
    target_scale: float = 1.0  # regression: what the labels are divided by while training

    @property
    def temperature(self) -> float:
        return self.calibration.temperature

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.calibration.thresholds

    @property
    def default_metric(self) -> str:
        return {SINGLE: "macro_f1", MULTI: "micro_f1", REGRESSION: "spearman"}[self.kind]

    def targets(self, values: Sequence[Any]) -> np.ndarray:
        """Label values as read -> [n] int64 class numbers, [n, L] 0/1 float32, or [n] float32."""
        if self.kind == REGRESSION:
            return np.array([float(value) for value in values], dtype=np.float32)
        number = {name: i for i, name in enumerate(self.labels)}
        if self.kind == SINGLE:
            return np.array([number[value] for value in values], dtype=np.int64)
        targets = np.zeros((len(values), len(self.labels)), dtype=np.float32)
        for row, names in enumerate(values):
            targets[row, [number[name] for name in names]] = 1
        return targets

    def loss_sum(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float, keep: Tensor | None = None
    ) -> Tensor:
        """The sum of the examples' losses (divide by the sum of `example_weights`); computed in fp32.

        `weights`: [L] of the classes, or of the positive rows of each label in multi-label. `keep` [B] is what
        each row's loss counts, 0 for rows that only fill the batch up.
        """
        logits = logits.float()
        if self.kind == SINGLE:
            losses = F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
        elif self.kind == MULTI:
            targets = targets * (1 - smoothing) + smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none").mean(1)
        else:
            losses = ((logits.squeeze(1) - targets) / self.target_scale) ** 2
        return (losses if keep is None else torch.where(keep > 0, losses * keep, 0)).sum()

    def example_weights(self, targets: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        """What each example counts in the mean loss: its class's weight, as in torch's cross_entropy, else 1."""
        if self.kind == SINGLE and weights is not None:
            return weights[targets].astype(np.float64)
        return np.ones(len(targets))

    def example_losses(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """[n, L], targets -> [n] plain losses of the probabilities, without class weights or smoothing."""
        if self.kind == REGRESSION:
            return (logits[:, 0] - targets) ** 2
        x, y = torch.from_numpy(logits) / self.temperature, torch.from_numpy(targets)
        if self.kind == SINGLE:
            return F.cross_entropy(x, y, reduction="none").numpy()
        return F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1).numpy()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """[n, L] -> [n, L]; of regression, the predicted values themselves."""
        logits = logits.astype(np.float64)
        if self.kind == REGRESSION:
            return logits
        scaled = logits / self.temperature
        if self.kind == MULTI:
            return metrics.sigmoid(scaled)
        exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)

    def decisions(self, probabilities: np.ndarray) -> list[Any]:
        """[n, L] probabilities -> the label, the list of labels, or the value of each row."""
        if self.kind == REGRESSION:
            return [float(value) for value in probabilities[:, 0]]
        if self.kind == SINGLE:
            return [self.labels[i] for i in probabilities.argmax(1)]
        given = probabilities >= self.threshold_array()
        return [[self.labels[i] for i in np.flatnonzero(row)] for row in given]

    def as_given(self, label: Any) -> Any:
        """A decision with its label, or its list of labels, in the type that they were given in."""
        if self.kind == REGRESSION:
            return label
        convert = LABEL_TYPES[self.label_type]
        return [convert(name) for name in label] if isinstance(label, list) else convert(label)

    def top_label(self, probabilities: np.ndarray) -> np.ndarray:
        """[n, L] -> [n] numbers of the most probable label given, of none that is given the most probable."""
        if self.kind != MULTI:
            return probabilities.argmax(1)
        return (probabilities + (probabilities >= self.threshold_array())).argmax(1)

    def without_temperature(self) -> Problem:
        """The same decisions with the probabilities as trained: thresholds move along with the probabilities."""
        if self.temperature == 1.0:
            return self
        p = np.array(self.thresholds, dtype=np.float64).clip(1e-12, 1 - 1e-12)
        odds = (p / (1 - p)) ** self.temperature
        return replace(self, calibration=Calibration(1.0, tuple((odds / (1 + odds)).tolist())))

    def threshold_array(self) -> np.ndarray:
        return np.array(self.thresholds or [0.5] * len(self.labels))

    def tuned(self, logits: np.ndarray, targets: np.ndarray) -> Problem:
        """Multi-label: the same with each label's threshold at the best F1 on these rows (of validation).

        Labels with few rows there share the one that is best for all labels together: their own would be chance.
        """
        if self.kind != MULTI or not len(targets):
            return self
        probabilities = self.probabilities(logits)
        tuned = metrics.tune_thresholds(targets, probabilities)
        common = metrics.tune_thresholds(targets.reshape(-1, 1), probabilities.reshape(-1, 1))[0]
        thresholds = np.where(targets.sum(0) < ROWS_FOR_OWN_THRESHOLD, common, tuned)
        return replace(self, calibration=replace(self.calibration, thresholds=tuple(thresholds.tolist())))

    def metrics(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        """All metrics of the contract for [n, L] logits, and the mean plain loss; None where one is no number."""
        probabilities = self.probabilities(logits)
        if self.kind == REGRESSION:
            result = metrics.regression_metrics(targets, logits[:, 0])
        elif self.kind == SINGLE:
            result = metrics.classification_metrics(targets, probabilities, self.labels)
        else:
            result = metrics.multi_label_metrics(targets, probabilities, self.labels, self.threshold_array())
        if self.kind != REGRESSION:
            losses = self.example_losses(logits, targets)
            result["loss"] = float(losses.mean()) if len(losses) else None
        broken = {name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)}
        return {name: None if name in broken else value for name, value in result.items()}


def target_scale(targets: np.ndarray) -> float:
    """A regression's [n] labels of a wide spread are divided by this while training, or the head would not reach them.

    1,200 pairs of STS-B with scores times 20: Spearman 0.75 without it, 0.90 with it, as with scores as they are.
    """
    return max(1.0, float(targets.std(dtype=np.float64)) / WIDE_SPREAD)


def class_weights(problem: Problem, choice: str, targets: np.ndarray) -> np.ndarray | None:
    """--class-weights: [L] float32 weights, or None. Multi-label `balanced` weighs negatives over positives."""
    if choice == "none":
        return None
    if problem.kind == REGRESSION:
        raise UserError("--class-weights: regression has no classes; leave the flag out")
    if choice == "balanced":
        if problem.kind == SINGLE:
            return metrics.balanced_class_weights(targets, len(problem.labels)).astype(np.float32)
        positive = targets.sum(0)
        negative = np.maximum(len(targets) - positive, 1)  # a label of every row still counts
        return np.where(positive > 0, negative / np.maximum(positive, 1), 1).astype(np.float32)
    return _given_weights(choice, problem.labels)


def _given_weights(choice: str, labels: list[str]) -> np.ndarray:
    """[L] weights from JSON, or from a file of it."""
    if choice.startswith("{"):
        where, given = "--class-weights", parse_json(choice, "--class-weights")
    elif choice.endswith(".json") or os.path.exists(choice):
        where, given = choice, read_json(Path(choice))
    else:
        raise UserError(f"--class-weights {choice}: give none, balanced, or a JSON file {{label: weight}}")
    if not isinstance(given, dict) or not all(isinstance(v, int | float) and 0 <= v < math.inf for v in given.values()):
        raise UserError(f'{where}: expected {{"label": weight, ...}} with weights of at least 0')
    unknown, missing = sorted(set(given) - set(labels)), sorted(set(labels) - set(given))
    if unknown or missing:
        raise UserError(f"{where}: weights must name each label once; unknown {unknown}, missing {missing}")
    return np.array([given[label] for label in labels], dtype=np.float32)
