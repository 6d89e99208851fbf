"""Kernels in CUDA graphs, compiled for GPUs that are not here, and where Triton is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import random, rng_on
from torch import Tensor

from minibert_kernels import (
    layer_norm,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.gpu
def test_a_graph_draws_new_masks_when_the_step_counts_up() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = rng_on("cuda")
    x, residual = (random((800, 768), torch.bfloat16, "cuda", i).requires_grad_() for i in range(2))
    weight, bias, upstream = (random(shape, torch.bfloat16, "cuda", 3) for shape in ((768,), (768,), (800, 768)))

    def both() -> tuple[Tensor, ...]:
        out = layer_norm.dropout_add_layer_norm(x, residual, weight, bias, 1e-12, p=0.1, rng=rng, site=2)
        return (out.detach(), *torch.autograd.grad(out, (x, residual), upstream))

    both()  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = both()
    before = []
    for _ in range(2):
        rng[1] += 1
        graph.replay()
        before.append([tensor.clone() for tensor in recorded])
        assert all(torch.equal(ours, eager) for ours, eager in zip(recorded, both(), strict=True))
    assert all(not torch.equal(one, other) for one, other in zip(*before, strict=True))


@pytest.mark.benchmarks
def test_kernels_compile_for_hopper_without_spilling() -> None:
    """With the ptxas of Triton's wheel: what no step of test_launches.py has, such as attention of every kind."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_kernels.py"), "--arch", "90"]
    command += ["--only", "fp32 grad|add_partials [13]|head .* 128|attention .*(64 x|128 x 32|long)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 17
    stacks = {name: int(stack) for name, _, _, stack, _ in rows}
    assert not {name: stack for name, stack in stacks.items() if stack > 0}


def test_modules_import_and_work_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from minibert_kernels import adamw, attention, embedding, first_token, gelu, layer_norm
assert not layer_norm.use_triton(torch.ones(1))
x, weight, rng = torch.randn(4, 8), torch.ones(8), torch.tensor([1, 2])
out = layer_norm.dropout_add_layer_norm(gelu.bias_gelu(x, weight), x, weight, weight, 1e-12, p=0.1, rng=rng)
assert out.shape == x.shape and out.isfinite().all()
qkv = torch.randn(4, 3, 2, 16)
assert attention.varlen_attention(qkv, torch.tensor([0, 1, 4]), 3, p=0.1, rng=rng).shape == (4, 2, 16)
ids = torch.arange(4)
assert embedding.embedding_layer_norm(ids, ids, None, x, x, x, weight, weight, 1e-12).shape == x.shape
layout = adamw.FlatLayout.of([torch.Size([3])], [0], [(1.0, 0.0)])
buffers = [layout.buffer() for _ in range(3)]
grad = layout.buffer() + 1
control = adamw.prepare_update_(grad, torch.zeros(()))
adamw.adamw_(*buffers, grad, None, layout, torch.tensor(0.5), control)
assert torch.allclose(buffers[0], torch.tensor(-0.5))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
