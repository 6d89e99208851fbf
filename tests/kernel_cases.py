"""Every Triton kernel against the plain torch that defines it: the rule, and what the tests of all kernels share.

Without a GPU the kernels run in Triton's interpreter (fp32 and fp16: its bf16 is not the GPU's). With one,
`pytest -m gpu` runs the same cases on it, bf16 too. The rule: against the reference in fp64, a kernel's error is at
most twice that of the reference in the kernel's dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if os.environ.get("CI") != "true":  # which installs it
    pytest.importorskip("triton")


def large(*sizes: object) -> object:
    """A case of BERT's own sizes: on a GPU alone, where a program then takes several tiles."""
    return pytest.param(*sizes, marks=pytest.mark.gpu)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    """Numbers that do not depend on the device, representable in `dtype`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device, dtype)


def assert_close(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The rule of the module docstring."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype, name
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    allowed += torch.finfo(plain.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def outputs_of(function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The function's output for tensors in `dtype`, and the gradients of the tensors."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    out = function(**leaves)
    out.backward(random(tuple(out.shape), torch.bfloat16, str(out.device), 99).to(dtype))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def compare(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    """The rule of the module docstring for the output and every gradient; equal bits when run again."""
    dtype = next(iter(tensors.values())).dtype
    ours, plain = outputs_of(kernel, tensors, dtype), outputs_of(reference, tensors, dtype)
    exact = outputs_of(reference, tensors, torch.float64)
    for name in ours:
        assert_close(name, ours[name], plain[name], exact[name])
    if ours["out"].is_cuda:
        again = outputs_of(kernel, tensors, dtype)
        assert all(torch.equal(ours[name], again[name]) for name in ours)


def rng_on(device: str, seed: int = -1234567890123456789, step: int = 5_000_000_123) -> Tensor:
    return torch.tensor([seed, step], device=device)
