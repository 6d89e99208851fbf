"""The weights of the best evaluation so far."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from minibert.config import RecipeSettings
from minibert.errors import UserError
from minibert.problem.problem import Problem
from minibert.training.state import State

LOWER_IS_BETTER = ("loss", "mse", "mae")


class BestWeights:
    """The trained parameters at the best evaluation by `metric`, and the validation logits that they gave."""

    def __init__(self, metric: str) -> None:
        self.sign = -1 if metric in LOWER_IS_BETTER else 1
        self.weights: dict[str, Tensor] = {}
        self.logits: np.ndarray | None = None  # where this process computed them

    def note(
        self, value: float | None, logits: np.ndarray, parameters: list[tuple[str, Tensor]], state: State
    ) -> float:
        """Keep what is better than all before it, and count in `state`; returns the value that was compared.

        value: None or not finite where the metric is undefined, as Pearson's of equal predictions is: the worst.
        """
        if value is None or not math.isfinite(value):
            value = -self.sign * math.inf
        if state.best_value is None or self.sign * value > self.sign * state.best_value:
            state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
            self.logits = logits
            self.weights = {name: p.detach().clone() for name, p in parameters}
        else:
            state.evaluations_since_best += 1
        return value

    def restore_to(self, model: nn.Module) -> None:
        """Put the best weights, if there are any, into the model."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.weights[name])


def checked_metric(problem: Problem, config: RecipeSettings, targets: np.ndarray) -> str:
    """The metric that chooses the best weights, known to exist before hours are spent."""
    metric = config.metric or problem.default_metric
    example = problem.metrics(np.zeros((1, len(problem.labels))), targets[:1])
    names = [name for name, value in example.items() if not isinstance(value, dict | list)]
    if metric not in names:
        raise UserError(f"--metric {metric}: not a metric of this problem; give one of {', '.join(names)}")
    return metric
