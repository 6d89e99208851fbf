"""Steps of fixed shapes for a GPU: run as they are, or replayed as one CUDA graph.

The host starts hundreds of kernels for a step that a GPU finishes in two milliseconds, so a small batch waits for the
host. A graph starts them all at once, but its tensors may change neither shape nor place. So each batch is filled
up at its end, with texts that the loss leaves out, to the next of a few sizes, and copied into the same tensors.

Shapes: T tokens, B texts, the last of which only fill up, S tokens of the longest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.config import RunConfig
from minibert.device import Hardware
from minibert.errors import UserError
from minibert.flat import FlatOptimizer
from minibert.model import BertForSequenceClassification, PackedInput
from minibert.ops import DropoutMasks, Packing
from minibert.problem import Problem

SHORTEST = 32  # tokens of the smallest S; each next is twice as long
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
TOLERANCE = {"bf16": 0.05, "fp16": 0.02, "tf32": 0.02, "fp32": 1e-3}  # of a gradient; MiniLM: 0.015, 0.002, -, 1e-6
RATES = ("dropout", "attention_dropout")  # attributes of modules
WARM_UP = 2  # passes before a capture, in which kernels compile and cuBLAS takes its workspace


@dataclass(frozen=True)
class Bucket:
    """The sizes that a batch is filled up to."""

    tokens: int
    texts: int
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Bucket:
        """The next sizes up: at most an eighth more tokens (or 64), and texts enough to hold what is filled up."""
        total, longest = int(lengths.sum()), SHORTEST
        while longest < lengths.max():
            longest *= 2
        unit = max(64, _power_of_two(total) // 8)
        texts = _round_up(len(lengths), max(8, _power_of_two(len(lengths)) // 8))
        return cls(_round_up(total, unit), texts + _round_up(unit, longest) // longest, longest)


def _power_of_two(n: int) -> int:
    """The largest that is not above n."""
    return 1 << (n.bit_length() - 1)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def fill_up(x: PackedInput, targets: Tensor, bucket: Bucket, kernel: str) -> tuple[PackedInput, Tensor, Tensor]:
    """A batch on the host -> (input, targets, keep) of the bucket's shapes; `keep` [B] is 1 for the real texts."""
    lengths = x.packing.lengths
    tail = bucket.tokens - int(lengths.sum())
    fillers = np.clip(tail - bucket.longest * np.arange(bucket.texts - len(lengths)), 0, bucket.longest)

    def longer(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else F.pad(tensor, (0, tail))

    filled = replace(
        x,
        packing=Packing.fixed(np.concatenate([lengths, fillers]), bucket.longest, kernel),
        input_ids=longer(x.input_ids),
        position_ids=longer(x.position_ids),
        token_type_ids=longer(x.token_type_ids),
    )
    padding = (0, 0) * (targets.dim() - 1) + (0, len(fillers))
    keep = torch.cat([torch.ones(len(lengths)), torch.zeros(len(fillers))])
    return filled, F.pad(targets, padding), keep


@dataclass
class Place:
    """Where a bucket's batches are put on the device, and the graph that works on them."""

    x: PackedInput
    targets: Tensor
    keep: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None
    norm: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        packing = self.x.packing
        chunks = [t for chunk in packing.chunks for t in (chunk.slots, chunk.source, chunk.key_bias)]
        inputs = (self.x.input_ids, self.x.position_ids, self.x.token_type_ids)
        every = (*inputs, packing.cu_seqlens, packing.first_rows, *chunks, self.targets, self.keep)
        return [tensor for tensor in every if tensor is not None]

    def take(self, batch: Place) -> None:
        """Copy a batch in; from pinned memory, so that the host goes on meanwhile."""
        for here, new in zip(self.tensors(), batch.tensors(), strict=True):
            here.copy_(new.pin_memory() if here.is_cuda else new, non_blocking=True)


class FixedSteps:
    """Training steps of fixed shapes on the `twin`, the copy of the model in the precision that computes."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        problem: Problem,
        config: RunConfig,
        hardware: Hardware,
        total_steps: int,
        class_weights: np.ndarray | None,
    ) -> None:
        self.problem, self.config, self.hardware = problem, config, hardware
        dtype, device = DTYPES[hardware.precision], hardware.device
        self.twin = copy.deepcopy(model).to(device, dtype)
        self.optimizer = FlatOptimizer(model, self.twin, config, total_steps, dtype, problem.unit)
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights).to(device)
        self.denominator = torch.ones((), device=device)
        self.rng = torch.tensor([config.seed, 0], device=device)  # of the kernels' dropout
        self.places: dict[tuple[Bucket, bool], Place] = {}
        self.setup_seconds = 0.0  # that went to captures
        # One stream for all captures: memory that a graph frees serves the next one only on the same stream.
        self.stream = torch.cuda.Stream(device) if hardware.engine == "graph" else None

    def step(self, batches: list[tuple[PackedInput, Tensor]], step: int, denominator: float) -> tuple[Tensor, Tensor]:
        """Train on the batches of one step, which lie on the host; returns (mean loss, gradient norm) as tensors."""
        self.optimizer.schedule(step)
        self.denominator.fill_(denominator)
        self.rng[1].fill_(step)  # an assignment would wait for the device
        losses = []
        for number, (x, targets) in enumerate(batches):
            self.rng[0].fill_(self.config.seed ^ DropoutMasks.bits_of_batch(number))
            last = number == len(batches) - 1
            place = self._place(x, targets, last)
            if place.graph is not None:
                place.graph.replay()
            else:
                self._work(place, last)
            assert place.loss is not None
            losses.append(place.loss.clone())  # the next replay writes there again
        assert place.norm is not None
        return torch.stack(losses).sum(), place.norm.clone()

    def fault(self, x: PackedInput, targets: Tensor) -> str | None:
        """Try everything on a few rows, before the first step: what is wrong, or None. Nothing is trained by it.

        Kernels must give the gradient of plain torch, both without dropout, and a graph the loss and norm of what it
        recorded. What raises is a fault too: a GPU too old, a driver that Triton does not know.
        """
        try:
            fault = self._disagreement(x, targets)
        except Exception as error:  # whatever torch, Triton or the driver may throw
            fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self.places.clear()
        try:
            if fault is not None and self.stream is not None:
                self._leave_capture()
            self.optimizer.start_anew()
        except RuntimeError:  # an illegal access, say, which ends this process's use of the GPU
            raise UserError(f"the GPU gave up ({fault}); start again with --engine eager --attention sdpa") from None
        return fault

    def _leave_capture(self) -> None:
        """After a capture that broke off, torch before 2.13 stays on its stream and takes the generator for captured.

        Another capture, of next to nothing, puts the generator right.
        """
        torch.cuda.set_stream(torch.cuda.default_stream(self.hardware.device))
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            self.denominator.fill_(1)

    def _disagreement(self, x: PackedInput, targets: Tensor) -> str | None:
        difference = self._gradient_difference(x, targets)
        if not difference <= TOLERANCE[self.hardware.precision]:  # nor is NaN
            return f"its gradient is {difference:.0%} away from plain torch's"
        if self.hardware.engine == "graph" and not self._graph_agrees(x, targets):
            return "its graph gives another loss than the steps it recorded"
        return None

    def _gradient_difference(self, x: PackedInput, targets: Tensor) -> float:
        """|ours - plain| / |plain| over all gradients."""
        bucket, gradients = Bucket.of(x.packing.lengths), []
        for kernels, attention in ((self.hardware.kernels, self.hardware.attention), (False, "sdpa")):
            place = self._new_place(Place(*fill_up(x, targets, bucket, attention)), attention)
            with without_dropout(self.twin):
                self._loss(place.x, place.targets, place.keep, kernels).backward()
            gradients.append(self.optimizer.grad.clone().float())
            self.optimizer.drop_gradients()
        ours, plain = gradients
        return float((ours - plain).norm() / plain.norm())

    def _graph_agrees(self, x: PackedInput, targets: Tensor) -> bool:
        """Whether a replay gives the loss and norm of the same work done launch by launch, dropout included."""
        place, found = self._place(x, targets, last=True), []
        assert place.graph is not None
        for work in (place.graph.replay, partial(self._work, place, True)):
            torch.cuda.manual_seed(self.config.seed)
            self.optimizer.start_anew()  # the other one may have lowered the loss scale
            work()
            assert place.loss is not None and place.norm is not None
            found.append(torch.stack([place.loss, place.norm]).float())
        replayed, launched = found
        return torch.allclose(replayed, launched, rtol=TOLERANCE[self.hardware.precision])

    def passes(self, x: PackedInput, targets: Tensor) -> None:
        """Forward and backward of one batch without an update, to see whether it fits into memory."""
        place = self._place(x, targets, last=True)
        if place.graph is None:  # else its capture has done so
            self._gradients(place)

    def _place(self, x: PackedInput, targets: Tensor, last: bool) -> Place:
        """The batch in its bucket's place; a bucket's first batch makes the place and captures its graph."""
        bucket = Bucket.of(x.packing.lengths)
        batch = Place(*fill_up(x, targets, bucket, self.hardware.attention))
        place = self.places.get((bucket, last))
        if place is not None:
            place.take(batch)
            return place
        started = time.perf_counter()
        place = self.places[bucket, last] = self._new_place(batch, self.hardware.attention)
        if self.hardware.engine == "graph":
            self._capture(place, last)
        self.setup_seconds += time.perf_counter() - started
        return place

    def _new_place(self, batch: Place, attention: str) -> Place:
        device = self.hardware.device
        return Place(batch.x.to(device, attention), batch.targets.to(device), batch.keep.to(device))

    def _loss(self, x: PackedInput, targets: Tensor, keep: Tensor, kernels: bool | None = None) -> Tensor:
        kernels = self.hardware.kernels if kernels is None else kernels
        masks = DropoutMasks(self.config.seed, 0, self.rng, plain=not kernels)
        logits = self.twin.logits(x, masks)
        smoothing = self.config.label_smoothing
        return self.problem.loss_sum(logits, targets, self.class_weights, smoothing, keep) / self.denominator

    def _gradients(self, place: Place) -> None:
        loss = self._loss(place.x, place.targets, place.keep)
        (loss if self.optimizer.loss_scale is None else loss * self.optimizer.loss_scale).backward()
        place.loss = loss.detach()

    def _work(self, place: Place, last: bool) -> None:
        """Forward and backward; with the step's last batch also the update."""
        self._gradients(place)
        if last:
            place.norm = self.optimizer.update()

    def _capture(self, place: Place, last: bool) -> None:
        """Record `_work` on this place as a CUDA graph. Nothing is trained by it: the gradients so far come back."""
        gradients, stream = self.optimizer.grad.clone(), self.stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._gradients(place)
            if last:
                self._update_nothing()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        others = (other.graph for other in self.places.values() if other.graph is not None)
        pool = next((other.pool() for other in others), None)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._work(place, last)
        self.optimizer.grad.copy_(gradients)
        place.graph = graph

    def _update_nothing(self) -> None:
        """Run the update so that its kernels compile, on a gradient that is not finite, which changes nothing."""
        optimizer = self.optimizer
        kept = (optimizer.skipped, optimizer.bad, optimizer.growth_tracker, optimizer.loss_scale)
        before = [None if tensor is None else tensor.clone() for tensor in kept]
        optimizer.grad.fill_(torch.inf)
        optimizer.update()
        for tensor, value in zip(kept, before, strict=True):
            if tensor is not None and value is not None:
                tensor.copy_(value)

    def report(self) -> str:
        """How many shapes there were."""
        return f"{len(self.places)} shapes"


@contextmanager
def without_dropout(model: BertForSequenceClassification) -> Iterator[None]:
    """Every drop rate at 0, and afterwards as it was."""
    rates = [(m, name, getattr(m, name)) for m in model.modules() for name in RATES if hasattr(m, name)]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
