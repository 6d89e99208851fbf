"""Flags of training that change how a step is computed, or when something is saved, and not what is learned."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import CPU, EAGER, FIXED, dataset, training

from minibert.model.bert import BertForSequenceClassification, Layer
from minibert.model.dropout import DropoutMasks
from minibert.problem.problem import SINGLE
from minibert.runtime import distributed
from minibert.runtime.device import Hardware
from minibert.training import loop as train
from minibert.training.loop import Training
from minibert.training.plan import PlannedStep

pytestmark = pytest.mark.usefixtures("references_of_kernels")
KERNELS = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)


def test_batch_tokens_is_the_budget_of_each_batch(tiny: Callable[..., Path]) -> None:
    job = training(tiny(), data={"train": dataset(count=200)}, batch_size=4, batch_tokens=160)
    sizes = [step.tokens for step in job.steps_of_epoch(0)]
    assert max(sizes) <= 160 and np.mean(sizes[:-1]) > 120


def test_length_buckets_put_texts_of_like_length_together(tiny: Callable[..., Path]) -> None:
    folder, data = tiny(), {"train": dataset(count=400)}
    spreads = {}
    for buckets in (False, True):
        job = training(folder, data=data, length_buckets=buckets)
        lengths = [data["train"].lengths[rows] for step in job.steps_of_epoch(0) for rows in step.batches]
        spreads[buckets] = np.mean([each.max() - each.min() for each in lengths])
    assert spreads[True] < 5 < 15 < spreads[False]


def test_the_last_layer_computes_the_cls_rows_only(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every other layer all rows, once a step."""
    calls: Counter[Layer] = Counter()
    forward = Layer.forward

    def counted(self: Layer, *given: Any) -> Tensor:
        calls[self] += 1
        return forward(self, *given)

    monkeypatch.setattr(Layer, "forward", counted)
    job = training(tiny())
    job.step(job.steps_of_epoch(0)[0])
    assert [calls[layer] for layer in job.model.encoder.layers] == [1, 1, 0]


def logged_saves(job: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """The steps after which a checkpoint is written, where each step takes so long by the clock."""
    saved: list[int] = []
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: job.state.step * seconds)
    monkeypatch.setattr(train, "time", clock)
    job.run(tmp_path / "train_log.jsonl", lambda: saved.append(job.state.step))
    return saved


def test_a_checkpoint_comes_with_an_evaluation_once_a_minute(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": dataset(), "validation": dataset(count=8, seed=1)}
    job = training(tiny(), data=data, max_steps=25, eval_steps=5)
    assert logged_saves(job, tmp_path, monkeypatch, seconds=7) == [10, 20, 25]  # evaluated every 35 s


def test_a_checkpoint_comes_every_quarter_of_an_hour_without_evaluation(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training(tiny(), max_steps=25)
    assert logged_saves(job, tmp_path, monkeypatch, seconds=91) == [10, 20, 25]


@pytest.mark.parametrize("hardware", [EAGER, FIXED, KERNELS], ids=["eager", "fixed", "kernels"])
def test_micro_batches_of_a_step_drop_different_elements(tiny: Callable[..., Path], hardware: Hardware) -> None:
    """The same rows twice: without dropout the mean loss is that of one pass, with it another."""
    rows = np.arange(8)
    folder = tiny(classifier_dropout=0.0)

    def loss(batches: list[np.ndarray], dropout: float) -> float:
        torch.manual_seed(0)
        step = PlannedStep(batches, 8.0 * len(batches), 0, 0)
        return float(training(folder, SINGLE, hardware, dropout=dropout, warmup_ratio=0.0).step(step)[0])

    assert loss([rows, rows], 0.0) == pytest.approx(loss([rows], 0.0), rel=1e-5)
    assert loss([rows, rows], 0.5) != pytest.approx(loss([rows], 0.5), rel=1e-4)


def test_each_process_draws_its_own_masks(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that three processes share; the first draws what a single one would."""
    drawn: dict[int, DropoutMasks] = {}
    logits = BertForSequenceClassification.logits

    def noted(self: BertForSequenceClassification, x: Any, masks: DropoutMasks) -> Tensor:
        drawn[distributed.rank()] = masks
        return logits(self, x, masks)

    monkeypatch.setattr(BertForSequenceClassification, "logits", noted)
    folder = tiny()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        job = training(folder, dropout=0.5, seed=7)
        job.step(job.steps_of_epoch(0)[0])
    masks = [drawn[rank].draw([1000], 0.5, torch.empty(()))[0] for rank in range(3)]
    assert torch.equal(masks[0], DropoutMasks(7, 0, draws=drawn[0].draws - 1).draw([1000], 0.5, torch.empty(()))[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < float((masks[a] == masks[b]).float().mean()) < 0.6


@pytest.mark.parametrize("engine", ["eager", "fixed"])
def test_fp16_scales_the_loss_and_not_the_norm(tiny: Callable[..., Path], engine: str) -> None:
    """Gradients that fp16 cannot hold are there all the same, and what is shown of them is without the scale."""
    folder = tiny()
    whole = training(folder)
    half = training(folder, hardware=Hardware(CPU, "fp16", "sdpa", engine))
    assert half.optimizer.loss_scale is not None and float(half.optimizer.loss_scale) == 65536
    (_, expected), (_, norm) = (job.step(job.steps_of_epoch(0)[0]) for job in (whole, half))
    assert float(norm) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_copy_that_computes_follows_the_weights(tiny: Callable[..., Path], precision: str) -> None:
    """A step writes both; else the loss would never fall."""
    job = training(tiny(), hardware=replace(FIXED, precision=precision), epochs=12, learning_rate=5e-3)
    assert job.body.fixed_shapes
    before = {name: value.clone() for name, value in job.body.fixed.compute_model.named_parameters()}
    losses = [float(job.step(step)[0]) for step in job.remaining_steps()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    for name, value in job.body.fixed.compute_model.named_parameters():
        assert torch.equal(value, job.model.get_parameter(name).to(value.dtype)), name
        assert "qkv.bias" in name or not torch.equal(value, before[name]), name
