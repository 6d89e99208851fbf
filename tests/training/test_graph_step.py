"""What steps of fixed shapes do for a graph: the update under the next forward pass, one copy, the self-check."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import CPU, SIZES, made_targets, made_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minibert.batching.dataset import Dataset, collate
from minibert.batching.tokenizer import Tokenizer
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import MULTI, SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training.graph_step import Bucket, FixedSteps, StaticBatch, pad_to_bucket
from minibert.training.loop import Training
from minibert.training.resume import host_tensors
from minibert.training.staging import StaticBuffers
from minibert_kernels import backend, head

FIXED = Hardware(CPU, "fp32", "sdpa", "fixed")


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRET", False)


def training_of(folder: Path, hardware: Hardware, kind: str = SINGLE, **flags: Any) -> Training:
    torch.manual_seed(0)
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=SIZES[kind], dropout=0)
    data = Dataset(made_tokens(41), made_targets(kind, 41))
    flags = {"batch_size": 8, "learning_rate": 1e-3, "epochs": 2, "quiet": True, "engine": "graph", **flags}
    problem = Problem(kind, [str(i) for i in range(SIZES[kind])])
    return Training(model, problem, {"train": data}, RunConfig(**flags), hardware)


def steps_of(training: Training) -> list[Any]:
    """More than an epoch."""
    return training.steps_of_epoch(0) + training.steps_of_epoch(1)


def state(training: Training) -> dict[str, torch.Tensor]:
    """Parameters and moments behind the last step."""
    return {name: tensor.clone() for name, tensor in host_tensors(training).items()}


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


# -- the update under the next forward pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_under_the_next_forward_pass_gives_the_same_bits(
    tiny: Callable[..., Path], precision: str, accumulation: int
) -> None:
    """Each part as late as it may be, against all at once at the end of the step; two of the steps are skipped."""
    folder, found = tiny("BertModel"), []
    for at_once in (False, True):
        hardware = Hardware(CPU, precision, "sdpa", "fixed")
        training = training_of(folder, hardware, gradient_accumulation_steps=accumulation, layer_lr_decay=0.9)
        optimizer = training.optimizer
        for number, step in enumerate(steps_of(training)):
            if number in (2, 5):
                step.denominator = 1e-42  # its gradients overflow
            training.step(step)
            assert training.body.fixed.update.due
            if at_once:
                optimizer.flush()
                assert not training.body.fixed.update.due
        found.append(state(training))
        assert optimizer.skipped >= 2
    assert_equal_bits(*found)


def test_parts_of_the_update_wait_for_the_layers_that_read_them(tiny: Callable[..., Path]) -> None:
    training = training_of(tiny("BertModel"), FIXED)
    optimizer, update, seen = training.optimizer, training.body.fixed.update, []
    first, second, *_ = steps_of(training)
    training.step(first)
    do_part, reach = update.update_part, training.body.fixed.compute_model.encoder.before_layer
    update.update_part = lambda part: (seen.append(("update", optimizer.parts[part][0])), do_part(part))
    training.body.fixed.compute_model.encoder.before_layer = lambda layer: (reach(layer), seen.append(("read", layer)))
    training.step(second)
    assert seen == [(what, layer) for layer in (-1, 0, 1, 2) for what in ("update", "read")]
    covered = [slice_ for _, *slice_ in optimizer.parts]
    assert covered[0][0] == 0 and covered[-1][1] == optimizer.layout.total
    assert all(before[1] == after[0] for before, after in pairwise(covered))


def test_a_run_goes_on_from_a_checkpoint_with_equal_bits(tiny: Callable[..., Path]) -> None:
    """A checkpoint is written while an update is due; reading it carries the update out."""
    folder = tiny("BertModel")
    whole, begun, resumed = (training_of(folder, FIXED) for _ in range(3))
    steps = steps_of(whole)
    for step in steps:
        whole.step(step)
    for step in steps[:4]:
        begun.step(step)
    resumed.restore(resumed.state, state(begun))
    resumed.state = begun.state
    for step in steps[4:]:
        resumed.step(step)
    assert_equal_bits(state(resumed), state(whole))


def test_evaluation_sees_the_parameters_behind_the_last_step(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The best weights that a run keeps are those of the step it names."""
    folder, runs = tiny("BertModel"), []
    for hardware in (FIXED, Hardware(CPU, "fp32", "sdpa", "eager")):
        training = training_of(folder, hardware, engine="auto", eval_steps=3, metric="loss")
        training.data["validation"] = Dataset(made_tokens(20, seed=1), made_targets(SINGLE, 20))
        log = tmp_path / f"{hardware.engine}.jsonl"
        training.run(log, lambda: None)
        runs.append(([json.loads(line) for line in log.read_text().splitlines()], training))
    losses = [[line["validation_loss"] for line in lines if "validation_loss" in line] for lines, _ in runs]
    assert len(losses[0]) > 2
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert runs[0][1].state.best_step == runs[1][1].state.best_step


def test_a_step_tried_again_keeps_the_update_of_the_step_before(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the middle of a forward pass, when some parts of the update are done and some are not."""
    folder = tiny("BertModel")
    expected, training = training_of(folder, FIXED), training_of(folder, FIXED)
    steps = steps_of(expected)[:4]
    for step in steps:
        expected.step(step)
    for step in steps[:3]:
        training.step(step)
    reach = training.body.fixed.update.wait_for

    def fails_once(layer: int) -> None:
        reach(layer)
        if layer == 1 and not training.state.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    training.body.fixed.compute_model.encoder.before_layer = fails_once
    training.step(steps[3])
    assert training.state.most_tokens > 0
    one, other = state(expected), state(training)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


# -- one copy a batch -------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts the copies to other tensors that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in str(function):
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_a_batch_goes_to_the_device_in_one_copy(attention: str) -> None:
    rows, bucket = np.arange(9), Bucket.of(made_tokens(9).lengths)
    one, other = (
        StaticBatch(*pad_to_bucket(collate(made_tokens(9, seed), rows), torch.arange(9) + seed, bucket, attention))
        for seed in (0, 0)
    )
    other.targets = other.targets + 1
    place = one.on(CPU)
    with Copies() as copies:
        place.copy_from(other)
    assert copies.found == {"aten.copy_.default": 1}
    found, expected = place.tensors(), other.tensors()
    assert len(found) == (10 if attention == "sdpa" else 7) - 1
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in found)


def test_a_host_block_is_not_written_to_while_it_is_copied() -> None:
    buffers, calls = StaticBuffers([torch.zeros(3)], CPU), []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            calls.append(("wait", self.number, float(buffers.host_arrays[self.number][0][0])))

        def record(self) -> None:
            calls.append(("copied", self.number, float(buffers.tensors[0][0])))

    buffers.copied = [Event(0), Event(1)]
    for value in (1.0, 2.0, 3.0):
        buffers.copy_from([torch.full((3,), value)])
    assert [call[:2] for call in calls] == [(what, block) for block in (1, 0, 1) for what in ("wait", "copied")]
    assert calls[4] == ("wait", 1, 1.0)  # nothing new stands in the block yet
    assert [call[2] for call in calls if call[0] == "copied"] == [1.0, 2.0, 3.0]


# -- the self-check of a model that is sure of its answers ------------------------------------------------------------

TEXTS = [
    *("free prize, call now", "are you home", "win cash, reply stop to end", "see you at lunch"),
    *("urgent: claim your reward today", "ok lar, joking", "txt win to 80086 to enter", "i'll be late, sorry"),
]


def trained_until_sure(folder: Path, logit: float) -> tuple[BertForSequenceClassification, Dataset]:
    """MiniLM, trained on a few messages, its head then scaled until logits are this large."""
    torch.manual_seed(0)
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=2, dropout=0)
    tokens = Tokenizer.from_folder(folder).encode(TEXTS, None, 64)
    data = Dataset(tokens, np.tile([1, 0], len(TEXTS) // 2))
    config = RunConfig(batch_size=8, learning_rate=5e-4, epochs=6, warmup_ratio=0, schedule="constant", quiet=True)
    training = Training(
        model, Problem(SINGLE, ["ham", "spam"]), {"train": data}, config, replace(FIXED, engine="eager")
    )
    for step in training.steps_of_epoch(0) * 6:
        loss, _ = training.step(step)
    assert loss < 0.1
    with torch.no_grad():
        scale = logit / model.logits(data.batch(np.arange(8))).abs().mean()
        model.classifier.out.weight *= scale
        model.classifier.out.bias *= scale
    return model, data


@pytest.mark.slow
def test_a_model_that_is_sure_of_its_answers_passes_the_self_check(minilm: Path) -> None:
    """With logits of 120 the loss has no gradient at all, with logits of 12 one of mostly rounding."""
    model, data = trained_until_sure(minilm, 12.0)
    hardware, rows = Hardware(CPU, "bf16", "triton", "fixed", kernels=True), np.arange(4)
    problem = Problem(SINGLE, ["ham", "spam"])
    for _ in range(2):
        steps = FixedSteps(model, problem, RunConfig(), hardware, 10, None)
        assert steps.self_check(data.batch(rows), torch.from_numpy(data.targets[rows])) is None
        with torch.no_grad():
            model.classifier.out.weight *= 10


@pytest.mark.slow
def test_labels_that_are_nearly_even_pass_the_self_check(minilm: Path) -> None:
    """Which answers the model believes least hangs on rounding, and ours is not plain torch's."""
    labels, rows = [f"label {number}" for number in range(28)], np.arange(len(TEXTS))
    model, _ = load_model(minilm, BertForSequenceClassification, num_labels=len(labels), dropout=0)
    tokens = Tokenizer.from_folder(minilm).encode(TEXTS, None, 64)
    targets = np.zeros((len(rows), len(labels)), np.float32)
    data, hardware = Dataset(tokens, targets), Hardware(CPU, "bf16", "triton", "fixed", kernels=True)
    for seed in range(3):
        weight = torch.randn(model.classifier.out.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model.classifier.out.weight.copy_(0.002 * weight)
            model.classifier.out.bias.zero_()
        steps = FixedSteps(model, Problem(MULTI, labels), RunConfig(), hardware, 10, None)
        assert steps.self_check(data.batch(rows), torch.from_numpy(targets)) is None


def test_a_wrong_value_of_the_loss_is_found(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient does not show it."""
    right = head.head_loss

    def shifted(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        loss, logits = right(*tensors, **options)
        return loss + 0.2 * loss.detach(), logits

    monkeypatch.setattr(head, "head_loss", shifted)
    with pytest.raises(UserError, match="its loss is 20% away from plain torch's; use eager"):
        training_of(tiny("BertModel"), replace(FIXED, kernels=True))
