"""Packed batches: texts one behind another with no padding between them, so that a network runs on real tokens only.

Attention alone needs to know where one text ends.

Shapes: T tokens in the batch, B texts, S the longest text's tokens, n texts of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Texts whose attention is computed at once on the CPU: so many that a score matrix of all heads stays in the cache,
# and of so like length that little is padded. benchmarks/bench_step.py times it beside torch.
CHUNK_AREA = 1 << 18  # texts x S x S
CHUNK_SPREAD = 1.25  # longest over shortest


@dataclass
class Chunk:
    """Texts next to each other whose attention is computed together, padded to the longest of them."""

    rows: slice  # of the packed batch
    num_texts: int  # n
    longest: int  # S
    slots: Tensor | None  # [tokens] each token's place among n x S padded slots; None when nothing is padded
    source: Tensor | None  # [n * S] the chunk's token in each slot (any token in a padded one); None likewise
    key_bias: Tensor | None  # [n, 1, 1, S] 0, or -inf on padding; None likewise

    @classmethod
    def of(cls, lengths: np.ndarray, start: int, longest: int | None = None) -> Chunk:
        """`longest` makes the shapes those of any texts up to that length, some of which may be empty."""
        total = int(lengths.sum())
        rows = slice(start, start + total)
        if longest is None:
            longest = int(lengths.max())
            if len(lengths) * longest == total:
                return cls(rows, len(lengths), longest, None, None, None)
        position = np.arange(longest)
        real = position < lengths[:, None]  # [n, S]
        first = np.cumsum(lengths) - lengths
        source = np.where(real, first[:, None] + position, 0)
        seen = position < np.maximum(lengths, 1)[:, None]  # an empty text has nothing to read, yet softmax needs a key
        bias = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None, None, :]
        tensors = (torch.from_numpy(array) for array in (np.flatnonzero(real), source.reshape(-1), bias))
        return cls(rows, len(lengths), longest, *tensors)

    def to(self, device: torch.device) -> Chunk:
        tensors = (None if t is None else t.to(device, non_blocking=True) for t in self._tensors())
        return Chunk(self.rows, self.num_texts, self.longest, *tensors)

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.slots, self.source, self.key_bias


@dataclass
class Packing:
    """Where each text lies in a packed batch. Made on the host from the lengths, so a step never asks the device."""

    cu_seqlens: Tensor  # [B + 1] int32: text b is rows cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen: int  # S
    first_rows: Tensor  # [B] the rows of [CLS]
    kernel: str = "sdpa"  # or flash, triton: what computes the attention
    made_chunks: list[Chunk] | None = None  # empty where a kernel works from cu_seqlens alone

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray) -> Packing:
        """Build on the CPU from the token count of each text; no text may be empty. Best in order of length."""
        counts = np.asarray(lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        cu_seqlens, first_rows = torch.from_numpy(offsets.astype(np.int32)), torch.from_numpy(offsets[:-1].copy())
        return cls(cu_seqlens, int(counts.max()), first_rows)

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each text; only where the batch still lies on the host."""
        return np.diff(self.cu_seqlens.numpy()).astype(np.int64)

    @property
    def chunks(self) -> list[Chunk]:
        """For the padded path: on the host made when first asked for, as a GPU wants others or none."""
        if self.made_chunks is None:
            lengths, offsets = self.lengths, self.cu_seqlens.tolist()
            self.made_chunks = [Chunk.of(lengths[a:b], offsets[a]) for a, b in chunk_bounds(lengths)]
        return self.made_chunks

    @classmethod
    def fixed(cls, lengths: np.ndarray, longest: int, kernel: str) -> Packing:
        """On the CPU, with shapes that depend on the sums alone: texts may be empty, none is over `longest`."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first_rows = np.minimum(offsets[:-1], offsets[-1] - 1)  # an empty text at the end has no row of its own
        chunks = [Chunk.of(lengths, 0, longest)] if kernel == "sdpa" else []
        cu_seqlens = torch.from_numpy(offsets.astype(np.int32))
        return cls(cu_seqlens, longest, torch.from_numpy(first_rows), kernel, chunks)

    def to(self, device: torch.device, kernel: str = "sdpa") -> Packing:
        if device.type == "cpu":
            return replace(self, kernel=kernel)
        chunks = self.made_chunks
        if kernel != "sdpa":
            chunks = []
        elif chunks is None or len(chunks) > 1:
            chunks = [Chunk.of(self.lengths, 0)]  # a GPU wants one large launch
        return Packing(
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.first_rows.to(device, non_blocking=True),
            kernel,
            [chunk.to(device) for chunk in chunks],
        )


def chunk_bounds(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut texts into chunks [start, stop) that keep CHUNK_AREA and CHUNK_SPREAD."""
    bounds, start = [], 0
    shortest = longest = int(lengths[0])
    for i, length in enumerate(lengths.tolist()):
        low, high = min(shortest, length), max(longest, length)
        if ((i + 1 - start) * high * high > CHUNK_AREA and i > start) or high > CHUNK_SPREAD * low + 4:
            bounds.append((start, i))
            start, low, high = i, length, length
        shortest, longest = low, high
    return [*bounds, (start, len(lengths))]
