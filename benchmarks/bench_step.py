"""pytest-benchmark: one training step of each trainer, and our operations beside torch's.

`pytest benchmarks/bench_step.py -n 0 --benchmark-enable`. The side-by-side ratios of README.md come from steps.py,
which interleaves the trainers; this file is for looking at one of them while changing it.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trainers import BATCH, TRAINERS, sms_spam

from minibert.model import attention, dropout
from minibert.model.packing import Packing


@pytest.fixture(autouse=True)
def environment(benchmark: Any) -> None:
    torch.manual_seed(0)
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_step(benchmark: Any, trainer: str) -> None:
    benchmark.group = "training step"
    everything = sms_spam()
    data = everything.take(np.random.default_rng(0).permutation(len(everything.texts))[: 8 * BATCH])
    steps = cycle(list(TRAINERS[trainer](data)))
    benchmark.pedantic(lambda: next(steps)(), rounds=8, warmup_rounds=1)


@pytest.mark.parametrize("kind", ["torch", "minibert"])
def test_dropout(benchmark: Any, kind: str) -> None:
    benchmark.group = "dropout of [800, 384]"
    x = torch.randn(800, 384)
    masks = dropout.DropoutMasks(0, 0)
    benchmark((lambda: F.dropout(x, 0.1)) if kind == "torch" else (lambda: dropout.dropout(x, 0.1, masks)))


@pytest.mark.parametrize("kind", ["torch", "minibert"])
@pytest.mark.parametrize("lengths", [[25] * 32, list(range(20, 52)), [100] * 8], ids=["equal", "spread", "long"])
def test_attention_with_dropout(benchmark: Any, kind: str, lengths: list[int]) -> None:
    """Forward and backward; torch has no fused attention with dropout on a CPU and takes its plain path."""
    benchmark.group = f"attention with dropout, {lengths[0]} to {lengths[-1]} tokens"
    qkv = torch.randn(sum(lengths), 3 * 384, requires_grad=True)
    packing = Packing.from_lengths(lengths)
    grad = torch.randn(sum(lengths), 384)
    masks = dropout.DropoutMasks(0, 0)

    def with_torch() -> None:
        parts = [attention._fused_attention(qkv[c.rows], c, 12, 0.1) for c in packing.chunks]
        torch.cat(parts).backward(grad)

    def with_minibert() -> None:
        attention.self_attention(qkv, packing, 12, 0.1, masks).backward(grad)

    benchmark(with_torch if kind == "torch" else with_minibert)
