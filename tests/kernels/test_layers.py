"""LayerNorm, GELU, embedding and linear layers against their references."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import compare, large, random, rng_on
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels import (
    embedding,
    gelu,
    layer_norm,
    linear,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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


@pytest.mark.parametrize(
    "rows, size, with_bias",
    [(37, 300, True), (1, 1, True), (20, 130, False), large(800, 3072, True), large(20_001, 4096, True)],
)
def test_bias_gelu(device: str, dtype: torch.dtype, rows: int, size: int, with_bias: bool) -> None:
    tensors = {"x": random((rows, size), dtype, device, 0, 2.0), "bias": random((size,), dtype, device, 1)}
    if not with_bias:
        del tensors["bias"]
    compare(gelu.bias_gelu, gelu.bias_gelu_reference, tensors)


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
