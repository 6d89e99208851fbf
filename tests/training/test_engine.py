"""Steps of fixed shapes train as plain steps do. Here on the CPU; `pytest -m gpu` adds graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import assert_same_training, curve, made_tokens
from torch.nn import functional as F

from minibert.batching.dataset import collate
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.model.dropout import DropoutMasks
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training import resume
from minibert.training.deferred import DeferredUpdate
from minibert.training.flat_adamw import FlatOptimizer
from minibert.training.graph_step import Bucket, FixedSteps, pad_to_bucket
from minibert_kernels import backend, gelu

pytestmark = pytest.mark.usefixtures("references_of_kernels")
CPU = torch.device("cpu")


@pytest.mark.parametrize("total", [1, 63, 64, 65, 800, 4097])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_a_bucket_holds_the_batch_and_what_fills_it_up(total: int, count: int) -> None:
    lengths = np.full(count, max(1, total // count))
    bucket = Bucket.of(lengths)
    tail = bucket.tokens - lengths.sum()
    assert 0 <= tail <= max(64, lengths.sum() // 8)
    assert (bucket.texts - count) * bucket.longest >= tail
    assert bucket.longest >= lengths.max()


def test_few_buckets_serve_an_epoch() -> None:
    rng = np.random.default_rng(0)
    buckets = {Bucket.of(np.sort(rng.integers(5, 60, 32))) for _ in range(2000)}
    assert len(buckets) < 25


def test_what_fills_up_changes_no_logit(tiny: Callable[..., Path]) -> None:
    model, _ = load_model(tiny("BertForSequenceClassification"), BertForSequenceClassification, num_labels=2)
    model.eval()
    x = collate(made_tokens(9), np.arange(9))
    expected = model.logits(x)
    bucket = Bucket.of(made_tokens(9).lengths)
    filled, targets, keep = pad_to_bucket(x, torch.ones(9, dtype=torch.int64), bucket, "sdpa")
    assert len(filled.input_ids) == bucket.tokens
    assert len(targets) == len(keep) == bucket.texts
    torch.testing.assert_close(model.logits(filled)[keep > 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fixed_shapes_train_as_plain_steps(tiny: Callable[..., Path], kind: str, accumulation: int) -> None:
    folder = tiny("BertModel")
    plain = Hardware(CPU, "fp32", "sdpa", "eager")
    weights = None if kind == REGRESSION else np.array([0.5, 1.0, 2.0], dtype=np.float32)
    smoothing = 0.0 if kind == REGRESSION else 0.1
    flags = {"gradient_accumulation_steps": accumulation, "label_smoothing": smoothing, "layer_lr_decay": 0.9}
    expected = curve(folder, kind, plain, weights, **flags)
    assert_same_training(curve(folder, kind, replace(plain, engine="fixed"), weights, **flags), expected)


def test_the_kernels_way_trains_the_same(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    plain = Hardware(CPU, "fp32", "sdpa", "eager")
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    assert_same_training(curve(folder, SINGLE, kernels), curve(folder, SINGLE, plain))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_reads_what_the_step_before_left_of_the_gradients_of_matrices(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Before a step's first backward pass, all that the update does not clear is spoiled."""
    folder, construct, finish = tiny("BertModel"), FlatOptimizer.__init__, DeferredUpdate.finish
    optimizers: list[FlatOptimizer] = []
    spoiled: list[int] = []

    def constructed(optimizer: FlatOptimizer, *given: Any, **named: Any) -> None:
        construct(optimizer, *given, **named)
        optimizers.append(optimizer)

    def finished(update: DeferredUpdate) -> None:
        finish(update)
        if optimizers[-1].gradients.first:
            matrices = [v for v in optimizers[-1].layout.views(optimizers[-1].grad) if v.any()]
            spoiled.append(len(matrices))
            for matrix in matrices:
                matrix.fill_(torch.nan)

    flags = {"gradient_accumulation_steps": accumulation}
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"), **flags)
    monkeypatch.setattr(FlatOptimizer, "__init__", constructed)
    monkeypatch.setattr(DeferredUpdate, "finish", finished)
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    assert_same_training(curve(folder, SINGLE, kernels, **flags), expected)
    assert 3 * 4 + 2 in spoiled  # the layers' matrices, the pooler's and the classifier's


def test_the_kernels_dropout_is_drawn_anew_each_step_and_again_from_the_seed(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    first = curve(folder, SINGLE, kernels, dropout=0.3)
    assert_same_training(curve(folder, SINGLE, kernels, dropout=0.3), first, tolerance=0)
    assert not np.allclose(curve(folder, SINGLE, kernels, dropout=0.3, seed=43)[0], first[0])


@pytest.mark.interpreter
@pytest.mark.slow
def test_all_kernels_together_give_the_gradient_of_plain_torch(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel", hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=3, dropout=0.1)
    hardware = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    steps = FixedSteps(model, Problem(SINGLE, ["a", "b", "c"]), RunConfig(), hardware, 10, None)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert backend.use_triton(steps.rng)
    assert steps.self_check(collate(made_tokens(2), np.arange(2)), torch.tensor([0, 2])) is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_what_fills_batches_up_counts_as_padding(tiny: Callable[..., Path], attention: str) -> None:
    *_, training = curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", attention, "fixed"))
    lengths = [training.data["train"].lengths[rows] for step in training.steps_of_epoch(0) for rows in step.batches]
    buckets = [Bucket.of(each) for each in lengths]
    packed, total = sum(bucket.tokens for bucket in buckets), sum(each.sum() for each in lengths)
    slots = sum(bucket.texts * bucket.longest for bucket in buckets)
    inside, elsewhere = training.padding_fractions()
    assert elsewhere == pytest.approx(1 - total / packed) and elsewhere > 0
    assert inside == pytest.approx(1 - total / (slots if attention == "sdpa" else packed))


def test_no_two_tensors_of_a_checkpoint_share_memory(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The flat optimizer counts its steps once for all parameters; safetensors refuses such a pair."""
    *_, training = curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", "sdpa", "fixed"))
    before = {name: tensor.clone() for name, tensor in resume.host_tensors(training).items()}
    resume.save_checkpoint(tmp_path / "last", training, {})
    training.optimizer.reset()
    resume.load_checkpoint(tmp_path / "last", training, {})
    after = resume.host_tensors(training)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.startswith("step.") and tensor > 0 for name, tensor in after.items())


def test_half_precision_stays_close_to_fp32(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"))
    result = curve(folder, SINGLE, Hardware(CPU, "bf16", "sdpa", "fixed"))
    np.testing.assert_allclose(result[0][:, 0], expected[0][:, 0], atol=0.1)
    assert {p.dtype for p in result[2].model.parameters()} == {torch.float32}
    assert {p.dtype for p in result[2].body.fixed.compute_model.parameters()} == {torch.bfloat16}


def test_a_gradient_that_overflows_changes_nothing_and_lowers_the_scale(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    _, before, training = curve(folder, SINGLE, Hardware(CPU, "fp16", "sdpa", "fixed"))
    optimizer = training.body.fixed.optimizer
    skipped, scale = float(optimizer.skipped), float(optimizer.loss_scale)
    optimizer.grad.fill_(torch.inf)
    optimizer.end_step()
    optimizer.flush()
    assert float(optimizer.skipped) == skipped + 1
    assert float(optimizer.loss_scale) == scale / 2
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_masks_of_two_places_differ() -> None:
    masks = DropoutMasks(1, 0)
    like = torch.empty(())
    drawn = [masks.of_layer(layer).draw((64,), 0.5, like)[0] for layer in range(-1, 3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_that_works_is_kept(tiny: Callable[..., Path], precision: str) -> None:
    hardware = Hardware(CPU, precision, "triton" if precision == "fp32" else "sdpa", "fixed", kernels=True)
    training = curve(tiny("BertModel"), SINGLE, hardware, dropout=0.2)[2]
    assert training.body.fixed_shapes and training.hardware == hardware


def test_a_wrong_kernel_is_found_before_the_first_step(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` then trains without it, as if nothing had been; asked for by name it is an error."""
    folder, tanh = tiny("BertModel"), partial(F.gelu, approximate="tanh")
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"))
    monkeypatch.setattr(gelu, "bias_gelu", lambda x, bias: 1.2 * tanh(x + bias))
    hardware = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    result = curve(folder, SINGLE, hardware, engine="auto")
    assert_same_training(result, expected)
    assert (result[2].hardware.engine, result[2].hardware.attention) == ("eager", "sdpa")
    assert "away from plain torch's. Training is eager" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its gradient is .*% away from plain torch's; use eager"):
        curve(folder, SINGLE, hardware)


def test_an_engine_that_fails_is_a_fault_and_no_traceback(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such\ndriver")

    monkeypatch.setattr(gelu, "bias_gelu", fails)
    with pytest.raises(UserError, match="--engine fixed: RuntimeError: no such; use eager"):
        curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", "triton", "fixed", kernels=True))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash", "triton"])
@pytest.mark.parametrize("kernels", [False, True])
def test_graphs_train_as_eager_steps(tiny: Callable[..., Path], attention: str, kernels: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder = tiny("BertModel", hidden_size=64, num_attention_heads=2)
    gpu = torch.device("cuda")
    precision = "bf16" if attention == "flash" else "fp32"
    expected = curve(folder, SINGLE, Hardware(gpu, precision, attention, "fixed"))
    result = curve(folder, SINGLE, Hardware(gpu, precision, attention, "graph", kernels))
    np.testing.assert_allclose(result[0], expected[0], rtol=0.05 if precision == "bf16" else 1e-3)


@pytest.mark.gpu
def test_steps_that_capture_and_steps_that_replay_draw_the_masks_of_eager_ones(tiny: Callable[..., Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder, gpu = tiny("BertModel"), torch.device("cuda")
    expected = curve(folder, SINGLE, Hardware(gpu, "fp32", "sdpa", "fixed"), dropout=0.2)
    result = curve(folder, SINGLE, Hardware(gpu, "fp32", "sdpa", "graph"), dropout=0.2)
    np.testing.assert_allclose(result[0], expected[0], rtol=1e-3)
