"""Loss curves of small trainings with any engine, to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training.loop import Training
from minibert.training.optimizer import freeze

CPU = torch.device("cpu")

SIZES = {SINGLE: 3, MULTI: 3, REGRESSION: 1}


def made_tokens(count: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(rng.integers(5, 200, offsets[-1]).astype(np.int32), offsets, None, np.zeros(count, dtype=np.int32))


def made_targets(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == SINGLE:
        return rng.integers(0, 3, count)
    return rng.random((count, 3) if kind == MULTI else count).round().astype(np.float32)


def curve(
    folder: Path, kind: str, hardware: Hardware, weights: np.ndarray | None = None, **flags: Any
) -> tuple[np.ndarray, dict[str, torch.Tensor], Training]:
    """Losses and gradient norms of some steps, and the weights behind them."""
    torch.manual_seed(0)
    model, _ = load_model(
        folder, BertForSequenceClassification, num_labels=SIZES[kind], dropout=flags.pop("dropout", 0)
    )
    data = Dataset(made_tokens(41), made_targets(kind, 41))
    labels = [str(i) for i in range(SIZES[kind])]
    flags = {"engine": "auto" if hardware.engine == "eager" else "graph", **flags}  # by name: a fault is an error
    freeze(model, str(flags.get("freeze", "none")), ())
    config = RunConfig(**{"batch_size": 8, "learning_rate": 1e-3, "epochs": 2, "quiet": True, **flags})
    training = Training(model, Problem(kind, labels), {"train": data}, config, hardware, weights, print)
    numbers = [torch.stack(training.step(step)) for _ in range(2) for step in training.steps_of_epoch(0)]
    training.optimizer.flush()
    weights_behind = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    return torch.stack(numbers).cpu().numpy(), weights_behind, training


def assert_same_training(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=0, atol=20 * tolerance, msg=name)
