"""Logits of encoded texts, computed in batches of similar length."""

from __future__ import annotations

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.plans import plan_evaluation
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.runtime import distributed
from minibert.runtime.device import Hardware
from minibert.runtime.memory import split_on_oom


def compute_logits(
    model: BertForSequenceClassification, data: Dataset, hardware: Hardware, all_ranks: bool = False
) -> np.ndarray:
    """Logits [n, L] of every example, in their order; computed in batches of similar length.

    `all_ranks`: all processes call this at once; each computes a part and gets all logits.
    Windows are batched as if each were a text, so that even a book needs no more memory than other texts.
    """
    logits = np.zeros((len(data.tokens), model.num_labels), dtype=np.float32)
    batches = plan_evaluation(data.tokens.lengths, batch_tokens=hardware.evaluation_tokens)

    def computed(rows: np.ndarray) -> np.ndarray:
        with hardware.autocast():
            return model.logits(hardware.place(data.rows(rows))).float().cpu().numpy()

    with torch.inference_mode():
        for rows, found in split_on_oom(
            batches[distributed.rank() :: distributed.world_size()] if all_ranks else batches, computed
        ):
            logits[rows] = found
    return data.tokens.mean_of_windows(distributed.all_reduce_array(logits) if all_ranks else logits)


def check_finite(logits: np.ndarray) -> np.ndarray:
    """The logits themselves; UserError where they say nothing, though argmax would make a label of them."""
    if not np.isfinite(logits).all():
        raise UserError("the model gives NaN or infinity; its training has diverged (lower --learning-rate)")
    return logits
