"""A new head before its first step: the encoder's features of the training rows, and the linear probe that fits them.

The pooler standardises the features, in the nearly straight part of tanh, and the classifier is the probe on what it
gives. Both are plain BERT, so a saved folder reads as before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training.frozen import compute
from minibert.training.linear_probe import LinearProbe, Rows, fit_linear_probe

ROWS = 20_000  # of the training rows, whose features are computed
STRAIGHT = 8.0  # tanh(z / 8) * 8 is z within 2% up to two standard deviations
CONSTANT = 1e-2  # a feature that varies less than this fraction of the median one says nothing


class HeadStart:
    """Fills the pooler and the classifier of a model from its encoder's features."""

    def __init__(
        self, model: BertForSequenceClassification, train: Dataset, problem: Problem, hardware: Hardware, quiet: bool
    ) -> None:
        self.model, self.problem = model, problem
        self.rows = sampled_rows(train.targets, problem, ROWS)
        self.targets = torch.from_numpy(train.targets[self.rows])
        self.sample_weights = None if train.weights is None else torch.from_numpy(train.weights[self.rows])
        self.tokens, self.features = _features(model, train, self.rows, hardware, quiet)

    def standardise(self) -> None:
        """Let the pooler give each feature's distance from its mean in standard deviations, divided by STRAIGHT."""
        mean, deviation = self.features.mean(0), self.features.std(0, correction=0)
        varies = deviation > CONSTANT * deviation.median()
        scale = torch.where(varies, 1 / (STRAIGHT * deviation), 0)
        dense = self.model.pooler.dense
        with torch.no_grad():
            dense.weight.copy_(torch.diag(scale))
            dense.bias.copy_(-mean * scale)

    def fit(self, class_weights: np.ndarray | None) -> None:
        """Put the probe of the pooled rows into the classifier, behind random hidden units where the head has some."""
        head = self.model.classifier
        with torch.no_grad():
            pooled = self._of_texts(self._pooled())
            if head.dense is None:
                self._copy(self._probe(pooled * STRAIGHT, class_weights), scale=torch.full((), STRAIGHT))
                return
        kept = head.dense.weight.detach().clone()
        with torch.no_grad():
            head.dense.weight.mul_(STRAIGHT / (head.dense.weight.std() * pooled.shape[1] ** 0.5))
            hidden = self._of_texts(F.relu(F.linear(self._pooled(), *_on_cpu(head.dense))))
        deviation = hidden.std(0, correction=0)
        scale = torch.where(deviation > 0, 1 / deviation, 0)
        probe = self._probe(hidden * scale, class_weights)
        if probe.held_out_loss < self._constant_loss(class_weights):
            self._copy(probe, scale)
        else:  # hidden units that nothing can be read from
            with torch.no_grad():
                head.dense.weight.copy_(kept)

    def _pooled(self) -> Tensor:
        """[rows or windows, H]"""
        weight, bias = _on_cpu(self.model.pooler.dense)
        return torch.tanh(F.linear(self.features, weight, bias))

    def _of_texts(self, values: Tensor) -> Tensor:
        """Of windows the mean for each text, as the classifier takes the mean of their logits."""
        if self.tokens.windows is None:
            return values
        return torch.from_numpy(self.tokens.mean_of_windows(values.numpy()))

    def _probe(self, features: Tensor, class_weights: np.ndarray | None) -> LinearProbe:
        return fit_linear_probe(self._rows(features, class_weights))

    def _rows(self, features: Tensor, class_weights: np.ndarray | None) -> Rows:
        weights = None if class_weights is None else torch.from_numpy(class_weights)
        return Rows(self.problem, features, self.targets, weights, self.sample_weights)

    def _constant_loss(self, class_weights: np.ndarray | None) -> float:
        """Of the probe that sees no features."""
        return fit_linear_probe(self._rows(torch.zeros(len(self.targets), 1), class_weights)).held_out_loss

    def _copy(self, probe: LinearProbe, scale: Tensor) -> None:
        """The probe of features that were multiplied by `scale`."""
        out = self.model.classifier.out
        with torch.no_grad():
            out.weight.copy_(probe.weight * scale)
            out.bias.copy_(probe.bias)


def sampled_rows(targets: np.ndarray, problem: Problem, most: int) -> np.ndarray:
    """At most so many row numbers; of classes the same fraction of each, one row at least."""
    n = len(targets)
    if n <= most:
        return np.arange(n)
    order = np.random.default_rng(0).permutation(n)
    if problem.kind == SINGLE:
        order = order[np.argsort(targets[order], kind="stable")]
        first = np.flatnonzero(np.diff(targets[order], prepend=-1))  # of each class
        evenly = np.linspace(0, n - 1, most).astype(np.int64)
        return np.sort(order[np.union1d(first, evenly)])
    return np.sort(order[:most])


def _on_cpu(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().cpu(), layer.bias.detach().cpu()


def _features(
    model: BertForSequenceClassification, train: Dataset, rows: np.ndarray, hardware: Hardware, quiet: bool
) -> tuple[Tokens, Tensor]:
    """The tokens of some rows, and their [CLS] rows [rows or windows, H] behind the last layer, without dropout."""
    tokens, layers = train.tokens.take(rows), len(model.encoder.layers)
    if train.frozen is not None and train.frozen.start_layer == layers and len(rows) == len(train):
        return tokens, torch.from_numpy(train.frozen.values)  # as they are kept for training
    model.to(hardware.device)
    found = compute(model, tokens, layers, hardware, quiet, what="features of the head")
    if found is None:
        raise UserError("no room for the features of the training rows; give --head-init random")
    return tokens, torch.from_numpy(found.values)
