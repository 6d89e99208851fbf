"""The best linear head for given features: L-BFGS or ridge regression, the penalty chosen on held-out rows.

A new head starts so, instead of at random (LP-FT: Kumar et al. 2022, "Fine-tuning can distort pretrained features and
underperform out-of-distribution", arXiv 2202.10054).

Shapes: n rows, F features, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem

PENALTIES = (1000.0, 100.0, 10.0, 1.0)  # of the squared weights, over twice the rows; the strongest first
USUAL_PENALTY = 10.0  # where trying several would take too long
ITERATIONS, LINE_SEARCH = 30, 1.25  # of L-BFGS for each penalty, and evaluations an iteration takes
CELLS_AT_ONCE = 1 << 24  # of logits [rows, L]: more classes are computed in more chunks of rows
OPERATIONS = 2e13  # multiplications and additions that a fit may take: a minute or two of a CPU
FEW_ROWS, SOME_ROWS = 200, 700  # fewer are held out in five turns, or in two


@dataclass(frozen=True)
class LinearProbe:
    """logits = features @ weight.T + bias"""

    weight: Tensor  # [L, F]
    bias: Tensor  # [L]
    penalty: float
    held_out_loss: float  # mean over rows that the fit had not seen; inf where none could be held out


@dataclass(frozen=True)
class Rows:
    """What is fitted: features of about unit variance [n, F], targets as `Problem.targets` has them, class weights."""

    problem: Problem
    features: Tensor
    targets: Tensor
    class_weights: Tensor | None  # [L]
    sample_weights: Tensor | None = None  # [n]

    def take(self, rows: np.ndarray) -> Rows:
        index = torch.from_numpy(rows)
        weights = None if self.sample_weights is None else self.sample_weights[index]
        return Rows(self.problem, self.features[index], self.targets[index], self.class_weights, weights)

    def total_weight(self) -> float:
        weights = None if self.class_weights is None else self.class_weights.numpy()
        counts = self.problem.example_weights(self.targets.numpy(), weights)
        return float((counts * self.counts().numpy()).sum()) or 1.0

    def counts(self) -> Tensor:
        """[n] what each row counts, beside its class."""
        return torch.ones(len(self.features)) if self.sample_weights is None else self.sample_weights

    def loss_sum(self, logits: Tensor, chunk: slice) -> Tensor:
        """As in training, but of several labels the sum: their mean would count for less the more there are."""
        weights = None if self.sample_weights is None else self.sample_weights[chunk]
        losses = self.problem.loss_sum(logits, self.targets[chunk], self.class_weights, 0.0, weights)
        return losses * logits.shape[1] if self.problem.kind == MULTI else losses


def fit_linear_probe(rows: Rows) -> LinearProbe:
    """The head that is best for these rows, its penalty chosen by the loss on rows held out from them."""
    penalties = PENALTIES if _operations(rows) <= OPERATIONS else (USUAL_PENALTY,)
    losses = _held_out_losses(rows, penalties)
    best = min(range(len(penalties)), key=losses.__getitem__)
    *_, (weight, bias) = _fit_path(rows, penalties[: best + 1])
    return LinearProbe(weight, bias, penalties[best], losses[best])


def _operations(rows: Rows) -> float:
    """Of fitting all penalties once on the rows and about once on those that are not held out."""
    evaluations = 2 * len(PENALTIES) * ITERATIONS * LINE_SEARCH
    return 6.0 * rows.features.numel() * len(rows.problem.labels) * evaluations


def _held_out_losses(rows: Rows, penalties: tuple[float, ...]) -> list[float]:
    """For each penalty the mean loss on rows that the fit did not see; inf where there are too few to hold any out."""
    totals, count = np.zeros(len(penalties)), 0.0
    for seen, unseen in _folds(rows):
        kept, held = rows.take(seen), rows.take(unseen)
        for number, (weight, bias) in enumerate(_fit_path(kept, penalties)):
            logits = held.features @ weight.T + bias
            totals[number] += float(held.loss_sum(logits, slice(None)))
        count += held.total_weight()
    return (totals / count).tolist() if count else [float("inf")] * len(penalties)


def _folds(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit on, rows to judge by), classes spread evenly; fewer rows are held out in more turns."""
    n, generator = len(rows.features), np.random.default_rng(0)
    order = generator.permutation(n)
    if rows.problem.kind == SINGLE:  # class by class, so that every fifth row takes a fifth of each
        order = order[np.argsort(rows.targets.numpy()[order], kind="stable")]
    fold = np.empty(n, dtype=np.int64)
    fold[order] = np.arange(n) % 5
    turns = 5 if n < FEW_ROWS else 2 if n < SOME_ROWS else 1
    for turn in range(turns):
        seen, unseen = np.flatnonzero(fold != turn), np.flatnonzero(fold == turn)
        if len(seen) and len(unseen):
            yield seen, unseen


def _fit_path(rows: Rows, penalties: tuple[float, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """weight [L, F] and bias [L] for each penalty, each fit going on from the one before."""
    if rows.problem.kind == REGRESSION:
        yield from (_ridge(rows, penalty) for penalty in penalties)
        return
    weight = torch.zeros(len(rows.problem.labels), rows.features.shape[1], requires_grad=True)
    bias = _log_prior(rows).requires_grad_()
    for penalty in penalties:
        _minimise(rows, weight, bias, penalty)
        yield weight.detach().clone(), bias.detach().clone()


def _ridge(rows: Rows, penalty: float) -> tuple[Tensor, Tensor]:
    """Least squares in closed form."""
    x, y, counts = rows.features.double(), rows.targets.double(), rows.counts().double()[:, None]
    centre, mean = (counts * x).sum(0) / counts.sum(), (counts[:, 0] * y).sum() / counts.sum()
    x = x - centre
    weighted = counts * x
    gram = weighted.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, weighted.T @ (y - mean))
    return weight.float()[None], (mean - centre @ weight).float()[None]


def _log_prior(rows: Rows) -> Tensor:
    """The best constant answer: where the bias begins."""
    targets, counts, labels = rows.targets, rows.counts(), len(rows.problem.labels)
    if rows.problem.kind == MULTI:
        fraction = ((counts[:, None] * targets).sum(0) + 0.5) / (counts.sum() + 1)
        return torch.log(fraction / (1 - fraction))
    of_classes = torch.bincount(targets, counts, minlength=labels) + 0.5
    return torch.log(of_classes / of_classes.sum())


def _minimise(rows: Rows, weight: Tensor, bias: Tensor, penalty: float) -> None:
    n, labels = len(rows.features), len(bias)
    step, total = max(1, CELLS_AT_ONCE // labels), rows.total_weight()
    iterations = int(min(ITERATIONS, max(5, OPERATIONS / (6.0 * LINE_SEARCH * rows.features.numel() * labels))))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalty / (2 * n) * weight.square().sum()
        loss.backward()
        for start in range(0, n, step):
            chunk = slice(start, start + step)
            part = rows.loss_sum(rows.features[chunk] @ weight.T + bias, chunk) / total
            part.backward()
            loss = loss + part.detach()
        return loss.detach()

    with torch.enable_grad():  # whatever the caller has set
        optimizer.step(closure)
