"""Dropout masks as a pure function of (seed, step, site, row, column), the same bits in Triton and in torch.

Counter-based random numbers: Philox4x32 (Salmon et al. 2011) with 7 rounds, the fewest that pass BigCrush. The key is the
seed; the counter is (column // 8, site, step, row), and its 128 bits are the 16 bits of 8 neighbouring columns. So a mask
is never stored: the backward pass draws it again. Seed and step come as one int64 tensor `rng` [seed, step] on the
device, which a CUDA graph can count up; the site, a number for each place with dropout, is a plain integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minibert_kernels.backend import jit, tl

ROUNDS = 7
LEVELS = 1 << 16


def drop_threshold(p: float) -> int:
    """Of the 65536 values that 16 bits take, so many drop an element."""
    return round(p * LEVELS)


@jit()
def keep_mask_kernel(rng_ptr, site, rows, first_group, COLS: tl.constexpr, DROPPED: tl.constexpr):
    """-> [len(rows), COLS] bool: columns from 8 * first_group on; COLS is a multiple of 8."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1).to(tl.uint32)
    groups = first_group + tl.arange(0, COLS // 8)
    site = tl.to_tensor(site).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups.to(tl.uint32)[None, :], site, step, rows.to(tl.uint32)[:, None], 7)
    low = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(low, high) >= DROPPED


@jit()
def write_mask_kernel(rng_ptr, out_ptr, site, COLS: tl.constexpr, ROWS: tl.constexpr, DROPPED: tl.constexpr):
    """The mask alone, for tests."""
    rows = tl.arange(0, ROWS)
    keep = keep_mask_kernel(rng_ptr, site, rows, 0, COLS, DROPPED)
    tl.store(out_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :], keep.to(tl.int8))


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product, in int64 without overflow."""
    low, high = constant * (x & 0xFFFF), constant * (x >> 16)
    total = high + (low >> 16)  # the product's bits from 16 up
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32: four int64 tensors that hold 32 bits each -> four more."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep_mask(rng: Tensor, site: int, rows: Tensor, num_cols: int, p: float) -> Tensor:
    """[R, num_cols] bool: what dropout at `site` keeps in the given rows. Reads `rng` on its device, without a sync."""
    seed, step = rng[0], rng[1]
    groups = torch.arange(-(-num_cols // 8), device=rng.device)[None, :]
    counter = (groups, torch.full_like(step, site), step & 0xFFFFFFFF, rows.long()[:, None] & 0xFFFFFFFF)
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)), -1)  # [R, groups, 4]
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(1)[:, :num_cols]
    return bits >= drop_threshold(p)


def dropout_reference(x: Tensor, rng: Tensor | None, site: int, p: float, rows: Tensor | None = None) -> Tensor:
    """Dropout of [R, C] in plain torch; `rows` are the row numbers of the mask, 0, 1, ... by default."""
    dropped = drop_threshold(p)
    if rng is None or dropped == 0:
        return x
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    return torch.where(keep_mask(rng, site, rows, x.shape[1], p), x * (LEVELS / (LEVELS - dropped)), 0)
