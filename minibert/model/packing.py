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

from minibert.model.config import BertConfig

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


@dataclass
class PackedInput:
    """The tokens of a batch, packed, or, where frozen layers were computed before, the activations they left."""

    packing: Packing
    input_ids: Tensor | None = None  # [T]
    position_ids: Tensor | None = None  # [T]
    token_type_ids: Tensor | None = None  # [T]; None is all 0
    hidden: Tensor | None = None  # [T, H] activations of layer `start_layer`, instead of ids; [B, H] after the last
    start_layer: int = 0
    window_weights: Tensor | None = None  # [texts, B] where the B rows are windows: what each counts in its text's mean

    def to(self, device: torch.device, kernel: str = "sdpa") -> PackedInput:
        """The same on a device, for the attention kernel that computes there."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            packing=self.packing.to(device, kernel),
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            token_type_ids=move(self.token_type_ids),
            hidden=move(self.hidden),
            window_weights=move(self.window_weights),
        )


def pack_padded(
    config: BertConfig, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[PackedInput, Tensor]:
    """[B, S] tensors -> (packed input, [T] places of its tokens in the flattened [B * S])

    A token keeps the position of its column, as in transformers. The pooled row is the first that the mask keeps, which
    with padding on the left is not transformers' choice: that is the first column, padding or not.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"input_ids must be [batch, length up to {limit}], not {list(input_ids.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} where input_ids is {list(input_ids.shape)}")
    for name, ids, size in (
        ("input_ids", input_ids, config.vocab_size),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"{name} must be from 0 to {size - 1}; found {int(ids.min())} to {int(ids.max())}")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = keep.sum(1).cpu()
    if not len(lengths) or int(lengths.min()) == 0:
        raise ValueError("attention_mask must keep at least one token of each text")
    rows = keep.flatten().nonzero().flatten()  # [T]
    x = PackedInput(
        packing=Packing.from_lengths(lengths.numpy()).to(input_ids.device),
        input_ids=input_ids.flatten()[rows],
        position_ids=rows % input_ids.shape[1],
        token_type_ids=None if token_type_ids is None else token_type_ids.flatten()[rows],
    )
    return x, rows
