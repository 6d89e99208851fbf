"""The training loop. What the benchmarks time is `train_step`, as users run it."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minibert.batching.dataset import Dataset
from minibert.batching.plans import cut_into_batches, plan_epoch, split_by_tokens
from minibert.batching.tokens import flat_indices
from minibert.config import RecipeSettings, RunConfig
from minibert.errors import UserError
from minibert.inference.logits import compute_logits
from minibert.model.bert import BertForSequenceClassification, PackedInput
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import chunk_bounds
from minibert.problem.problem import Problem
from minibert.runtime import distributed
from minibert.runtime.device import Hardware, attempt, duration, eager, out_of_memory, peak_memory
from minibert.runtime.files import writing
from minibert.training.optimizer import Optimizer
from minibert.training.recipe import EPOCHS

if TYPE_CHECKING:
    from minibert.training.compiled import CompiledRegions
    from minibert.training.flat_adamw import FlatOptimizer
    from minibert.training.graph_step import FixedSteps

LOWER_IS_BETTER = ("loss", "mse", "mae")
SECONDS_BETWEEN_SAVES = 60  # at an evaluation
LONGEST_WITHOUT_SAVE = 900  # seconds, evaluation or not
BAD_STEPS = 10  # so many losses or gradients in a row that are not finite end the run
STEPS_UNREAD = 50  # on a GPU: to read its flags, the host waits for it
ROWS_NAMED = 8
STEPS_TIMED = 10  # before a run says how long it will take
ROWS_TRIED = 8  # of an engine, before the first step


@dataclass
class Step:
    """The batches of one optimiser step, and what their losses are divided by."""

    batches: list[np.ndarray]  # row numbers
    denominator: float
    tokens: int
    examples: int


@dataclass
class State:
    """Where a run stands, beside the weights: all that is needed to go on from here."""

    step: int = 0
    best_step: int = 0
    best_value: float | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0
    tokens: int = 0
    examples: int = 0
    skipped: int = 0
    log_bytes: int = 0  # length of train_log.jsonl at this point
    bad_in_row: int = 0  # steps skipped one after another up to here
    most_tokens: int = 0  # of a micro-batch, since memory ran out; 0: it has not


class Diverged(UserError):
    """Losses are not finite: the recipe is at fault, not the data or the machine."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; a checkpoint has been written."""


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


def planned_batches(lengths: np.ndarray, config: RecipeSettings, epoch: int = 0) -> list[np.ndarray]:
    """The row numbers of each batch of an epoch."""
    return plan_epoch(
        lengths,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        buckets=config.length_buckets,
        seed=config.seed,
        epoch=epoch,
    )


def total_steps(steps_per_epoch: int, config: RecipeSettings) -> int:
    return config.max_steps or math.ceil(steps_per_epoch * (config.epochs or EPOCHS))


def checked_metric(problem: Problem, config: RecipeSettings, targets: np.ndarray) -> str:
    """The metric that chooses the best weights, known to exist before hours are spent."""
    metric = config.metric or problem.default_metric
    example = problem.metrics(np.zeros((1, len(problem.labels))), targets[:1])
    names = [name for name, value in example.items() if not isinstance(value, dict | list)]
    if metric not in names:
        raise UserError(f"--metric {metric}: not a metric of this problem; give one of {', '.join(names)}")
    return metric


class Training:
    """One training job: the model and its optimiser, the data, and where it stands."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        problem: Problem,
        data: dict[str, Dataset],
        config: RunConfig,
        hardware: Hardware,
        class_weights: np.ndarray | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.say = say
        self.model, self.problem, self.data = model.to(hardware.device), problem, data
        self.config, self.hardware = config, hardware
        self.weights = class_weights
        self.weights_tensor = None if class_weights is None else torch.from_numpy(class_weights).to(hardware.device)
        self.state = State()
        self.best: dict[str, Tensor] = {}  # the trained parameters at the best evaluation
        self.best_logits: np.ndarray | None = None  # of the validation rows then, where this process computed them
        self.recent_losses: list[Tensor] = []  # of the steps since the last line of the log
        self.shown: dict[str, str] = {}  # beside the progress bar
        self.unchecked: list[tuple[Step, Tensor]] = []  # steps that may have been bad, not yet read from the device
        self.watch: Callable[[dict[str, Any]], None] | None = None  # is given each line of the log
        self.head_is_fitted = False  # before the first step: it then counts among the evaluations
        self.metric = checked_metric(problem, config, data["train"].targets)
        self.steps_per_epoch = len(self._steps_of_epoch(0))
        self.total_steps = total_steps(self.steps_per_epoch, config)
        self.regions = self._compiled_regions()
        self.fixed = self._fixed_steps()
        self.optimizer: Optimizer | FlatOptimizer
        if self.fixed is None:
            self.optimizer = Optimizer(
                model, config, self.total_steps, scale_loss=hardware.precision == "fp16", unit=problem.target_scale
            )
        else:
            self.optimizer = self.fixed.optimizer

    def _compiled_regions(self) -> CompiledRegions | None:
        """What torch.compile has made of parts of the model, in the engine of that name."""
        if self.hardware.engine != "compile":
            return None
        from minibert.training.compiled import compile_regions  # seconds of imports

        return compile_regions(self.model, self.hardware, self.config.seed)

    def _fixed_steps(self) -> FixedSteps | None:
        """The engine of fixed shapes, if it is wanted; None for eager steps, also where `auto` finds a fault in it."""
        hardware, config = self.hardware, self.config
        if hardware.engine in ("eager", "compile"):
            return None
        if self.data["train"].weights is not None:
            self._use_eager("sample_weight is for --engine eager or compile")
            return None
        from minibert.training.graph_step import FixedSteps  # imports Triton, where it is

        fixed = FixedSteps(self.model, self.problem, config, hardware, self.total_steps, self.weights)
        train = self.data["train"]
        rows = np.arange(min(ROWS_TRIED, len(train)))
        fault = fixed.fault(train.batch(rows), train.targets_of(rows, torch.device("cpu")))
        if fault is None:
            return fixed
        self._use_eager(fault)
        return None

    def _use_eager(self, fault: str) -> None:
        """Eager steps in place of the engine that `auto` chose; UserError for one that was asked for by name."""
        engine = self.hardware.engine
        if self.config.engine != "auto":
            raise UserError(f"--engine {engine}: {fault}; use eager")
        self.hardware = eager(self.hardware, self.config)
        self.say(f"engine {engine} does not work here: {fault}. Training is eager, with the same result")

    def run(self, log_path: Path, save: Callable[[], None]) -> None:
        """Train to the end; the model then holds the best weights. `save` writes a checkpoint of this object."""
        log_every = max(1, self.total_steps // 100)
        last_save = time.monotonic()
        stop_request = distributed.StopRequest()
        log_file = _log_from(log_path, self.state.log_bytes)
        foretold_at = self.state.step + STEPS_TIMED
        self._probe()
        with _signals_noted() as signals, log_file as log, self._progress() as progress:
            if self.head_is_fitted and self.state.step == 0 and "validation" in self.data:
                self._evaluate_and_keep_best(log, progress)
            for step in self._remaining_steps():
                loss, norm = self._step(step)
                self.recent_losses.append(loss)
                self.unchecked.append((step, self.optimizer.bad.clone()))
                progress.update(step.examples)
                if self.state.step == foretold_at:
                    self._foretell()
                at_end = self.state.step == self.total_steps
                if self.hardware.device.type == "cpu" or self.state.step % STEPS_UNREAD == 0 or at_end:
                    self._count_bad_steps()
                if self.state.step % log_every == 0 or at_end:
                    self._log_step(log, progress, norm)
                evaluated = self._evaluation_due(at_end)
                if evaluated:
                    self._evaluate_and_keep_best(log, progress)
                self.state.log_bytes = log.tell()
                since_save = time.monotonic() - last_save
                due = self._save_due() or since_save > (SECONDS_BETWEEN_SAVES if evaluated else LONGEST_WITHOUT_SAVE)
                at_end = at_end or self._out_of_patience()
                stop = stop_request.anywhere(bool(signals))
                if stop or distributed.from_first(due) or at_end:
                    self._count_bad_steps()
                    _sync(log)  # the checkpoint counts on the log being there
                    save()
                    last_save = time.monotonic()
                if stop and not at_end:
                    stop_request.close()
                    raise Interrupted
        stop_request.close()
        self.optimizer.flush()
        if self.state.step < self.total_steps:
            patience = f"{self.config.early_stopping_patience} evaluations without a better {self.metric}"
            self.say(f"stopped at step {self.state.step} of {self.total_steps}: {patience}")
        if self.fixed is not None:
            self.say(f"engine {self.hardware.engine}: {self.fixed.report()}")
        if self.regions is not None:
            self.say(f"engine compile: {self.regions.report()}")
        if self.state.step == int(self.optimizer.skipped) > 0 and self.optimizer.loss_scale is None:
            raise Diverged("no step had a finite loss and gradient, so nothing was learned; lower --learning-rate")
        self.use_best_weights()

    def _foretell(self) -> None:
        """Say what is to be expected, by the steps so far; --check says it before, of evaluations too."""
        if self.config.quiet:
            return
        self._settle()
        device, epochs = self.hardware.device, self.total_steps / self.steps_per_epoch
        spent = self.state.seconds - (0 if self.fixed is None else self.fixed.setup_seconds)
        seconds = spent / self.state.tokens * int(self.data["train"].lengths.sum()) * epochs
        memory = f"{peak_memory(device) / 2**30:.1f} GiB of {'GPU ' * (device.type == 'cuda')}memory so far"
        self.say(f"expect  {duration(seconds)} for {self.total_steps} steps; {memory}")

    def _step(self, step: Step) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        on_gpu = self.hardware.device.type == "cuda"
        if on_gpu or self.fixed is not None:
            # Of torch's generator, which draws dropout here: a function of seed and step, as our own masks are.
            seed = (self._dropout_seed() * 1_000_003 + self.state.step) % (1 << 63)
            (torch.cuda.manual_seed if on_gpu else torch.manual_seed)(seed)
        result = None
        while result is None:
            result = self._attempt(step)
        self.state.step += 1
        self.state.tokens += step.tokens
        self.state.examples += step.examples
        self.state.seconds += time.perf_counter() - started
        return result

    def _attempt(self, step: Step) -> tuple[Tensor, Tensor] | None:
        """The step, or None where memory runs out: the next attempt then computes it in smaller pieces.

        Losses are summed and divided as before, so the effective batch is the same; only dropout draws differ.
        """
        pieces = self._pieces(step)
        with self.hardware.computing(), self._compile_errors():
            result = attempt(lambda: self._train_step(step, pieces))
        if result is not None:
            return result
        self._shrink(step, pieces)
        return None

    def _probe(self) -> None:
        """See on a GPU whether the largest batch fits before the first step, and cut batches until it does."""
        if self.hardware.device.type == "cpu":
            return
        largest = max(self._steps_of_epoch(0), key=lambda step: step.tokens)
        with self._compile_errors():
            while attempt(lambda: self._passes(self._pieces(largest))) is None:
                self._shrink(largest, self._pieces(largest))
        self.optimizer.drop_gradients()
        if self.fixed is not None:
            self.fixed.setup_seconds = 0.0  # from here on within steps

    def _compile_errors(self) -> AbstractContextManager[None]:
        """Around steps: what torch.compile throws becomes a UserError."""
        return nullcontext() if self.regions is None else self.regions.errors()

    def _passes(self, pieces: list[np.ndarray]) -> bool:
        """Forward and backward, without an update."""
        train, device = self.data["train"], self.hardware.device
        for rows in pieces:
            if self.fixed is not None:
                self.fixed.passes(train.batch(rows), train.targets_of(rows, torch.device("cpu")))
                continue
            with self.hardware.autocast():
                logits = self.model.logits(self.hardware.place(train.batch(rows)), self._masks())
            self.problem.loss_sum(logits, train.targets_of(rows, device), None, 0.0).backward()
        return True

    def _shrink(self, step: Step, pieces: list[np.ndarray]) -> None:
        """From here on cut batches to half the tokens that memory could not hold; UserError for a single example."""
        self.optimizer.drop_gradients()
        if self.fixed is not None:
            self.fixed.places.clear()  # their tensors are what the memory went to
        if max(len(rows) for rows in pieces) == 1:
            raise UserError(
                f"not enough memory to train on one example; {self._where(step)}; use a smaller --max-length or model"
            )
        tokens = max(int(self.data["train"].lengths[rows].sum()) for rows in pieces if len(rows) > 1)
        self.state.most_tokens = tokens // 2
        self.say(f"memory ran out at step {self.state.step + 1}: batches now in pieces of {tokens // 2} tokens")

    def _pieces(self, step: Step) -> list[np.ndarray]:
        """This process's part of the step's batches, each cut to what memory has been found to hold."""
        lengths = self.data["train"].lengths
        own = [split_by_tokens(rows, lengths, distributed.world())[distributed.rank()] for rows in step.batches]
        own = [rows for rows in own if len(rows)]
        if not self.state.most_tokens:
            return own
        return [piece for rows in own for piece in cut_into_batches(rows, lengths, None, self.state.most_tokens)]

    def _train_step(self, step: Step, pieces: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        hardware, train = self.hardware, self.data["train"]
        if self.fixed is not None:
            batches = [(train.batch(rows), train.targets_of(rows, torch.device("cpu"))) for rows in pieces]
            return self.fixed.step(batches, self.state.step, step.denominator)
        assert isinstance(self.optimizer, Optimizer)
        return train_step(
            self.model,
            self.problem,
            self.optimizer,
            [(hardware.place(train.batch(rows)), train.targets_of(rows, hardware.device)) for rows in pieces],
            step=self.state.step,
            denominator=step.denominator,
            masks=self._masks(),
            hardware=hardware,
            class_weights=self.weights_tensor,
            label_smoothing=self.config.label_smoothing,
            sample_weights=self._sample_weights(pieces),
        )

    def _sample_weights(self, pieces: list[np.ndarray]) -> list[Tensor] | None:
        weights, device = self.data["train"].weights, self.hardware.device
        return None if weights is None else [torch.from_numpy(weights[rows]).to(device) for rows in pieces]

    def _masks(self) -> DropoutMasks:
        """Of the step that comes."""
        seed, rng = self._dropout_seed(), None
        if self.hardware.attention == "triton":
            rng = torch.tensor([seed, self.state.step], pin_memory=True).to(self.hardware.device, non_blocking=True)
        return DropoutMasks(seed, self.state.step, rng, plain=rng is not None)

    def _dropout_seed(self) -> int:
        """Each process drops other elements."""
        return self.config.seed ^ (distributed.rank() << 40)

    def _count_bad_steps(self) -> None:
        """Count steps skipped in a row; after BAD_STEPS the run ends, and its last checkpoint stays as it is."""
        found = torch.stack([bad for _, bad in self.unchecked]).tolist() if self.unchecked else []  # waits once
        for (step, _), bad in zip(self.unchecked, found, strict=True):
            self.state.bad_in_row = self.state.bad_in_row + 1 if bad else 0
            if self.state.bad_in_row == BAD_STEPS:
                raise Diverged(
                    f"loss or gradient not finite for {BAD_STEPS} steps in a row, up to step {self.state.step}; "
                    f"{self._where(step)}; look at these rows, or lower --learning-rate. The last checkpoint is good"
                )
        self.unchecked = []

    def _where(self, step: Step) -> str:
        """The lines of a step's rows in their file."""
        data, rows = self.data["train"], np.sort(np.concatenate(step.batches))
        lines = [data.lines[row] if data.lines else int(row) for row in rows]
        named = ", ".join(map(str, lines[:ROWS_NAMED])) + (", ..." if len(lines) > ROWS_NAMED else "")
        return f"the last batch holds {data.source or 'training'} rows {named}"

    def _settle(self) -> None:
        """Wait for the device, so that its time counts as training and not as what comes next."""
        if self.hardware.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()
            self.state.seconds += time.perf_counter() - started

    def _steps_of_epoch(self, epoch: int) -> list[Step]:
        train, config = self.data["train"], self.config
        batches = planned_batches(train.lengths, config, epoch)
        counts = self.problem.example_weights(train.targets, self.weights)
        counts = counts if train.weights is None else counts * train.weights
        steps = []
        for start in range(0, len(batches), config.gradient_accumulation_steps):
            chosen = batches[start : start + config.gradient_accumulation_steps]
            chosen = [part for batch in chosen for part in self.within_budget(batch)]
            rows = np.concatenate(chosen)
            total = float(counts[rows].sum()) or 1.0  # all of classes of weight 0: no loss
            steps.append(Step(chosen, total, int(train.lengths[rows].sum()), len(rows)))
        return steps

    def within_budget(self, rows: np.ndarray) -> list[np.ndarray]:
        """A batch of texts of many windows, cut to what a batch of one window a text may hold; the step stays one."""
        if self.data["train"].tokens.windows is None:
            return [rows]
        limit = self.config.batch_tokens or self.config.batch_size * int(self.data["train"].tokens.lengths.max())
        return cut_into_batches(rows, self.data["train"].lengths, None, limit)

    def _remaining_steps(self) -> Iterator[Step]:
        """The steps from where the run stands to its end, epoch after epoch."""
        epoch_start = 0
        for epoch in itertools.count():
            steps = self._steps_of_epoch(epoch)
            for step in steps[max(0, self.state.step - epoch_start) :]:
                if self.state.step >= self.total_steps or self._out_of_patience():
                    return
                yield step
            epoch_start += len(steps)

    def _evaluation_due(self, at_end: bool) -> bool:
        if "validation" not in self.data:
            return False
        return at_end or self.state.step % (self.config.eval_steps or self.steps_per_epoch) == 0

    def _save_due(self) -> bool:
        """Every --save-steps, but not amid steps that are skipped: the last good checkpoint is the one to keep."""
        every = self.config.save_steps
        return every is not None and self.state.step % every == 0 and not self.state.bad_in_row

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _evaluate_and_keep_best(self, log: IO[str], progress: tqdm[Any]) -> None:
        self.optimizer.flush()
        self._settle()
        data = self.data["validation"]
        logits = compute_logits(self.model, data, self.hardware, all_ranks=True)
        metrics = self.problem.tuned(logits, data.targets).metrics(logits, data.targets)
        sound = bool(np.isfinite(logits).all())  # argmax makes something of NaN, but no diverged weights are the best
        value = distributed.from_first(metrics[self.metric] if sound else None)  # machines may round, but must agree
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        if value is None or not math.isfinite(value):  # undefined, as Pearson's of equal predictions is
            value = -sign * math.inf
        if self.state.best_value is None or sign * value > sign * self.state.best_value:
            self.state.best_value, self.state.best_step, self.state.evaluations_since_best = value, self.state.step, 0
            self.best_logits = logits
            self.best = {name: p.detach().clone() for name, p in self.trained_parameters()}
        else:
            self.state.evaluations_since_best += 1
        numbers = {name: v for name, v in metrics.items() if isinstance(v, float | int)}
        line = {f"validation_{name}": v if math.isfinite(v) else None for name, v in numbers.items()}
        self._write_line(log, {"step": self.state.step, "epoch": self.epoch, **line})
        self.shown[self.metric] = f"{value:.4f}"
        progress.set_postfix(self.shown, refresh=False)

    def _log_step(self, log: IO[str], progress: tqdm[Any], norm: Tensor) -> None:
        """Write the loss since the last line, and what goes with it; this waits for the device."""
        self._settle()
        loss = float(torch.stack(self.recent_losses).mean())
        self.recent_losses = []
        self.state.skipped = int(self.optimizer.skipped)
        line = {
            "step": self.state.step,
            "epoch": self.epoch,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": self.optimizer.learning_rate,
            "grad_norm": float(norm) if math.isfinite(float(norm)) else None,
            "tokens_per_second": round(self.state.tokens / max(self.state.seconds, 1e-9), 1),
        }
        self._write_line(log, line)
        progress.set_description(f"epoch {self.epoch:.1f} loss {loss:.4f}", refresh=False)
        self.shown["tokens/s"] = f"{line['tokens_per_second']:.0f}"
        progress.set_postfix(self.shown, refresh=False)

    def _write_line(self, log: IO[str], line: dict[str, Any]) -> None:
        with writing(Path(log.name)):
            log.write(json.dumps(line) + "\n")
            log.flush()
        if self.watch is not None:
            self.watch(line)

    def _progress(self) -> tqdm[Any]:
        total = round(self.total_steps / self.steps_per_epoch * len(self.data["train"]))
        hidden = True if self.config.quiet else None  # None: only on a terminal
        return tqdm(total=total, initial=self.state.examples, unit=" examples", disable=hidden, leave=False)

    @property
    def epoch(self) -> float:
        return round(self.state.step / self.steps_per_epoch, 4)

    def padding_fractions(self) -> tuple[float, float]:
        """Shares of padding in the first epoch's batches: inside attention, and in all else, which packs its tokens."""
        tokens, padded = self.data["train"].tokens, self.hardware.attention == "sdpa"
        if self.fixed is None and not padded:
            return 0.0, 0.0
        inside = elsewhere = 0
        for rows in (rows for step in self._steps_of_epoch(0) for rows in step.batches):
            lengths = np.sort(tokens.lengths[rows if tokens.windows is None else flat_indices(tokens.windows, rows)])
            if self.fixed is not None:
                from minibert.training.graph_step import Bucket

                bucket = Bucket.of(lengths)
                packed, slots = bucket.tokens, bucket.texts * bucket.longest
            else:
                bounds = chunk_bounds(lengths) if self.hardware.device.type == "cpu" else [(0, len(lengths))]
                packed, slots = int(lengths.sum()), sum((end - start) * int(lengths[end - 1]) for start, end in bounds)
            inside += slots if padded else packed
            elsewhere += packed
        return 1 - len(tokens.ids) / inside, 1 - len(tokens.ids) / elsewhere

    def trained_parameters(self) -> list[tuple[str, Tensor]]:
        """By name, as the last step left them."""
        self.optimizer.flush()
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def use_best_weights(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.best:
                    parameter.copy_(self.best[name])


def _sync(log: IO[str]) -> None:
    if not distributed.is_first():
        return
    with writing(Path(log.name)):
        os.fsync(log.fileno())


@contextmanager
def _log_from(path: Path, start: int) -> Iterator[IO[str]]:
    """The log, cut back to where the run stands: steps after the checkpoint will be written again."""
    if not distributed.is_first():
        with open(os.devnull, "w", encoding="utf-8") as log:
            yield log
        return
    with writing(path):
        log = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    try:
        if log.tell() < start:
            raise UserError(f"{path}: shorter than when the checkpoint was written; put it back, or start anew")
        with writing(path):
            log.truncate(start)
            log.seek(0, os.SEEK_END)
        yield log
    finally:
        with suppress(OSError):  # lines that a full disk did not take
            log.close()


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the loop ends between two steps; a second one ends at once.

    torchrun repeats the signal by itself, sends SIGTERM to all when one has died, and kills what has not ended after
    half a minute: there it is only noted, and a process on its way out with an error has the time to tell it.
    """
    noted: list[int] = []
    leaving = True

    def note(number: int, _frame: object) -> None:
        if noted and not distributed.joined():
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
        leaving = bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if leaving and distributed.joined() else handler)
