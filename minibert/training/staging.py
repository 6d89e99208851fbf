"""Copy a batch to the device: all its tensors in one block of pinned memory, with a single transfer.

Instead of six copies or more; predicted gain on an H200: 20 us of a step of 2.33 ms (BERT-base, 32 texts of 25 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; Triton compiles for pointers to multiples of 16


class StaticBuffers:
    """Tensors of fixed shapes and addresses on the device, side by side in one block."""

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        """like: tensors on the host, of the shapes and types that every batch has."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in like]
        self.offsets = [0, *accumulate(sizes)]
        on_gpu = device.type == "cuda"
        self.block = torch.empty(self.offsets[-1], dtype=torch.uint8, device=device)
        self.tensors = self._views(self.block, like)
        # While a copy is under way nothing may be written to what it reads, so there are two of these.
        self.host_blocks = [torch.empty(self.offsets[-1], dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self.host_arrays = [[t.numpy() for t in self._views(block, like)] for block in self.host_blocks]
        self.copied = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self.turn = 0

    def _views(self, block: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(like, self.offsets, strict=False)
        return [block[start : start + t.nbytes].view(t.dtype).view(t.shape) for t, start in parts]

    def copy_from(self, batch: Sequence[Tensor]) -> None:
        """Copy tensors of the host to the device; the host goes on meanwhile."""
        self.turn = 1 - self.turn
        event = self.copied[self.turn]
        if event is not None:
            event.synchronize()  # of the copy before the last, long done
        for array, tensor in zip(self.host_arrays[self.turn], batch, strict=True):
            array[...] = tensor.numpy()
        self.block.copy_(self.host_blocks[self.turn], non_blocking=True)
        if event is not None:
            event.record()
