"""Each of our kernels beside what is usual in torch in its place, and what torch.compile makes of that.

A kernel that is no faster than torch.compile's has no place. That they are right is what `pytest -m gpu` checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.model.attention import flash_attention
from minibert_kernels import adamw, attention, embedding, gelu, layer_norm

from .clock import as_graph, milliseconds
from .workloads import Setting, bert_config

TOKENS = (800, 1 << 15)  # a small batch, and one that fills the device
TEXTS = ((32, 25), (256, 128), (64, 512))  # texts and their length, for attention
PARAMETERS = 109_482_240  # of BERT base
ROWS = 12_000  # of the compact vocabulary


@dataclass
class Kernel:
    """One of ours, what is usual in its place, and the inputs, all of which get a gradient."""

    ours: Callable[..., Tensor]
    usual: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    compiles: bool = True  # whether torch.compile can make something of the usual


def random(setting: Setting, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, device=setting.device).bfloat16() for name, shape in shapes.items()}


def dropout(setting: Setting) -> dict[str, Any]:
    return {"p": 0.1, "rng": torch.tensor([42, 7], device=setting.device), "site": 3}


def norm_kernel(setting: Setting, rows: int) -> Kernel:
    hidden = bert_config(setting, "base").hidden_size
    return Kernel(
        partial(layer_norm.dropout_add_layer_norm, eps=1e-12, **dropout(setting)),
        lambda x, residual, weight, bias: F.layer_norm(F.dropout(x, 0.1) + residual, weight.shape, weight, bias, 1e-12),
        random(setting, x=(rows, hidden), residual=(rows, hidden), weight=(hidden,), bias=(hidden,)),
    )


def gelu_kernel(setting: Setting, rows: int) -> Kernel:
    inner = bert_config(setting, "base").intermediate_size
    return Kernel(gelu.bias_gelu, lambda x, bias: F.gelu(x + bias), random(setting, x=(rows, inner), bias=(inner,)))


def embedding_kernel(setting: Setting, rows: int) -> Kernel:
    hidden = bert_config(setting, "base").hidden_size
    ids = (ROWS * torch.rand(rows, device=setting.device) ** 3).long()  # common words often, rare ones rarely
    places = torch.arange(rows, device=setting.device) % 25
    options = {"input_ids": ids, "position_ids": places, "token_type_ids": None, "eps": 1e-12, **dropout(setting)}

    def usual(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = F.embedding(ids, word) + F.embedding(places, position) + token_type[0]
        return F.dropout(F.layer_norm(total, weight.shape, weight, bias, 1e-12), 0.1)

    tables = random(setting, word=(ROWS, hidden), position=(512, hidden), token_type=(2, hidden))
    vectors = random(setting, weight=(hidden,), bias=(hidden,))
    return Kernel(partial(embedding.embedding_layer_norm, **options), usual, tables | vectors)


def attention_kernel(setting: Setting, texts: int, length: int) -> Kernel:
    bounds = length * torch.arange(texts + 1, dtype=torch.int32, device=setting.device)
    options = {"cu_seqlens": bounds, "max_seqlen": length, **dropout(setting)}

    def flash(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(1)
        return flash_attention(query, key, value, bounds, bounds, length, length, 0.1)

    on_gpu = setting.device.type == "cuda"
    return Kernel(
        partial(attention.varlen_attention, **options),
        flash if on_gpu else partial(attention.varlen_attention_reference, **options),
        random(setting, qkv=(texts * length, 3, bert_config(setting, "base").num_attention_heads, 64)),
        compiles=False,
    )


MAKERS: dict[str, Callable[..., Kernel]] = {
    "norm": norm_kernel,
    "gelu": gelu_kernel,
    "embedding": embedding_kernel,
    "attention": attention_kernel,
}


def times(setting: Setting, name: str) -> dict[str, Any]:
    """Microseconds of a forward and a backward pass of the kernel `name`, at each of its sizes."""
    sizes: list[tuple[int, ...]] = list(TEXTS) if name == "attention" else [(rows,) for rows in TOKENS]
    if setting.smoke:
        sizes = [(4, 9)] if name == "attention" else [(36,)]
    return {" x ".join(map(str, size)): pass_times(MAKERS[name](setting, *size)) for size in sizes}


def pass_times(kernel: Kernel) -> dict[str, float]:
    found = {
        "microseconds": pass_time(kernel.ours, kernel.tensors),
        "microseconds_of_torch": pass_time(kernel.usual, kernel.tensors),
    }
    if kernel.compiles:
        torch._dynamo.reset()
        compiled = torch.compile(kernel.usual, dynamic=False)
        found["microseconds_of_compile"] = pass_time(compiled, kernel.tensors)
    return found


def pass_time(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> float:
    """Microseconds of a forward and a backward pass on the device, several in a row in one graph."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    upstream = torch.randn_like(function(**leaves))
    repeats = 16 if upstream.is_cuda else 1

    def passes() -> None:
        for _ in range(repeats):
            torch.autograd.grad(function(**leaves), list(leaves.values()), upstream)

    return round(1000 * milliseconds(as_graph(passes)) / repeats, 2)


@dataclass
class Update:
    """A step of an optimiser, and what it works on."""

    call: Callable[[], None]
    param: Tensor
    grad: Tensor
    half_copy: Tensor


def adamw_times(setting: Setting) -> dict[str, float]:
    """Clipping, update, half-precision copy and clearing of all gradients of BERT base, ours and torch's fused AdamW.

    Both start from fp32 parameters and leave them updated, copied to bf16, their gradients at zero. Ours reads bf16
    gradients, as its engine makes them; torch's AdamW asks for fp32.
    """
    count = 1 << 16 if setting.smoke else PARAMETERS
    took = milliseconds(as_graph(our_update(setting, count).call))
    return {
        "microseconds": round(1000 * took, 1),
        "microseconds_of_torch": round(1000 * milliseconds(as_graph(torch_update(setting, count).call)), 1),
        "gigabytes_per_second": round(32 * count / took / 1e6, 1),  # 3 fp32 both ways, bf16: gradient thrice, copy
    }


def our_update(setting: Setting, count: int) -> Update:
    layout = adamw.FlatLayout.of([torch.Size([count])], [0], [(1.0, 0.01)], setting.device)
    param, exp_avg, exp_avg_sq = (layout.buffer() for _ in range(3))
    grad, half_copy = (layout.buffer(torch.bfloat16) for _ in range(2))
    for buffer in (param, exp_avg, exp_avg_sq, grad):
        buffer[:count] = torch.randn(count, device=setting.device).abs()
    lr, step = torch.tensor(1e-3, device=setting.device), torch.zeros((), device=setting.device)

    def update() -> None:
        control = adamw.prepare_update_(grad, step, max_norm=1.0)
        adamw.adamw_(param, exp_avg, exp_avg_sq, grad, half_copy, layout, lr, control, zero_grad=True)

    return Update(update, param, grad, half_copy)


def torch_update(setting: Setting, count: int) -> Update:
    param = torch.nn.Parameter(torch.randn(count, device=setting.device))
    grad = param.grad = torch.randn_like(param)
    half_copy = torch.empty_like(param, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([param], fused=True, capturable=setting.device.type == "cuda")

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()
        half_copy.copy_(param.detach())
        grad.zero_()

    return Update(update, param, grad, half_copy)
