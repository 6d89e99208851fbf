"""Gradients that are added up in the optimizer's buffer."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import compare, large, random, rng_on
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels import (
    adamw,
    embedding,
    gelu,
    gradients,
    layer_norm,
    linear,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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
@pytest.mark.slow
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
