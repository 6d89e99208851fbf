"""Attention on packed texts, and that of the first token alone, against their references."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import compare, large, random, rng_on

from minibert_kernels import (
    attention,
    first_token,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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
