"""Every Triton kernel against the plain torch that defines it.

Without a GPU the kernels run in Triton's interpreter (fp32 and fp16: its bf16 is not the GPU's). With one,
`pytest -m gpu` runs the same cases on it, bf16 too. The rule: against the reference in fp64, a kernel's error is at
most twice that of the reference in the kernel's dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import skip_without_interpreter
from torch import Tensor
from torch.nn import functional as F

if os.environ.get("CI") != "true":  # which installs it
    pytest.importorskip("triton")

from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert_kernels import (
    adamw,
    attention,
    backend,
    embedding,
    first_token,
    gelu,
    gradients,
    head,
    layer_norm,
    linear,
    philox,
)

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]


def large(*sizes: object) -> object:
    """A case of BERT's own sizes: on a GPU alone, where a program then takes several tiles."""
    return pytest.param(*sizes, marks=pytest.mark.gpu)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    if request.param == "cpu":
        skip_without_interpreter()
        assert backend.INTERPRET
    if request.param == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("too large for the interpreter")
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == "bf16" and device == "cpu":
        pytest.skip("the interpreter's bf16 is not the GPU's")
    if request.param == "fp16" and device == "cpu" and not is_first_case(request):
        pytest.skip("one shape of each kernel is enough in fp16 for the interpreter")
    return DTYPES[request.param]


def is_first_case(request: pytest.FixtureRequest) -> bool:
    """Whether the test's own parameters are the first of their lists."""
    indices = request.node.callspec.indices
    return not any(index for name, index in indices.items() if name not in ("device", "dtype"))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with NaN, so that an element no kernel wrote shows."""

    def poison(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


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


# -- Philox -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, rounds, expected",
    [
        (0x00000000, 7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0xFFFFFFFF, 7, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (0x00000000, 10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_philox_gives_the_published_numbers(word: int, rounds: int, expected: list[int]) -> None:
    w = torch.tensor(word)
    assert [int(x) for x in philox.philox((w,) * 4, (w, w), rounds)] == expected


def test_masks_have_the_same_bits_in_triton_and_torch(device: str) -> None:
    rng, dropped = rng_on(device), philox.drop_threshold(0.3)
    out = torch.empty(4, 64, dtype=torch.int8, device=device)
    philox.write_mask_kernel[(1,)](rng, out, 17, COLS=64, ROWS=4, DROPPED=dropped)
    rows = torch.arange(4, device=device)
    mask = philox.keep_mask(rng, 17, rows, 64, 0.3)
    assert torch.equal(out.bool(), mask)
    for other in (philox.keep_mask(rng, 18, rows, 64, 0.3), philox.keep_mask(rng + 1, 17, rows, 64, 0.3)):
        assert 0.3 < (other != mask).float().mean() < 0.54  # 2 * 0.3 * 0.7 of independent masks differ


def test_masks_drop_the_wanted_share() -> None:
    for p in (0.1, 0.5):
        kept = philox.keep_mask(rng_on("cpu"), 3, torch.arange(1000), 100, p).float()
        assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / 1e5) ** 0.5
        assert kept.mean(0).std() < 0.025 and kept.mean(1).std() < 0.075  # no column and no row is special


def test_dropout_keeps_the_mean() -> None:
    """Over many steps the references, whose masks the kernels share, come to what they give without dropout."""
    x = random((7, 24), torch.float32, "cpu", 0)
    qkv = random((7, 3, 1, 16), torch.float32, "cpu", 1)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    calls = (
        lambda rng: philox.dropout_reference(x, rng, 1, 0.2),
        lambda rng: attention.varlen_attention_reference(qkv, cu_seqlens, 4, p=0.2, rng=rng, site=2),
        lambda rng: first_token.first_token_attention_reference(
            qkv[cu_seqlens[:-1].long(), 0], qkv[:, 1:], cu_seqlens, p=0.2, rng=rng, site=3
        ),
    )
    for call in calls:
        drawn = torch.stack([call(torch.tensor([5, step])) for step in range(1500)])
        error = drawn.std(0) / 1500**0.5
        assert ((drawn.mean(0) - call(None)).abs() <= 5 * error + 1e-6).all()
        assert (drawn.std(0) > 0).all()


# -- AdamW ------------------------------------------------------------------------------------------------------------

SHAPES = [torch.Size(s) for s in ((3, 700), (5,), (1, 1024), (1030,))]
GROUPS, TABLE = [0, 1, 2, 1], [(1.0, 0.1), (1.0, 0.0), (0.25, 0.01)]


def torch_adamw(dtype: torch.dtype, start: list[Tensor], grads: list[list[Tensor]], lrs: list[float], scale: float):
    """torch.optim.AdamW with clipping over the same steps; steps with infinite gradients are left out."""
    parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    groups = [
        {"params": [p for p, g in zip(parameters, GROUPS, strict=True) if g == i], "weight_decay": TABLE[i][1]}
        for i in range(3)
    ]
    optimizer = torch.optim.AdamW(groups)
    norms = []
    for step_grads, lr in zip(grads, lrs, strict=True):
        for p, g in zip(parameters, step_grads, strict=True):
            p.grad = g.to(dtype) / scale
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        for group, (factor, _) in zip(optimizer.param_groups, TABLE, strict=True):
            group["lr"] = lr * factor
        if norms[-1].isfinite():
            optimizer.step()
    return [p.detach() for p in parameters], torch.stack(norms)


@pytest.mark.parametrize("scaled", [False, True])
def test_adamw_is_torchs(device: str, dtype: torch.dtype, scaled: bool) -> None:
    """Gradients and shadow in `dtype`; three groups, clipping, and with loss scaling a skipped step."""
    layout = adamw.FlatLayout.of(SHAPES, GROUPS, TABLE, device)
    scale, lrs = (8.0 if scaled else 1.0), [1e-2, 2e-2, 3e-2, 1e-2]
    start = [random(s, torch.float32, device, i) for i, s in enumerate(SHAPES)]
    grads = [[random(s, dtype, device, 10 * t + i, 0.2) for i, s in enumerate(SHAPES)] for t in range(4)]
    if scaled:
        grads[1][2][0, 7] = float("inf")
    param, exp_avg, exp_avg_sq = (layout.buffer() for _ in range(3))
    grad, shadow = layout.buffer(dtype), layout.buffer(dtype)
    for view, value in zip(layout.views(param), start, strict=True):
        view.copy_(value)
    shadow.copy_(param)
    step = torch.zeros((), dtype=torch.int64, device=device)
    loss_scale = torch.tensor(scale, device=device) if scaled else None
    norms = []
    for step_grads, lr in zip(grads, lrs, strict=True):
        for view, value in zip(layout.views(grad), step_grads, strict=True):
            view.copy_(value)
        control = adamw.prepare_update_(grad, step, max_norm=1.0, loss_scale=loss_scale)
        norms.append(control[adamw.NORM])
        lr_now = torch.tensor(lr, device=device)
        adamw.adamw_(param, exp_avg, exp_avg_sq, grad, shadow, layout, lr_now, control, zero_grad=True)
        assert not grad.any()
        assert torch.equal(shadow, param.to(dtype))
    assert int(step) == (3 if scaled else 4)
    plain, plain_norms = torch_adamw(torch.float32, start, grads, lrs, scale)
    exact, exact_norms = torch_adamw(torch.float64, start, grads, lrs, scale)
    for ours, p, e in zip(layout.views(param), plain, exact, strict=True):
        assert_close("param", ours, p, e)
    finite = exact_norms.isfinite()
    assert torch.equal(torch.stack(norms).isfinite(), finite)
    assert_close("norm", torch.stack(norms)[finite], plain_norms[finite], exact_norms[finite])
    gaps = torch.ones(layout.total, dtype=torch.bool)
    for shape, offset in zip(SHAPES, layout.offsets, strict=True):
        gaps[offset : offset + shape.numel()] = False
    assert not param.cpu()[gaps].any()


def test_the_reference_of_adamw_agrees(device: str) -> None:
    layout = adamw.FlatLayout.of(SHAPES, GROUPS, TABLE, device)
    results = []
    for prepare, update in (
        (adamw.prepare_update_, adamw.adamw_),
        (adamw.prepare_update_reference_, adamw.adamw_reference_),
    ):
        buffers = [random((layout.total,), torch.float32, device, i).abs() for i in range(4)]
        step, lr = torch.tensor(3.0, device=device), torch.tensor(1e-2, device=device)
        for _ in range(2):
            control = prepare(buffers[3], step, max_norm=0.5)
            update(*buffers, None, layout, lr, control)
        results.append([*buffers, step, control])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_the_norm_has_equal_bits_from_run_to_run(device: str) -> None:
    grad = random((50_000,), torch.float32, device, 0)
    norms = {float(adamw.prepare_update_(grad, torch.zeros((), device=device))[adamw.NORM]) for _ in range(3)}
    assert len(norms) == 1


# -- LayerNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, size, p, with_bias",
    [
        (37, 100, 0.1, True),
        (1, 1, 0.0, True),
        (9, 384, 0.5, False),
        large(800, 768, 0.1, False),
        large(20_001, 1024, 0.1, True),
    ],
)
def test_dropout_add_layer_norm(
    device: str, dtype: torch.dtype, rows: int, size: int, p: float, with_bias: bool
) -> None:
    shapes = {"x": (rows, size), "residual": (rows, size), "weight": (size,), "bias": (size,), "linear_bias": (size,)}
    tensors = {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())}
    if not with_bias:
        del tensors["linear_bias"]
    options = {"eps": 1e-12 if dtype != torch.float16 else 1e-5, "p": p, "rng": rng_on(device), "site": 4}
    compare(
        partial(layer_norm.dropout_add_layer_norm, **options),
        partial(layer_norm.dropout_add_layer_norm_reference, **options),
        tensors,
    )


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, heads, head_size, p",
    [
        ([1, 0, 32, 5], 3, 32, 0.1),
        ([64, 33, 2], 2, 64, 0.0),
        ([127, 70], 2, 32, 0.3),
        ([128], 2, 64, 0.1),
        ([129, 7], 2, 32, 0.2),
        ([200], 1, 64, 0.0),
        large([25] * 32 + [0, 0], 12, 64, 0.1),
        large([512, 129, 300, 1], 16, 64, 0.1),
    ],
)
def test_varlen_attention(
    device: str, dtype: torch.dtype, lengths: list[int], heads: int, head_size: int, p: float
) -> None:
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    arguments = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "p": p, "rng": rng_on(device), "site": 1}
    compare(
        partial(attention.varlen_attention, **arguments),
        partial(attention.varlen_attention_reference, **arguments),
        {"qkv": random((sum(lengths), 3, heads, head_size), dtype, device, 0)},
    )


@pytest.mark.parametrize(
    "lengths, heads, head_size, p", [([1, 32, 5], 3, 32, 0.1), ([64, 33], 2, 64, 0.0), ([127, 1], 2, 32, 0.3)]
)
def test_first_token_attention(
    device: str, dtype: torch.dtype, lengths: list[int], heads: int, head_size: int, p: float
) -> None:
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    arguments = {"cu_seqlens": cu_seqlens, "p": p, "rng": rng_on(device), "site": 1}
    shapes = {"query": (len(lengths), heads, head_size), "key_value": (sum(lengths), 2, heads, head_size)}
    compare(
        partial(first_token.first_token_attention, **arguments),
        partial(first_token.first_token_attention_reference, **arguments),
        {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())},
    )


def test_a_first_token_of_no_text_gets_zeros(device: str) -> None:
    query = random((2, 1, 16), torch.float32, device, 0).requires_grad_()
    key_value = random((5, 2, 1, 16), torch.float32, device, 1)
    cu_seqlens = torch.tensor([0, 5, 5], dtype=torch.int32, device=device)
    out = first_token.first_token_attention(query, key_value, cu_seqlens)
    out.sum().backward()
    assert out[0].any() and not out[1].any()
    assert query.grad[0].any() and not query.grad[1].any()


# -- GELU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, size, with_bias",
    [(37, 300, True), (1, 1, True), (20, 130, False), large(800, 3072, True), large(20_001, 4096, True)],
)
def test_bias_gelu(device: str, dtype: torch.dtype, rows: int, size: int, with_bias: bool) -> None:
    tensors = {"x": random((rows, size), dtype, device, 0, 2.0), "bias": random((size,), dtype, device, 1)}
    if not with_bias:
        del tensors["bias"]
    compare(gelu.bias_gelu, gelu.bias_gelu_reference, tensors)


# -- embedding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, size, p, with_types",
    [
        (37, 100, 0.1, True),
        (1, 1, 0.0, False),
        (9, 384, 0.5, False),
        large(800, 768, 0.1, False),
        large(20_001, 1024, 0.1, True),
    ],
)
def test_embedding_layer_norm(
    device: str, dtype: torch.dtype, rows: int, size: int, p: float, with_types: bool
) -> None:
    def ids(high: int, seed: int) -> Tensor:
        return torch.randint(high, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)

    shapes = {"word": (50, size), "position": (11, size), "token_type": (2, size), "weight": (size,), "bias": (size,)}
    options = {"input_ids": ids(50, 0), "position_ids": ids(11, 1), "token_type_ids": ids(2, 2) if with_types else None}
    options |= {"eps": 1e-12 if dtype != torch.float16 else 1e-5, "p": p, "rng": rng_on(device), "site": 0}
    compare(
        partial(embedding.embedding_layer_norm, **options),
        partial(embedding.embedding_layer_norm_reference, **options),
        {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())},
    )


# -- linear layers, and gradients added up in the optimizer's buffer ---------------------------------------------------


@pytest.mark.parametrize("rows", [None, slice(3), slice(3, None)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(device: str, dtype: torch.dtype, rows: slice | None, with_bias: bool) -> None:
    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        chosen = slice(None) if rows is None else rows
        return F.linear(x, weight[chosen], None if bias is None else bias[chosen])

    shapes = {"x": (13, 24), "weight": (10, 24), "bias": (10,)}
    tensors = {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())}
    if not with_bias:
        del tensors["bias"]
    compare(partial(linear.linear, rows=rows), plain, tensors)


def ids(device: str, high: int) -> Tensor:
    return torch.randint(high, (13,), generator=torch.Generator().manual_seed(high)).to(device)


CALLS = {  # each with the shapes of its parameters
    "linear": (lambda x, weight, bias: linear.linear(x, weight, bias), [(24, 24), (24,)]),
    "gelu": (lambda x, bias: gelu.bias_gelu(x, bias), [(24,)]),
    "layer_norm": (
        lambda x, weight, bias, linear_bias: layer_norm.dropout_add_layer_norm(
            x, x, weight, bias, 1e-5, linear_bias=linear_bias, p=0.1, rng=rng_on(str(x.device))
        ),
        [(24,), (24,), (24,)],
    ),
    "embedding": (
        lambda x, *tables: embedding.embedding_layer_norm(
            ids(str(x.device), 40), ids(str(x.device), 20), None, *tables, 1e-5
        ),
        [(40, 24), (20, 24), (2, 24), (24,), (24,)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_added_to_the_optimizers_buffer(device: str, name: str) -> None:
    call, shapes = CALLS[name]
    x = random((13, 24), torch.float32, device, 0)
    gradients = []
    for mark in (False, True):
        parameters = [random(shape, torch.float32, device, i).requires_grad_() for i, shape in enumerate(shapes)]
        for parameter in parameters:
            if mark:
                parameter.main_grad = torch.ones_like(parameter)  # of the batches before
        for _ in range(2):
            call(x.clone().requires_grad_(), *parameters).square().sum().backward()
        assert all((parameter.grad is None) == mark for parameter in parameters)
        gradients.append([p.main_grad - 1 if mark else p.grad for p in parameters])
    for by_autograd, in_place in zip(*gradients, strict=True):
        torch.testing.assert_close(in_place, by_autograd, rtol=1e-5, atol=1e-5)


def test_a_residual_and_a_linear_layer_share_a_gradient(device: str, dtype: torch.dtype) -> None:
    """As in a layer of BERT: x goes through a linear layer and is the residual behind it."""
    options = {"eps": 1e-5, "p": 0.2, "rng": rng_on(device), "site": 4}

    def ours(x: Tensor, linear_weight: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shared = gradients.SharedGradient()
        product = linear.linear(x, linear_weight, shared=shared)
        return layer_norm.dropout_add_layer_norm(product, x, weight, bias, **options, shared=shared)

    def plain(x: Tensor, linear_weight: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = F.linear(x, linear_weight)
        return layer_norm.dropout_add_layer_norm_reference(product, x, weight, bias, **options)

    shapes = {"x": (13, 24), "linear_weight": (24, 24), "weight": (24,), "bias": (24,)}
    compare(ours, plain, {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())})


def a_small_network(x: Tensor, wide: Tensor, wide_bias: Tensor, back: Tensor, *vectors: Tensor) -> Tensor:
    """Kernels of every sort of vector: of a linear layer in two parts, of GELU, of a norm with its linear bias."""
    weight, bias, linear_bias, gelu_bias = vectors
    parts = [linear.linear(x, wide, wide_bias, rows) for rows in (slice(7), slice(7, None))]
    product = linear.linear(gelu.bias_gelu(torch.cat(parts, 1), gelu_bias), back)
    rng = rng_on(str(x.device))
    return layer_norm.dropout_add_layer_norm(product, x, weight, bias, 1e-5, linear_bias=linear_bias, p=0.1, rng=rng)


NETWORK = [(70, 24), (70,), (24, 70), (24,), (24,), (24,), (70,)]


@pytest.mark.parametrize("tokens", [2, 40, large(20_001)])
def test_gradients_go_to_one_buffer_as_autograd_would_add_them(device: str, tokens: int) -> None:
    """Two batches of a step and one of the next, whose matrices write over what is left there."""
    plain = [random(shape, torch.float32, device, i).requires_grad_() for i, shape in enumerate(NETWORK)]
    marked = [parameter.detach().clone().requires_grad_() for parameter in plain]
    layout = adamw.FlatLayout.of([p.shape for p in plain], [0] * len(NETWORK), [(1.0, 0.0)], device)
    flat = layout.buffer()
    views = layout.views(flat)
    store = gradients.Gradients(flat, marked, views)
    for view in views:
        view.fill_(float("nan"))  # of a step before
    for number, first in enumerate((True, False, True)):
        store.first = first
        if first:  # the optimizer's part
            for parameter, view in zip(plain, views, strict=True):
                parameter.grad = None
                view.copy_(view if view.dim() == 2 else torch.zeros_like(view))
        x = random((tokens + number, 24), torch.float32, device, number)
        for parameters in (plain, marked):
            a_small_network(x.clone().requires_grad_(), *parameters).square().sum().backward()
        assert any(slot.written for slot in store.slots)
        store.add_partials()
        for parameter, view in zip(plain, views, strict=True):
            torch.testing.assert_close(view, parameter.grad, rtol=1e-5, atol=2e-5)


# -- head and loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, rows, size, labels, p, smoothing, weighted, filled",
    [
        (SINGLE, 4, 100, 77, 0.1, 0.1, True, True),
        (SINGLE, 5, 40, 2, 0.0, 0.0, False, False),
        (SINGLE, 2, 384, 128, 0.3, 0.0, True, False),
        (MULTI, 5, 40, 3, 0.1, 0.0, False, True),
        (MULTI, 3, 24, 6, 0.0, 0.2, True, False),
        (REGRESSION, 5, 40, 1, 0.1, 0.0, False, True),
        large(SINGLE, 300, 768, 77, 0.1, 0.1, True, True),
        large(MULTI, 34, 1024, 28, 0.1, 0.1, True, True),
    ],
)
def test_head_loss(
    device: str,
    dtype: torch.dtype,
    kind: str,
    rows: int,
    size: int,
    labels: int,
    p: float,
    smoothing: float,
    weighted: bool,
    filled: bool,
) -> None:
    """Loss and gradients as `Problem.loss_sum` has them."""
    shapes = {"x": (rows, size), "pooler_bias": (size,), "weight": (labels, size), "bias": (labels,)}
    tensors = {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["x"][0] *= 1e-3  # where tanh is next to nothing
    options = {"kind": kind, "smoothing": smoothing, "p": p, "rng": rng_on(device), "site": 3, "unit": 2.5}
    options["denominator"] = torch.tensor(3.0, device=device)
    options["class_weights"] = random((labels,), torch.float32, device, 5).abs() if weighted else None
    options["keep"] = (torch.arange(rows, device=device) != 1).float() if filled else None
    options["targets"] = {
        SINGLE: torch.arange(rows, device=device) * 5 % labels,
        MULTI: (random((rows, labels), torch.float32, device, 6) > 0).float(),
        REGRESSION: random((rows,), torch.float32, device, 7, 3.0),
    }[kind]
    for output in (0, 1):
        compare(
            lambda output=output, **t: head.head_loss(**t, **options)[output],
            lambda output=output, **t: head.head_loss_reference(**t, **options)[output],
            tensors,
        )
    loss, logits = head.head_loss(**tensors, **options)
    problem = Problem(kind, [str(i) for i in range(labels)], unit=2.5)
    total = problem.loss_sum(logits, options["targets"], options["class_weights"], smoothing, options["keep"])
    torch.testing.assert_close(loss, total / 3)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


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


# -- compilation for GPUs that are not here ---------------------------------------------------------------------------


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


# -- where Triton is missing ------------------------------------------------------------------------------------------


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
