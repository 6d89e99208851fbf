"""A row of weight 2 teaches as two rows do, and a row of weight 0 as none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import FIXED, LABELS, dataset, training

from minibert.batching.dataset import Dataset
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.training import linear_probe
from minibert.training.linear_probe import Rows, fit_linear_probe

WEIGHTS = np.array([0] * 10 + [1] * 20 + [2] * 10, dtype=np.float32)
REPEATED = np.repeat(np.arange(40), WEIGHTS.astype(int))


def weighted(kind: str) -> Dataset:
    data = dataset(kind)
    data.weights = WEIGHTS
    return data


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_training(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder, found = tiny(), []
    for data in (weighted(kind), dataset(kind).take(REPEATED)):
        run = training(folder, kind, data={"train": data}, batch_size=64, epochs=3)
        losses = [float(run.step(step)[0]) for step in run.remaining_steps()]
        found.append((losses, run.model.encoder.layers[0].output.weight.detach().clone()))
    assert np.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_the_linear_probe(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(linear_probe, "PENALTIES", (10.0,))  # else the two hold other rows out to choose one
    targets = torch.from_numpy(dataset(kind).targets)
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    problem, index = Problem(kind, LABELS[kind]), torch.from_numpy(REPEATED)
    ours = fit_linear_probe(Rows(problem, features, targets, None, torch.from_numpy(WEIGHTS)))
    repeated = fit_linear_probe(Rows(problem, features[index], targets[index], None))
    assert (ours.weight - repeated.weight).abs().max() < 1e-3 and (ours.bias - repeated.bias).abs().max() < 1e-3


def test_an_engine_that_cannot_says_so(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="sample_weight"):
        training(tiny(), SINGLE, FIXED, data={"train": weighted(SINGLE)})
