"""Small trainings in this process: random texts of any problem type, a tiny model, and the engine that a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens, offsets_of
from minibert.config import RunConfig
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training.loop import Training

CPU = torch.device("cpu")
EAGER = Hardware(CPU, "fp32", "sdpa", "eager")
FIXED = Hardware(CPU, "fp32", "sdpa", "fixed")
LABELS = {SINGLE: ["a", "b", "c"], MULTI: ["a", "b", "c"], REGRESSION: ["score"]}


def dataset(kind: str = SINGLE, count: int = 40, seed: int = 0) -> Dataset:
    """Random texts of 3 to 39 tokens, the second of which tells the label."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, count)
    offsets = offsets_of(lengths)
    classes = rng.integers(0, 3, count)
    ids = rng.integers(5, 200, offsets[-1]).astype(np.int32)
    ids[offsets[:-1] + 1] = 5 + classes
    targets = {SINGLE: classes, MULTI: np.eye(3, dtype=np.float32)[classes], REGRESSION: classes.astype(np.float32)}
    return Dataset(Tokens(ids, offsets, None, np.zeros(count, np.int32)), targets[kind])


def training(
    folder: Path,
    kind: str = SINGLE,
    hardware: Hardware = EAGER,
    *,
    class_weights: np.ndarray | None = None,
    data: dict[str, Dataset] | None = None,
    **flags: Any,
) -> Training:
    """A training that has not begun. An engine of fixed shapes is asked for by name: a fault in it is an error."""
    labels = LABELS[kind]
    model, _ = load_model(
        folder, BertForSequenceClassification, num_labels=len(labels), dropout=flags.get("dropout", 0.0)
    )
    engine = "eager" if hardware.engine == "eager" else "graph"
    given = {"batch_size": 8, "learning_rate": 1e-3, "epochs": 1, "engine": engine, "quiet": True, **flags}
    data = {"train": dataset(kind)} if data is None else data
    return Training(model, Problem(kind, labels), data, RunConfig(**given), hardware, class_weights)
