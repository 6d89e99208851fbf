"""Steps of fixed shapes for a GPU: run as they are, or replayed as one CUDA graph.

The host starts hundreds of kernels for a step that a GPU finishes in two milliseconds, so a small batch waits for the
host. A graph starts them all at once, but its tensors may change neither shape nor address. So each batch is padded
at its end, with texts that the loss leaves out, to the next of a few sizes, and copied into the same tensors.

Shapes: T tokens, B texts, the last of which are padding, S tokens of the longest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.config import RecipeSettings
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import Chunk, PackedInput, Packing
from minibert.problem.problem import Problem
from minibert.runtime.device import TOLERANCE, Hardware
from minibert.training.capture import capture
from minibert.training.flat_adamw import FlatOptimizer
from minibert.training.loss import BatchLoss, least_believed
from minibert.training.staging import StaticBuffers

SHORTEST = 32  # tokens of the smallest S; each next is twice as long
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
RATES = ("dropout", "attention_dropout")  # attributes of modules


@dataclass(frozen=True)
class Bucket:
    """The sizes that a batch is padded to."""

    tokens: int
    texts: int
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Bucket:
        """The next sizes up: at most an eighth more tokens (or 64), and enough texts to hold the padding."""
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


def pad_to_bucket(x: PackedInput, targets: Tensor, bucket: Bucket, kernel: str) -> tuple[PackedInput, Tensor, Tensor]:
    """A batch on the host -> (input, targets, keep) of the bucket's shapes; `keep` [B] is 1 for the real texts."""
    lengths = x.packing.lengths
    tail = bucket.tokens - int(lengths.sum())
    padding_lengths = np.clip(tail - bucket.longest * np.arange(bucket.texts - len(lengths)), 0, bucket.longest)

    def longer(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else F.pad(tensor, (0, tail))

    padded = replace(
        x,
        packing=Packing.fixed(np.concatenate([lengths, padding_lengths]), bucket.longest, kernel),
        input_ids=longer(x.input_ids),
        position_ids=longer(x.position_ids),
        token_type_ids=longer(x.token_type_ids),
    )
    padding = (0, 0) * (targets.dim() - 1) + (0, len(padding_lengths))
    keep = torch.cat([torch.ones(len(lengths)), torch.zeros(len(padding_lengths))])
    return padded, F.pad(targets, padding), keep


@dataclass
class StaticBatch:
    """Tensors at fixed addresses for the batches of a bucket, and the CUDA graph that reads them."""

    x: PackedInput
    targets: Tensor
    keep: Tensor
    buffers: StaticBuffers | None = None  # that hold the tensors above
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None
    norm: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> StaticBatch:
        """The batch with another tensor for each of its tensors."""

        def each(*tensors: Tensor | None) -> list[Any]:
            return [None if tensor is None else function(tensor) for tensor in tensors]

        x, packing = self.x, self.x.packing
        ids, positions, types = each(x.input_ids, x.position_ids, x.token_type_ids)
        cu_seqlens, first_rows, targets, keep = each(packing.cu_seqlens, packing.first_rows, self.targets, self.keep)
        chunks = [
            Chunk(chunk.rows, chunk.num_texts, chunk.longest, *each(chunk.slots, chunk.source, chunk.key_bias))
            for chunk in packing.chunks
        ]
        packing = replace(packing, cu_seqlens=cu_seqlens, first_rows=first_rows, made_chunks=chunks)
        x = replace(x, packing=packing, input_ids=ids, position_ids=positions, token_type_ids=types)
        return StaticBatch(x, targets, keep)

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def on(self, device: torch.device) -> StaticBatch:
        """The batch on a device, in tensors that later batches are copied to."""
        tensors = self.tensors()
        buffers = StaticBuffers(tensors, device)
        buffers.copy_from(tensors)
        views = iter(buffers.tensors)
        static = self.map(lambda _: next(views))
        static.buffers = buffers
        return static

    def copy_from(self, batch: StaticBatch) -> None:
        """Copy in a batch from the host."""
        assert self.buffers is not None
        self.buffers.copy_from(batch.tensors())


class FixedSteps:
    """Training steps of fixed shapes on `compute_model`, the copy of the model in the precision that computes."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        problem: Problem,
        config: RecipeSettings,
        hardware: Hardware,
        total_steps: int,
        class_weights: np.ndarray | None,
    ) -> None:
        self.problem, self.config, self.hardware = problem, config, hardware
        dtype, device = DTYPES[hardware.precision], hardware.device
        self.compute_model = copy.deepcopy(model).to(device, dtype)
        on_gpu = hardware.engine == "graph"
        # One stream for all captures: memory that a graph frees serves the next one only on the same stream.
        self.stream, update_stream = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))
        options = (dtype, problem.target_scale, hardware.kernels, update_stream)
        self.optimizer = FlatOptimizer(model, self.compute_model, config, total_steps, *options)
        self.update = self.optimizer.deferred
        self.compute_model.encoder.before_layer = self.update.wait_for
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights).to(device)
        self.denominator = torch.ones((), device=device)
        self.rng = torch.tensor([config.seed, 0], device=device)  # of the kernels' dropout
        self.static_batches: dict[tuple[Bucket, bool, bool], StaticBatch] = {}  # by bucket, first and last of a step
        self.setup_seconds = 0.0  # that went to captures

    def step(self, batches: list[tuple[PackedInput, Tensor]], step: int, denominator: float) -> tuple[Tensor, Tensor]:
        """Train on the batches of one step, which lie on the host; returns (mean loss, gradient norm) as tensors."""
        self.optimizer.schedule(step)
        self.denominator.fill_(denominator)
        self.rng[1].fill_(step)  # an assignment would wait for the device
        losses = []
        for number, (x, targets) in enumerate(batches):
            self.rng[0].fill_(self.config.seed ^ DropoutMasks.bits_of_batch(number))
            first, last = number == 0, number == len(batches) - 1
            static = self._static_batch(x, targets, first, last)
            if static.graph is not None:
                static.graph.replay()
            else:
                self._work(static, first, last)
            self.update.due = False  # the first batch has begun with the update of the step before
            assert static.loss is not None
            losses.append(static.loss.clone())  # the next replay writes there again
        self.optimizer.step_launched()
        assert static.norm is not None
        return torch.stack(losses).sum(), static.norm.clone()

    def self_check(self, x: PackedInput, targets: Tensor) -> str | None:
        """Try the engine on a few rows before the first step; returns what is wrong, or None. Trains nothing.

        Kernels must give the gradient of plain torch, both without dropout, and a graph the loss and norm of what it
        recorded. An exception is a failure too: a GPU too old, a driver that Triton does not know.
        """
        try:
            failure = self._disagreement(x, targets)
        except UserError:  # a capture that broke off, after which nothing is certain
            raise
        except Exception as error:  # whatever torch, Triton or the driver may throw
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self.static_batches.clear()
        try:
            self.optimizer.reset()
        except RuntimeError:  # an illegal access, say, which ends this process's use of the GPU
            raise UserError(f"CUDA error ({failure}); start again with --engine eager --attention sdpa") from None
        return failure

    def _disagreement(self, x: PackedInput, targets: Tensor) -> str | None:
        wrong = self._wrong_answers(x, targets)
        _, of_logits = self._differences(x, targets, self._signed_logits)  # whose sum may be near 0
        loss, of_loss = self._differences(x, targets, lambda static, kernels: self._loss(static, wrong, kernels))
        for name, difference in (("gradient", of_logits), ("loss", loss), ("loss's gradient", of_loss)):
            if not difference <= TOLERANCE[self.hardware.precision]:  # nor is NaN
                return f"its {name} is {difference:.0%} away from plain torch's"
        if self.hardware.engine == "graph" and not self._graph_agrees(x, targets):
            return "its graph gives another loss than the steps it recorded"
        return None

    def _differences(self, x: PackedInput, targets: Tensor, value_of: Callable[..., Tensor]) -> list[float]:
        """|ours - plain| / |plain| of `value_of(batch, kernels)` and of all its gradients, without dropout."""
        bucket, found = Bucket.of(x.packing.lengths), []
        for kernels, attention in ((self.hardware.kernels, self.hardware.attention), (False, "sdpa")):
            static = StaticBatch(*pad_to_bucket(x, targets, bucket, attention)).on(self.hardware.device)
            self.optimizer.gradients.first = True
            with without_dropout(self.compute_model):
                value = value_of(static, kernels)
                value.backward()
            self.optimizer.gradients.add_partials()
            found.append((value.detach().float(), self.optimizer.grad.clone().float()))
            self.optimizer.drop_gradients()
        return [float((ours - plain).norm() / plain.norm()) for ours, plain in zip(*found, strict=True)]

    def _signed_logits(self, static: StaticBatch, kernels: bool) -> Tensor:
        """The sum of all logits, those of every other label with their sign turned.

        Not the loss: where a model is sure of its answers, its gradient is small and the rounding in it is not.
        """
        logits = self.compute_model.logits(static.x, self._masks(kernels)).float()  # [B, L]
        signs = 1 - 2 * (torch.arange(logits.shape[1], device=logits.device) % 2)
        return torch.where(static.keep[:, None] > 0, logits * signs, 0).sum()

    def _wrong_answers(self, x: PackedInput, targets: Tensor) -> Tensor:
        """The answers that the model believes least, [B] or [B, L]: the gradient of their loss is never small.

        By plain torch, for both ways: each by its own rounding may choose others where two are close.
        """
        static = StaticBatch(*pad_to_bucket(x, targets, Bucket.of(x.packing.lengths), "sdpa")).on(self.hardware.device)
        with torch.no_grad(), without_dropout(self.compute_model):
            logits = self.compute_model.logits(static.x, self._masks(kernels=False)).float()
        return least_believed(self.problem, logits)

    def _graph_agrees(self, x: PackedInput, targets: Tensor) -> bool:
        """Whether a replay gives the loss and norm of the same work done launch by launch, dropout included."""
        static, found = self._static_batch(x, targets, first=True, last=True), []
        assert static.graph is not None
        for work in (static.graph.replay, partial(self._work, static, True, True)):
            torch.cuda.manual_seed(self.config.seed)
            self.optimizer.reset()
            if self.optimizer.loss_scale is not None:
                self.optimizer.loss_scale.fill_(1)  # at the first scale many a gradient overflows, as it may
            work()
            assert static.loss is not None and static.norm is not None
            found.append(torch.stack([static.loss, static.norm]).float())
        replayed, launched = found
        return torch.allclose(replayed, launched, rtol=TOLERANCE[self.hardware.precision], equal_nan=True)

    def forward_backward(self, x: PackedInput, targets: Tensor) -> None:
        """Forward and backward of one batch without an update, to see whether it fits into memory."""
        static = self._static_batch(x, targets, first=True, last=True)
        if static.graph is None:  # else its capture has done so
            self._gradients(static)

    def _static_batch(self, x: PackedInput, targets: Tensor, first: bool, last: bool) -> StaticBatch:
        """The batch in its bucket's static tensors; a bucket's first batch makes them and captures their graph."""
        bucket = Bucket.of(x.packing.lengths)
        batch = StaticBatch(*pad_to_bucket(x, targets, bucket, self.hardware.attention))
        static = self.static_batches.get((bucket, first, last))
        if static is not None:
            static.copy_from(batch)
            return static
        started = time.perf_counter()
        static = self.static_batches[bucket, first, last] = batch.on(self.hardware.device)
        if self.hardware.engine == "graph":
            self._capture(static, first, last)
        self.setup_seconds += time.perf_counter() - started
        return static

    def _loss(self, static: StaticBatch, targets: Tensor, kernels: bool) -> Tensor:
        loss = BatchLoss(self.problem, self.class_weights, self.config.label_smoothing, self.denominator)
        return loss(self.compute_model, static.x, targets, static.keep, self._masks(kernels))

    def _masks(self, kernels: bool) -> DropoutMasks:
        return DropoutMasks(self.config.seed, 0, self.rng, plain=not kernels)

    def _gradients(self, static: StaticBatch) -> None:
        loss = self._loss(static, static.targets, self.hardware.kernels)
        self.update.finish()  # it reads gradients of the step before, and this step's come now
        (loss if self.optimizer.loss_scale is None else loss * self.optimizer.loss_scale).backward()
        self.optimizer.gradients.add_partials()
        static.loss = loss.detach()

    def _work(self, static: StaticBatch, first: bool, last: bool) -> None:
        """Forward and backward; before a step's first batch the update of the step before, behind its last the norm."""
        if first:
            self.update.begin()
        self.optimizer.gradients.first = first
        self._gradients(static)
        if last:
            static.norm = self.optimizer.end_step()

    def _capture(self, static: StaticBatch, first: bool, last: bool) -> None:
        """Record `_work` on this batch as a CUDA graph. Nothing is trained by it: the gradients so far come back."""
        self.optimizer.flush()
        gradients = self.optimizer.grad.clone()
        other = next((other.graph for other in self.static_batches.values() if other.graph is not None), None)
        work, warm_up = (partial(f, static, first, last) for f in (self._work, self._work_without_effect))
        assert self.stream is not None
        static.graph = capture(work, warm_up, self.stream, other)
        self.optimizer.grad.copy_(gradients)

    def _work_without_effect(self, static: StaticBatch, first: bool, last: bool) -> None:
        """All that `_work` does, so that its kernels compile; a gradient that is not finite changes nothing."""
        self._work(static, first, last=False)
        if not last:
            return
        optimizer = self.optimizer
        state = (optimizer.skipped, optimizer.bad, optimizer.growth_tracker, optimizer.loss_scale)
        kept = [(tensor, tensor.clone()) for tensor in state if tensor is not None]
        optimizer.grad.fill_(torch.inf)
        optimizer.end_step()
        for tensor, value in kept:
            tensor.copy_(value)

    def report(self) -> str:
        """How many shapes there were."""
        return f"{len(self.static_batches)} shapes"


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
