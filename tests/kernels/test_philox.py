"""Dropout masks: Philox's published numbers, the same bits in Triton and torch, and the fraction that is dropped."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import random, rng_on

from minibert_kernels import (
    attention,
    first_token,
    philox,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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


@pytest.mark.slow
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
