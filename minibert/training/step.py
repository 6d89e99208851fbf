"""How a training step is computed: eagerly, or in fixed shapes. Both offer the same, and the loop never asks which."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minibert.batching.dataset import Dataset
from minibert.config import RecipeSettings, RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import PackedInput, chunk_bounds
from minibert.problem.problem import Problem
from minibert.runtime import distributed
from minibert.runtime.device import Hardware, eager, out_of_memory
from minibert.training.optimizer import Optimizer

if TYPE_CHECKING:
    from minibert.training.compiled import CompiledRegions
    from minibert.training.graph_step import FixedSteps

CPU = torch.device("cpu")
ROWS_TRIED = 8  # of an engine, before the first step


def train_step(
    model: BertForSequenceClassification,
    problem: Problem,
    optimizer: Optimizer,
    batches: list[tuple[PackedInput, Tensor]],
    *,
    step: int,
    denominator: float,
    masks: DropoutMasks | None,
    hardware: Hardware,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weights: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from the packed batches and targets of one step; returns (mean loss, gradient norm) as tensors.

    The losses of all batches are summed and divided by `denominator`, so accumulation equals one large batch, and so
    do the batches of several processes. `sample_weights` has for each batch what its rows count, [B].
    """
    total = torch.zeros((), device=hardware.device)
    for number, (x, targets) in enumerate(batches):
        with hardware.autocast():
            logits = model.logits(x, None if masks is None else masks.of_batch(number))
        counts = None if sample_weights is None else sample_weights[number]
        loss = problem.loss_sum(logits, targets, class_weights, label_smoothing, counts) / denominator
        (loss if optimizer.loss_scale is None else loss * optimizer.loss_scale).backward()
        total += loss.detach()
    total = distributed.sum_gradients(optimizer.parameters, total)
    try:
        return total, optimizer.step(step, total)
    except (MemoryError, RuntimeError) as error:  # half a step cannot be tried again
        if not out_of_memory(error):
            raise
        raise UserError("not enough memory for the optimizer; use a smaller model or --freeze") from None


class EagerStep:
    """Steps as torch runs them, operation by operation; `regions` of the model may be compiled."""

    fixed_shapes = False
    setup_seconds = 0.0  # within steps

    def __init__(
        self,
        model: BertForSequenceClassification,
        problem: Problem,
        config: RunConfig,
        hardware: Hardware,
        total_steps: int,
        class_weights: np.ndarray | None,
        regions: CompiledRegions | None = None,
    ) -> None:
        self.model, self.problem, self.config, self.hardware = model, problem, config, hardware
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights).to(hardware.device)
        self.regions = regions
        half = hardware.precision == "fp16"
        self.optimizer = Optimizer(model, config, total_steps, scale_loss=half, unit=problem.target_scale)

    def run(
        self, train: Dataset, micro_batches: list[np.ndarray], step: int, denominator: float
    ) -> tuple[Tensor, Tensor]:
        """Train on the rows of one step; returns (mean loss, gradient norm) as tensors."""
        device = self.hardware.device
        if device.type == "cuda":
            torch.cuda.manual_seed(generator_seed(self.config, step))
        return train_step(
            self.model,
            self.problem,
            self.optimizer,
            [(self.hardware.place(train.batch(rows)), train.targets_of(rows, device)) for rows in micro_batches],
            step=step,
            denominator=denominator,
            masks=self._masks(step),
            hardware=self.hardware,
            class_weights=self.class_weights,
            label_smoothing=self.config.label_smoothing,
            sample_weights=self._sample_weights(train, micro_batches),
        )

    def forward_backward(self, train: Dataset, micro_batches: list[np.ndarray], step: int) -> None:
        """Forward and backward without an update, to see whether memory suffices."""
        for rows in micro_batches:
            with self.hardware.autocast():
                logits = self.model.logits(self.hardware.place(train.batch(rows)), self._masks(step))
            self.problem.loss_sum(logits, train.targets_of(rows, self.hardware.device), None, 0.0).backward()

    def _sample_weights(self, train: Dataset, micro_batches: list[np.ndarray]) -> list[Tensor] | None:
        if train.weights is None:
            return None
        return [torch.from_numpy(train.weights[rows]).to(self.hardware.device) for rows in micro_batches]

    def _masks(self, step: int) -> DropoutMasks:
        seed, rng = dropout_seed(self.config), None
        if self.hardware.attention == "triton":
            rng = torch.tensor([seed, step], pin_memory=True).to(self.hardware.device, non_blocking=True)
        return DropoutMasks(seed, step, rng, plain=rng is not None)

    def free_memory(self) -> None:
        """Give back what was kept for batches of the sizes so far."""
        self.optimizer.drop_gradients()

    def errors(self) -> AbstractContextManager[None]:
        """Around steps: what torch.compile throws becomes a UserError."""
        return nullcontext() if self.regions is None else self.regions.errors()

    def padded_sizes(self, lengths: np.ndarray) -> tuple[int, int]:
        """Rows that a batch of texts of these lengths takes, outside attention and inside it."""
        tokens, ordered = int(lengths.sum()), np.sort(lengths)
        if self.hardware.attention != "sdpa":
            return tokens, tokens
        bounds = chunk_bounds(ordered) if self.hardware.device.type == "cpu" else [(0, len(ordered))]
        return tokens, sum((end - start) * int(ordered[end - 1]) for start, end in bounds)

    def report(self) -> str:
        return "" if self.regions is None else f"engine compile: {self.regions.report()}"


class FixedShapeStep:
    """Steps whose batches are padded to a few sizes, so that a CUDA graph can replay them."""

    fixed_shapes = True

    def __init__(self, fixed: FixedSteps, hardware: Hardware) -> None:
        self.fixed, self.hardware, self.optimizer = fixed, hardware, fixed.optimizer

    @property
    def setup_seconds(self) -> float:
        """That captures took within steps."""
        return self.fixed.setup_seconds

    def run(
        self, train: Dataset, micro_batches: list[np.ndarray], step: int, denominator: float
    ) -> tuple[Tensor, Tensor]:
        on_gpu = self.hardware.device.type == "cuda"
        (torch.cuda.manual_seed if on_gpu else torch.manual_seed)(generator_seed(self.fixed.config, step))
        return self.fixed.step([(train.batch(r), train.targets_of(r, CPU)) for r in micro_batches], step, denominator)

    def forward_backward(self, train: Dataset, micro_batches: list[np.ndarray], step: int) -> None:
        for rows in micro_batches:
            self.fixed.forward_backward(train.batch(rows), train.targets_of(rows, CPU))
        self.fixed.setup_seconds = 0.0

    def free_memory(self) -> None:
        self.optimizer.drop_gradients()
        self.fixed.static_batches.clear()

    def errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def padded_sizes(self, lengths: np.ndarray) -> tuple[int, int]:
        from minibert.training.graph_step import Bucket

        bucket = Bucket.of(lengths)
        slots = bucket.texts * bucket.longest
        return bucket.tokens, slots if self.hardware.attention == "sdpa" else bucket.tokens

    def report(self) -> str:
        return f"engine {self.hardware.engine}: {self.fixed.report()}"


Step = EagerStep | FixedShapeStep


def make_step(
    model: BertForSequenceClassification,
    problem: Problem,
    config: RunConfig,
    hardware: Hardware,
    total_steps: int,
    class_weights: np.ndarray | None,
    train: Dataset,
) -> tuple[Step, str]:
    """The step of the engine that `hardware` names, and why it is not: eager where `auto` chose one that fails.

    UserError where the engine was asked for by name and does not work here.
    """
    given = (model, problem, config, hardware, total_steps, class_weights)
    if hardware.engine == "eager":
        return EagerStep(*given), ""
    if hardware.engine == "compile":
        from minibert.training.compiled import compile_regions  # seconds of imports

        return EagerStep(*given, compile_regions(model, hardware, config.seed)), ""
    if train.weights is not None:
        failure: str | None = "sample_weight is for --engine eager or compile"
    else:
        from minibert.training.graph_step import FixedSteps  # imports Triton, where it is

        fixed = FixedSteps(*given)
        rows = np.arange(min(ROWS_TRIED, len(train)))
        with hardware.computing():
            failure = fixed.self_check(train.batch(rows), train.targets_of(rows, CPU))
        if failure is None:
            return FixedShapeStep(fixed, hardware), ""
    if config.engine != "auto":
        raise UserError(f"--engine {hardware.engine}: {failure}; use eager")
    why = f"engine {hardware.engine} does not work here: {failure}. Training is eager, with the same result"
    return EagerStep(model, problem, config, eager(hardware, config), total_steps, class_weights), why


def dropout_seed(config: RecipeSettings) -> int:
    """Each process drops other elements."""
    return config.seed ^ (distributed.rank() << 40)


def generator_seed(config: RecipeSettings, step: int) -> int:
    """Of torch's generator, where that draws dropout: a function of seed and step, as our own masks are."""
    return (dropout_seed(config) * 1_000_003 + step) % (1 << 63)
