"""Dropout whose masks are a pure function of seed, step and place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class DropoutMasks:
    """The dropout masks of one training step, a pure function of (seed, step, number of the draw).

    Random bits come in bulk from the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3"), 16 for each element: several times faster than torch's bernoulli_, which draws one by one.

    `rng`, an int64 tensor [seed, step] on a GPU, is for the kernels of minibert_kernels, which draw the same way and
    never store a mask. `plain` keeps to torch's operations and generator, as torch.compile and a GPU without kernels
    need: then only our attention reads `rng`, where it is asked for.
    """

    LEVELS = 1 << 16
    DRAWS_A_LAYER = 1 << 16  # more than a layer has places with dropout, chunks of attention counted
    MOST_BATCHES = 1 << 10  # of a step, that draw differently; their number stands in the high bits of the seed

    def __init__(self, seed: int, step: int, rng: Tensor | None = None, plain: bool = False, draws: int = 0) -> None:
        self.seed, self.step, self.draws = seed, step, draws
        self.rng, self.plain = rng, plain

    def of_batch(self, number: int) -> DropoutMasks:
        """The masks of one of the batches that a step adds up, each with bits of its own; `self` for the first."""
        if number == 0:
            return self
        rng = self.rng
        if rng is not None:
            rng = rng.clone()
            rng[0] ^= self.bits_of_batch(number)
        return DropoutMasks(self.seed ^ self.bits_of_batch(number), self.step, rng, self.plain)

    @classmethod
    def bits_of_batch(cls, number: int) -> int:
        """The bits of a step's seed to turn for one of its batches; none for the first."""
        return number % cls.MOST_BATCHES << 52

    def of_layer(self, layer: int) -> DropoutMasks:
        """The masks of one layer (-1: the embeddings; behind the last: the head), however often it is computed."""
        return DropoutMasks(self.seed, self.step, self.rng, self.plain, (layer + 1) * self.DRAWS_A_LAYER)

    @property
    def kernels(self) -> bool:
        """Whether layers run as kernels of minibert_kernels."""
        return self.rng is not None and not self.plain

    def next_site(self) -> int:
        """The number of the next place with dropout."""
        self.draws += 1
        return self.draws

    def draw(self, shape: Sequence[int], p: float, like: Tensor) -> tuple[Tensor, float]:
        """Return (mask of 0 and 1 in `like`'s dtype and device, factor that keeps the expectation) for drop rate p."""
        threshold, scale = self.threshold(p)
        if self.plain or like.device.type != "cpu":
            self.next_site()
            mask = torch.rand(tuple(shape), device=like.device).ge_((threshold + self.LEVELS // 2) / self.LEVELS)
            return mask.to(like.dtype), scale
        mask = torch.empty(tuple(shape), dtype=like.dtype)
        return torch.ge(self.bits(shape, like.device), threshold, out=mask), scale

    @classmethod
    def threshold(cls, p: float) -> tuple[int, float]:
        """(the least of the 16-bit numbers that keep an element, factor that keeps the expectation) for drop rate p."""
        dropped = round(p * cls.LEVELS)
        return dropped - cls.LEVELS // 2, cls.LEVELS / (cls.LEVELS - dropped)

    def bits(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """16 random bits for each element of the next place with dropout, as int16."""
        site, count = self.next_site(), math.prod(shape)
        if self.plain or device.type != "cpu":
            half = self.LEVELS // 2
            return torch.empty(tuple(shape), dtype=torch.int16, device=device).random_(-half, half)
        generator = np.random.Philox(key=self.seed, counter=[0, 0, site, self.step])
        return torch.from_numpy(generator.random_raw(-(-count // 4)).view(np.int16)[:count]).view(tuple(shape))


def dropout(x: Tensor, p: float, masks: DropoutMasks | None) -> Tensor:
    """Zero each element with probability p and scale the rest, or do nothing outside training (masks None)."""
    if masks is None or p == 0:
        return x
    mask, scale = masks.draw(x.shape, p, x)
    return x * mask.mul_(scale)


def dropout_add(x: Tensor, residual: Tensor, p: float, masks: DropoutMasks | None) -> Tensor:
    """dropout(x) + residual, in one pass over the data."""
    if masks is None or p == 0:
        return x + residual
    mask, scale = masks.draw(x.shape, p, x)
    return torch.addcmul(residual, x, mask, value=scale)


def training_masks(module: nn.Module) -> DropoutMasks | None:
    """Dropout for a direct call of a module in training mode, seeded from torch's generator."""
    return DropoutMasks(int(torch.randint(1 << 62, ())), 0) if module.training else None
