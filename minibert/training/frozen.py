"""Frozen layers computed once: the activations they leave for each text are kept and reused every epoch.

Dropout is off in frozen layers, so what they give for a text never changes. With the whole encoder frozen only the
[CLS] row of each text is kept, and an epoch costs no more than its head.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minibert.batching.dataset import FrozenActivations, collate
from minibert.batching.plans import plan_evaluation
from minibert.batching.tokens import Tokens, flat_indices
from minibert.model.bert import BertForSequenceClassification
from minibert.runtime import distributed
from minibert.runtime.device import Hardware
from minibert.runtime.memory import split_on_oom

MEMORY_FRACTION = 0.25  # of physical memory for activations; more goes to a memory-mapped file
DISK_FRACTION = 0.5  # of the free space for that file; more is not kept at all


def compute(
    model: BertForSequenceClassification,
    tokens: Tokens,
    start_layer: int,
    hardware: Hardware,
    quiet: bool,
    what: str = "frozen layers",
) -> FrozenActivations | None:
    """Run the frozen layers over all texts, or return None where the result fits neither memory nor disk.

    Several processes split the work, and each gets the whole.
    """
    model.eval()
    whole = start_layer == len(model.encoder.layers)
    offsets = np.arange(len(tokens) + 1) if whole else tokens.offsets
    values = _storage((int(offsets[-1]), model.config.hidden_size))
    if not distributed.all_agree(values is not None) or values is None:
        return None
    batches = plan_evaluation(tokens.lengths, batch_tokens=hardware.evaluation_tokens // 2)  # the peak of such a run
    progress = tqdm(total=len(tokens), desc=what, unit=" texts", disable=True if quiet else None, leave=False)
    with progress, torch.inference_mode(), hardware.computing(), hardware.autocast():

        def computed(rows: np.ndarray) -> np.ndarray:
            x = hardware.place(collate(tokens, rows))
            hidden = model.encoder.first_tokens(x, None) if whole else model.encoder(x, None, end=start_layer)
            return hidden.float().cpu().numpy()

        own = batches[distributed.rank() :: distributed.world_size()]
        for rows, hidden in split_on_oom(own, computed):
            values[flat_indices(offsets, rows)] = hidden
            progress.update(len(rows))
    return FrozenActivations(start_layer, distributed.all_reduce_array(values), offsets)


def _storage(shape: tuple[int, int]) -> np.ndarray | None:
    """Zeros in memory, or in an unnamed memory-mapped file that vanishes with the process, or None."""
    size = shape[0] * shape[1] * 4
    of_all = size * distributed.local_world_size()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if of_all <= MEMORY_FRACTION * memory:
        return np.zeros(shape, dtype=np.float32)
    try:
        folder = Path(tempfile.gettempdir())
        if of_all > DISK_FRACTION * shutil.disk_usage(folder).free:
            return None
        with tempfile.TemporaryFile(dir=folder, prefix="minibert-") as file:
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapped file would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    except OSError:
        return None
