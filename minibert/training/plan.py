"""Which rows each optimiser step trains on, and how a step is cut into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minibert.batching.dataset import Dataset
from minibert.batching.plans import cut_into_batches, plan_epoch, split_by_tokens
from minibert.config import RecipeSettings
from minibert.problem.problem import Problem
from minibert.runtime import distributed
from minibert.training.recipe import EPOCHS


@dataclass
class PlannedStep:
    """The batches of one optimiser step, and what their losses are divided by."""

    batches: list[np.ndarray]  # row numbers
    denominator: float
    tokens: int
    examples: int


def planned_batches(lengths: np.ndarray, config: RecipeSettings, epoch: int = 0) -> list[np.ndarray]:
    """The row numbers of each batch of an epoch."""
    return plan_epoch(
        lengths,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        buckets=config.length_buckets,
        seed=config.seed,
        epoch=epoch,
    )


def plan_steps(
    train: Dataset, problem: Problem, config: RecipeSettings, class_weights: np.ndarray | None, epoch: int
) -> list[PlannedStep]:
    """The steps of an epoch, in order."""
    batches = planned_batches(train.lengths, config, epoch)
    counts = problem.example_weights(train.targets, class_weights)
    counts = counts if train.weights is None else counts * train.weights
    steps = []
    for start in range(0, len(batches), config.gradient_accumulation_steps):
        chosen = batches[start : start + config.gradient_accumulation_steps]
        chosen = [part for batch in chosen for part in within_budget(batch, train, config)]
        rows = np.concatenate(chosen)
        total = float(counts[rows].sum()) or 1.0  # all of classes of weight 0: no loss
        steps.append(PlannedStep(chosen, total, int(train.lengths[rows].sum()), len(rows)))
    return steps


def within_budget(rows: np.ndarray, train: Dataset, config: RecipeSettings) -> list[np.ndarray]:
    """A batch of texts of many windows, cut to what a batch of one window a text may hold; the step stays one."""
    if train.tokens.windows is None:
        return [rows]
    limit = config.batch_tokens or config.batch_size * int(train.tokens.lengths.max())
    return cut_into_batches(rows, train.lengths, None, limit)


def micro_batches(step: PlannedStep, lengths: np.ndarray, most_tokens: int) -> list[np.ndarray]:
    """This process's rows of a step's batches, each cut to `most_tokens` tokens (0: no limit)."""
    own = [split_by_tokens(rows, lengths, distributed.world_size())[distributed.rank()] for rows in step.batches]
    own = [rows for rows in own if len(rows)]
    if not most_tokens:
        return own
    return [part for rows in own for part in cut_into_batches(rows, lengths, None, most_tokens)]


def total_steps(steps_per_epoch: int, config: RecipeSettings) -> int:
    return config.max_steps or math.ceil(steps_per_epoch * (config.epochs or EPOCHS))
