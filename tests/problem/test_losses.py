"""Class weights and label smoothing against torch's own losses with mean reduction, in a step and through the flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from trainings import EAGER, FIXED, training

import minibert
from minibert.problem.problem import MULTI, REGRESSION, SINGLE
from minibert.runtime.device import Hardware

pytestmark = pytest.mark.usefixtures("references_of_kernels")
WEIGHTS = np.array([0.2, 1.0, 5.0], dtype=np.float32)
LOSSES = [(kind, *options) for kind in (SINGLE, MULTI) for options in ((WEIGHTS, 0.0), (None, 0.2), (WEIGHTS, 0.2))]
LOSSES += [(REGRESSION, None, 0.0)]


def torchs_loss(kind: str, logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """What torch's own functions make of a whole batch."""
    if kind == SINGLE:
        return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    if kind == REGRESSION:
        return F.mse_loss(logits[:, 0], targets)
    softened = targets * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, softened, pos_weight=weights)


@pytest.mark.parametrize("hardware", [EAGER, FIXED], ids=["eager", "fixed"])
@pytest.mark.parametrize(("kind", "weights", "smoothing"), LOSSES)
def test_a_step_has_the_loss_and_gradient_of_torch(
    tiny: Callable[..., Path], kind: str, hardware: Hardware, weights: np.ndarray | None, smoothing: float
) -> None:
    """Over two micro-batches together."""
    flags = {"gradient_accumulation_steps": 2, "label_smoothing": smoothing, "head_dropout": 0.0, "max_grad_norm": 0.0}
    job = training(tiny(classifier_dropout=0.0), kind, hardware, class_weights=weights, **flags)
    step = job.steps_of_epoch(0)[0]
    rows = np.concatenate(step.batches)
    assert len(step.batches) == 2
    logits = job.model.logits(job.data["train"].batch(rows))
    targets = torch.from_numpy(job.data["train"].targets[rows])
    expected = torchs_loss(kind, logits, targets, None if weights is None else torch.from_numpy(weights), smoothing)
    gradients = torch.autograd.grad(expected, list(job.model.parameters()))
    loss, norm = job.step(step)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert float(norm) == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-4)


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
@pytest.mark.parametrize("choice", ["none", "balanced", '{"a": 0.5, "b": 3, "c": 1}'])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_flags_reach_the_loss_of_a_run(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, choice: str, smoothing: float
) -> None:
    """The first loss in the log is torch's of the model that training starts from."""
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "problem_type": kind}
    folder = tiny("BertForSequenceClassification", num_labels=3, classifier_dropout=0.0, **labels)
    texts = [f"the film is {'good' if i % 3 else 'bad'} {i}" for i in range(30)]
    numbers = np.array([0 if i % 3 else 1 + i % 2 for i in range(30)])  # 20 of a, 5 each of b and c
    names: list[Any] = ["abc"[n] for n in numbers]
    targets: np.ndarray = numbers
    if kind == MULTI:
        targets = np.eye(3, dtype=np.float32)[numbers]
        targets[::5, 1] = 1
        names = [["abc"[i] for i in np.flatnonzero(row)] for row in targets]
    weights = {"none": None, "balanced": balanced(kind, targets)}.get(choice, np.array([0.5, 3, 1], dtype=np.float32))
    flags: dict[str, Any] = {"max_steps": 1, "batch_size": 30, "validation_split": 0.0, "dropout": 0.0, "quiet": True}
    flags |= {"model": str(folder), "output": str(tmp_path / "run"), "device": "cpu"}
    minibert.finetune(texts, names, class_weights=choice, label_smoothing=smoothing, problem_type=kind, **flags)
    logged = json.loads((tmp_path / "run" / "train_log.jsonl").read_text().splitlines()[0])["loss"]
    logits = torch.from_numpy(minibert.load(folder, "cpu").logits(texts))
    given = None if weights is None else torch.from_numpy(weights)
    assert logged == pytest.approx(float(torchs_loss(kind, logits, torch.from_numpy(targets), given, smoothing)), 1e-5)


def balanced(kind: str, targets: np.ndarray) -> np.ndarray:
    """By the formulas of the README: scikit-learn's, or negatives over positives."""
    if kind == SINGLE:
        return (len(targets) / (3 * np.bincount(targets))).astype(np.float32)
    positive = targets.sum(0)
    return ((len(targets) - positive) / positive).astype(np.float32)
