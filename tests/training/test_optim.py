"""Optimiser, schedule, groups and freezing against torch and transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.training.flat_adamw import FlatOptimizer
from minibert.training.optimizer import Optimizer, freeze, learning_rate_factor, parameter_groups


@pytest.fixture
def model(tiny: Callable[..., Path]) -> BertForSequenceClassification:
    return load_model(tiny("BertForSequenceClassification", num_labels=2), BertForSequenceClassification)[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_schedule_equals_transformers(schedule: str, total: int) -> None:
    config = RunConfig(schedule=schedule, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    warmup = -(-total // 10)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate_factor(step, total, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["small gradients", "clipped gradients"])
@pytest.mark.parametrize("scale_loss", [False, True], ids=["fp32", "loss scaling"])
def test_step_equals_clipping_and_adamw(model: BertForSequenceClassification, scale: float, scale_loss: bool) -> None:
    config = RunConfig(learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.0, schedule="constant")
    twin = torch.nn.ParameterList(p.detach().clone() for p in model.parameters())
    decayed = [p for p in twin if p.ndim > 1]
    plain = [p for p in twin if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
    optimizer = Optimizer(model, config, 10, scale_loss=scale_loss)
    factor = float(optimizer.loss_scale) if optimizer.loss_scale is not None else 1.0
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for ours, theirs in zip(model.parameters(), twin, strict=True):
            gradient = torch.randn(ours.shape, generator=generator) * scale / 100
            ours.grad, theirs.grad = gradient * factor, gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        norm = optimizer.step(step)
        reference.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_bad_gradients_changes_nothing_and_is_counted(
    model: BertForSequenceClassification, bad: float
) -> None:
    optimizer = Optimizer(model, RunConfig(warmup_ratio=0.0), 10)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.classifier.out.bias.grad = torch.full_like(model.classifier.out.bias, bad)
    optimizer.step(0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert int(optimizer.skipped) == 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_loss_scale_halves_on_overflow(model: BertForSequenceClassification) -> None:
    optimizer = Optimizer(model, RunConfig(), 10, scale_loss=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step(0)
    assert optimizer.loss_scale is not None and float(optimizer.loss_scale) == 32768


def test_biases_and_norms_do_not_decay(model: BertForSequenceClassification) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, RunConfig(weight_decay=0.1)):
        for parameter in group["params"]:  # type: ignore[attr-defined]
            name = names[id(parameter)]
            assert (group["weight_decay"] == 0) == (name.endswith("bias") or "norm" in name), name


def test_layer_decay_and_head_rate(model: BertForSequenceClassification) -> None:
    config = RunConfig(learning_rate=1.0, layer_lr_decay=0.5, head_learning_rate=7.0)
    rates = {id(p): g["lr"] for g in parameter_groups(model, config) for p in g["params"]}  # type: ignore[attr-defined]
    expected = {
        "classifier.out.weight": 7.0,
        "pooler.dense.weight": 1.0,
        "encoder.layers.2.qkv.weight": 1.0,
        "encoder.layers.0.qkv.weight": 0.25,
        "encoder.embeddings.norm.bias": 0.125,
    }
    for name, rate in expected.items():
        assert rates[id(model.get_parameter(name))] == rate, name


def test_the_head_alone_learns_faster_unless_a_rate_is_given(model: BertForSequenceClassification) -> None:
    def rates(**flags: Any) -> set[object]:
        return {group["lr"] for group in parameter_groups(model, RunConfig(freeze="all", **flags))}

    freeze(model, "all", ["pooler.dense.weight", "pooler.dense.bias"])
    assert rates() == {1e-3} and rates(learning_rate=3e-4) == {3e-4}
    assert rates(head_learning_rate=0.1) == rates(learning_rate=1, head_learning_rate=0.1) == {0.1}


def test_the_log_has_the_rate_of_the_head_where_it_alone_trains(model: BertForSequenceClassification) -> None:
    config = RunConfig(freeze="all", learning_rate=5e-5, head_learning_rate=1e-2, warmup_ratio=0, schedule="constant")
    freeze(model, "all", [])
    flat = FlatOptimizer(model, copy.deepcopy(model), config, 10, torch.float32)
    flat.schedule(0)
    optimizer = Optimizer(model, config, 10)
    model(torch.arange(5, 15)[None]).logits.sum().backward()
    optimizer.step(0)
    assert optimizer.learning_rate == flat.learning_rate == 1e-2


def test_the_log_has_the_peak_rate_whatever_the_deepest_layer_has(model: BertForSequenceClassification) -> None:
    config = RunConfig(learning_rate=1e-3, layer_lr_decay=0.5, warmup_ratio=0, schedule="constant")
    optimizer = Optimizer(model, config, 10)
    model(torch.arange(5, 15)[None]).logits.sum().backward()
    optimizer.step(0)
    assert optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(("choice", "layers"), [("none", -1), ("embeddings", 0), ("2", 2), ("all", 3)])
def test_freeze(model: BertForSequenceClassification, choice: str, layers: int) -> None:
    assert freeze(model, choice, []) == layers
    assert model.encoder.embeddings.norm.weight.requires_grad == (layers < 0)
    assert [layer.qkv.weight.requires_grad for layer in model.encoder.layers] == [i >= layers for i in range(3)]
    assert model.pooler.dense.weight.requires_grad == (choice != "all")
    assert model.classifier.out.weight.requires_grad


def test_a_new_pooler_trains_even_with_all_frozen(model: BertForSequenceClassification) -> None:
    freeze(model, "all", ["pooler.dense.weight", "pooler.dense.bias"])
    assert model.pooler.dense.weight.requires_grad


def test_freezing_more_layers_than_there_are_is_an_error(model: BertForSequenceClassification) -> None:
    with pytest.raises(UserError, match="the model has 3 layers"):
        freeze(model, "4", [])


@pytest.mark.parametrize("scale_loss", [False, True], ids=["fp32", "loss scaling"])
def test_a_loss_that_is_not_finite_changes_nothing(model: BertForSequenceClassification, scale_loss: bool) -> None:
    """Even where its gradients are; and no loss scale is at fault."""
    optimizer = Optimizer(model, RunConfig(warmup_ratio=0.0), 10, scale_loss=scale_loss)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0, torch.tensor(torch.nan))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert int(optimizer.skipped) == 1 and bool(optimizer.bad)
