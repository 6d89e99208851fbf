"""Encoded examples with their targets, and the packed tensors of a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibert.batching.plans import Batch
from minibert.batching.tokens import Tokens, flat_indices
from minibert.model.packing import PackedInput, Packing


@dataclass
class Dataset:
    """Encoded examples of one split, ready to be batched."""

    tokens: Tokens
    targets: np.ndarray
    frozen: FrozenActivations | None = None  # what the frozen layers make of the tokens, computed once
    source: str = ""  # the file the examples come from
    lines: Sequence[int] = ()  # and the line of each
    weights: np.ndarray | None = None  # [n] float32: what each example's loss counts in training; None: 1

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.tokens.text_lengths

    def take(self, rows: np.ndarray) -> Dataset:
        """Some of the examples; only before frozen layers are computed."""
        weights = None if self.weights is None else self.weights[rows]
        return Dataset(self.tokens.take(rows), self.targets[rows], weights=weights)

    def batch(self, rows: np.ndarray) -> PackedInput:
        if self.tokens.windows is None:
            return self.rows(rows)
        windows = flat_indices(self.tokens.windows, rows)
        owner = np.repeat(np.arange(len(rows)), np.diff(self.tokens.windows)[rows])
        order = np.argsort(self.tokens.lengths[windows], kind="stable")
        x = self.rows(windows[order])
        belongs = (owner[order] == np.arange(len(rows))[:, None]).astype(np.float32)  # [texts, windows]
        x.window_weights = torch.from_numpy(belongs / belongs.sum(1, keepdims=True))
        return x

    def rows(self, rows: np.ndarray) -> PackedInput:
        """Rows of the tokens: examples, or windows of them."""
        if self.frozen is not None:
            return self.frozen.batch(rows, self.tokens.lengths[rows])
        return collate(self.tokens, rows)

    def targets_of(self, rows: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(self.targets[rows]).to(device, non_blocking=True)


@dataclass
class FrozenActivations:
    """What the frozen layers leave of each text."""

    start_layer: int  # the first layer that is not frozen
    values: np.ndarray  # [total tokens, H], or [n, H] where every layer is frozen; fp32
    offsets: np.ndarray  # [n + 1] rows of each text

    def batch(self, rows: np.ndarray, lengths: np.ndarray) -> PackedInput:
        """The packed input of some texts, from the first unfrozen layer on."""
        hidden = torch.from_numpy(np.take(self.values, flat_indices(self.offsets, rows), axis=0))
        return PackedInput(Packing.from_lengths(lengths), hidden=hidden, start_layer=self.start_layer)


def collate(tokens: Tokens, rows: Batch) -> PackedInput:
    """Pack the tokens of some examples into one batch, in the order of `rows`."""
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    index = flat_indices(tokens.offsets, rows)
    position = index - np.repeat(tokens.offsets[rows], lengths)  # [T]
    return PackedInput(
        packing=Packing.from_lengths(lengths),
        input_ids=torch.from_numpy(tokens.ids[index].astype(np.int64)),
        position_ids=torch.from_numpy(position),
        token_type_ids=None if tokens.type_ids is None else torch.from_numpy(tokens.type_ids[index].astype(np.int64)),
    )
