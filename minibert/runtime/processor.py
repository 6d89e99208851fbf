"""What the processor can do: rules by its kind, never measurements, as a choice must not change from run to run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

_onednn: ContextVar[bool] = ContextVar("onednn", default=False)  # one a thread
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one on Arm


@cache
def flags() -> frozenset[str]:
    """The instruction sets that Linux names, of the first core; nothing elsewhere."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("features")).lower().split())


def _cpuinfo(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.lower().partition(":")[0].strip() == name), "")


def has_bf16() -> bool:
    """Whether products in bf16 are faster than in fp32: where the processor lacks them, they are emulated."""
    return bool(flags() & BF16_FLAGS)


def onednn_is_faster() -> bool:
    """Whether fp32 products are worth sending to oneDNN: on x86 with AVX-512 that is not Intel's, for whom MKL is made.

    Measured on an AMD EPYC with AVX-512: MKL 220 GFLOP/s on two cores, oneDNN 465. Without AVX-512 they are level.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    capable = x86 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return capable and _cpuinfo("vendor_id").strip() != "GenuineIntel" and has_onednn_product()


def has_onednn_product() -> bool:
    """Whether this torch has the private operator that `minibert.model.linear` calls; a test pins it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def products_by_onednn(wanted: bool) -> Iterator[None]:
    """Inside, and in this thread alone, `minibert.model.linear` sends fp32 products to oneDNN, or does not."""
    token = _onednn.set(wanted)
    try:
        yield
    finally:
        _onednn.reset(token)


def onednn_computes() -> bool:
    return _onednn.get()
