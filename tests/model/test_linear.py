"""Products of linear layers by oneDNN: the same numbers, forward and backward, within fp32's rounding."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainings
from torch import Tensor, nn

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model import linear as linear_module
from minibert.model.linear import Linear
from minibert.runtime import device, processor
from minibert.runtime.device import Hardware

needs_onednn = pytest.mark.skipif(not processor.has_onednn_product(), reason="this torch has no oneDNN product")


def passes(layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of input, weight and bias."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [out.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@needs_onednn
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_onednn_is_as_exact_as_torch(rows: int) -> None:
    torch.manual_seed(0)
    layer, x, grad = Linear(96, 160), torch.randn(rows, 96), torch.randn(rows, 160)
    plain = passes(layer, x, grad)
    with processor.products_by_onednn(True):
        ours = passes(layer, x, grad)
        part = layer.rows(x, slice(32, 96))
    exact = passes(layer.double(), x.double(), grad.double())
    for mine, theirs, reference in zip(ours, plain, exact, strict=True):
        error, allowed = ((t.double() - reference).norm() / reference.norm() for t in (mine, theirs))
        assert float(error) <= 2 * float(allowed) + 1e-7
    assert torch.allclose(part, ours[0][:, 32:96], atol=1e-5)


@needs_onednn
def test_only_fp32_products_of_this_thread_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is not made for stays with torch: other types, no rows, other threads, what comes after."""
    calls: list[Tensor] = []
    original = linear_module._product
    monkeypatch.setattr(linear_module, "_product", lambda x, *rest: (calls.append(x), original(x, *rest))[1])
    layer = Linear(8, 4)
    with processor.products_by_onednn(True):
        layer(torch.randn(3, 8))
        assert len(calls) == 1
        assert layer(torch.randn(0, 8)).shape == (0, 4)
        layer.double()(torch.randn(3, 8).double())
        layer.float()
        thread = threading.Thread(target=layer, args=(torch.randn(3, 8),))
        thread.start()
        thread.join()
    layer(torch.randn(3, 8))
    assert len(calls) == 1


def losses_of(model: Path, folder: Path, hardware: Hardware, **flags: Any) -> list[float]:
    """The loss of each step of a whole training."""
    folder.mkdir()
    job = trainings.training(model, hardware=hardware, epochs=4.0, **flags)
    job.run(folder / "log.jsonl", lambda: None)
    assert all(parameter.dtype == torch.float32 for parameter in job.model.parameters())
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@needs_onednn
def test_training_by_onednn_follows_training_by_torch(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    original = linear_module._product

    def counted(*given: Tensor) -> Tensor:
        calls[0] += 1
        return original(*given)

    monkeypatch.setattr(linear_module, "_product", counted)
    model = tiny()
    plain = losses_of(model, tmp_path / "torch", trainings.EAGER)
    assert calls[0] == 0
    ours = losses_of(model, tmp_path / "onednn", replace(trainings.EAGER, onednn=True))
    assert calls[0] > len(ours) * 3 * 3  # products of every layer, forward and backward
    assert ours == pytest.approx(plain, rel=1e-4)


def test_onednn_is_for_x86_with_avx512_that_is_not_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_onednn_product", lambda: True)
    for capability, vendor, machine, expected in (
        ("AVX512", "AuthenticAMD", "x86_64", True),
        ("AVX512", "GenuineIntel", "x86_64", False),
        ("AVX2", "AuthenticAMD", "x86_64", False),
        ("DEFAULT", "", "aarch64", False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(processor, "_cpuinfo", lambda name, v=vendor: v)
        monkeypatch.setattr(processor.platform, "machine", lambda m=machine: m)
        assert processor.onednn_is_faster() is expected


def test_flags_of_products_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-onednn, and bf16 only where the processor has it."""
    monkeypatch.setattr(device, "onednn_is_faster", lambda: True)
    assert device.choose(RunConfig(device="cpu")).onednn
    assert not device.choose(RunConfig(device="cpu", onednn=False)).onednn
    monkeypatch.setattr(device, "has_bf16", lambda: False)
    with pytest.raises(UserError, match="--precision bf16: this processor has no bf16 arithmetic"):
        device.choose(RunConfig(device="cpu", precision="bf16"))
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    chosen = device.choose(RunConfig(device="cpu", precision="bf16"))
    assert chosen.precision == "bf16" and not chosen.onednn
    with pytest.raises(UserError, match="--precision fp16: a CPU computes in fp32 or bf16"):
        device.choose(RunConfig(device="cpu", precision="fp16"))


def test_steps_in_bf16_keep_fp32_weights_and_follow_fp32(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, half = tiny(), replace(trainings.EAGER, precision="bf16")
    plain = losses_of(model, tmp_path / "fp32", trainings.EAGER)
    ours = losses_of(model, tmp_path / "bf16", half)
    assert ours != plain
    assert ours == pytest.approx(plain, rel=0.1, abs=0.05)
    assert ours[-1] < 0.95 * ours[0]  # it learns
