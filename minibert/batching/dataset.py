"""The encoded examples of a part of the data, as batches, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibert.batching.plans import collate, halving, plan_evaluation
from minibert.batching.tokens import Tokens, places_of
from minibert.model.bert import BertForSequenceClassification, PackedInput
from minibert.runtime import distributed
from minibert.runtime.device import Hardware
from minibert.training.frozen import FrozenActivations


@dataclass
class Dataset:
    """Encoded examples of one part, ready to be batched."""

    tokens: Tokens
    targets: np.ndarray
    frozen: FrozenActivations | None = None  # what the frozen layers make of the tokens, computed once
    source: str = ""  # the file the examples come from
    lines: Sequence[int] = ()  # and the line of each

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.tokens.text_lengths

    def take(self, rows: np.ndarray) -> Dataset:
        """Some of the examples; only before frozen layers are computed."""
        return Dataset(self.tokens.take(rows), self.targets[rows])

    def batch(self, rows: np.ndarray) -> PackedInput:
        if self.tokens.windows is None:
            return self.rows(rows)
        windows = places_of(self.tokens.windows, rows)
        owner = np.repeat(np.arange(len(rows)), np.diff(self.tokens.windows)[rows])
        order = np.argsort(self.tokens.lengths[windows], kind="stable")
        x = self.rows(windows[order])
        shares = (owner[order] == np.arange(len(rows))[:, None]).astype(np.float32)  # [texts, windows]
        x.window_shares = torch.from_numpy(shares / shares.sum(1, keepdims=True))
        return x

    def rows(self, rows: np.ndarray) -> PackedInput:
        """Rows of the tokens: examples, or windows of them."""
        if self.frozen is not None:
            return self.frozen.batch(rows, self.tokens.lengths[rows])
        return collate(self.tokens, rows)

    def targets_of(self, rows: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(self.targets[rows]).to(device, non_blocking=True)


def evaluate(
    model: BertForSequenceClassification, data: Dataset, hardware: Hardware, together: bool = False
) -> np.ndarray:
    """Logits [n, L] of every example, in their order; computed in batches of like length.

    `together`: all processes call this at once; each computes its share and gets all logits.
    Windows are batched as if each were a text, so that even a book needs no more memory than other texts.
    """
    logits = np.zeros((len(data.tokens), model.num_labels), dtype=np.float32)
    batches = plan_evaluation(data.tokens.lengths, batch_tokens=hardware.evaluation_tokens)

    def computed(rows: np.ndarray) -> np.ndarray:
        with hardware.autocast():
            return model.logits(hardware.place(data.rows(rows))).float().cpu().numpy()

    with torch.inference_mode():
        for rows, found in halving(
            batches[distributed.rank() :: distributed.world()] if together else batches, computed
        ):
            logits[rows] = found
    return data.tokens.mean_of_windows(distributed.sum_array(logits) if together else logits)
