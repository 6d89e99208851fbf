"""What a run will cost, measured on a few of its own steps: seconds and memory.

Seconds are proportional to tokens; each kind of work (a training step, an evaluation, frozen layers) has its own rate.
Memory is the peak after the run's largest batch, or scaled up from a smaller one where that would take too long.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.config import RecipeSettings, RunConfig
from minibert.data.loading import RunData
from minibert.filenames import CHECK
from minibert.inference.logits import compute_logits
from minibert.problem.problem import class_weights
from minibert.reporting.console import describe
from minibert.reporting.data_summary import summary_lines, truncate
from minibert.runs.setup import Job, get_ready, prepare_sets, start_head
from minibert.runtime.device import duration, peak_memory
from minibert.runtime.files import write_json
from minibert.training.head_start import ROWS, sampled_rows
from minibert.training.loop import Training
from minibert.training.plan import PlannedStep, planned_batches, total_steps, within_budget

logger = logging.getLogger(__name__)

TIMED_BATCHES = 4
PATIENCE = 20.0  # seconds, after which no further batch is timed
SAMPLE_ROWS = 256  # whose evaluation is timed


def check(config: RunConfig, data: RunData) -> None:
    """--check: print what data and model are like and what the run would cost; check.json in --output, if given."""
    job = get_ready(config, data)
    describe(job.config, job.report, job.hardware, job.frozen, config.model is not None)
    logger.info("\n".join(summary_lines(job.inspection)))
    cost = expected_cost(job)
    logger.info(truncate([cost.line()])[0])
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CHECK, job.inspection.to_dict() | {"cost": cost.to_dict()})


def expected_cost(job: Job) -> Cost:
    """Measure a few steps. Frozen layers are computed for a sample only, and their share scaled up."""
    problem, config = job.data.problem, job.config
    lengths = {part: dataset.lengths for part, dataset in job.sets.items()}
    weights = class_weights(problem, config.class_weights, job.sets["train"].targets)
    cached = job.frozen >= 1 and config.cache_frozen
    of_probe = probe_seconds(job, weights)
    if cached:
        job = replace(job, sets={"train": job.sets["train"].take(sample_rows(lengths["train"], config))})
    started = time.perf_counter()
    prepare_sets(replace(job, config=replace(config, quiet=True)))
    seconds, activations = time.perf_counter() - started, job.sets["train"].frozen
    whole, seen = (sum(int(each.sum()) for each in part) for part in (lengths.values(), [job.sets["train"].lengths]))
    factor = whole / seen if cached else 1
    setup_bytes = 0 if activations is None else int(activations.values.nbytes * factor)
    training = Training(job.model, problem, job.sets, config, job.hardware, weights)
    return measure(training, lengths, seconds * factor + of_probe, setup_bytes)


def probe_seconds(job: Job, weights: np.ndarray | None) -> float:
    """What the linear probe of a new head takes, above all the encoder's pass over its rows: by a sample of them."""
    config, train = job.config, job.sets["train"]
    features_are_cached = config.freeze == "all" and config.cache_frozen
    if not job.head_is_new or config.head_init != "probe" or features_are_cached:
        return 0.0
    rows = sampled_rows(train.targets, job.data.problem, ROWS)
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(np.int64)]
    started = time.perf_counter()
    start_head(replace(job, config=replace(config, quiet=True), sets={"train": train.take(sample)}), weights, False)
    return (time.perf_counter() - started) * int(train.lengths[rows].sum()) / int(train.lengths[sample].sum())


@dataclass(frozen=True)
class Cost:
    """What a run is expected to take on this machine."""

    steps: int
    tokens_per_epoch: int
    seconds: float
    train_seconds: float
    seconds_per_step: float
    peak_memory_bytes: int
    memory_of: str  # "process" or "GPU"
    measured_steps: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def line(self) -> str:
        memory = f"{self.peak_memory_bytes / 2**30:.1f} GiB of {'GPU ' * (self.memory_of == 'GPU')}memory at its peak"
        each = f"{self.steps} steps of {self.seconds_per_step:.3g} s"
        return f"cost    about {duration(self.seconds)}: {each}, and evaluation; about {memory}"


def measure(training: Training, lengths: dict[str, np.ndarray], setup_seconds: float, setup_bytes: int) -> Cost:
    """Train on a few batches of `training`, which is spoilt by it.

    lengths: of the texts of each part of the run, of which `training` may hold a sample; setup_seconds, setup_bytes:
    what is spent once, before training.
    """
    config, train = training.config, training.data["train"]
    batches = [part for rows in planned_batches(train.lengths, config) for part in within_budget(rows, train, config)]
    sizes = np.array([int(train.lengths[rows].sum()) for rows in batches])
    order = np.argsort(sizes)
    trained = sum(p.numel() * p.element_size() for _, p in training.trained_parameters())
    base = peak_memory(training.hardware.device) + 3 * trained  # with gradients and the optimiser's moments
    run_batch = _batch_runner(training)
    run_batch(batches[order[len(order) // 2]])  # not timed: the first step also makes all that
    seconds, timed = 0.0, []
    for place in np.linspace(0, len(order) - 1, TIMED_BATCHES + 2)[1:-1].round().astype(int):
        if training.body.fixed_shapes:
            run_batch(batches[order[place]])  # the first of its shape is captured, which takes far longer than a step
        seconds += run_batch(batches[order[place]])
        timed.append(order[place])
        if seconds > PATIENCE:
            break
    rate = seconds / float(sizes[timed].sum())
    largest = _within_patience(batches[order[-1]], train, rate)
    run_batch(largest)
    peak = peak_memory(training.hardware.device)
    share = int(train.lengths[largest].sum()) / int(sizes[order[-1]])
    if share < 1:
        peak = max(peak, base + int((peak - base) / share))
    steps_per_epoch = math.ceil(len(planned_batches(lengths["train"], config)) / config.gradient_accumulation_steps)
    steps = total_steps(steps_per_epoch, config)
    tokens = {part: int(each.sum()) for part, each in lengths.items()}
    train_seconds = rate * tokens["train"] * steps / steps_per_epoch
    evaluations = math.ceil(steps / (config.eval_steps or steps_per_epoch))
    read_again = tokens.get("validation", 0) * evaluations + tokens.get("test", 0)
    return Cost(
        steps=steps,
        tokens_per_epoch=tokens["train"],
        seconds=round(setup_seconds + train_seconds + _evaluation_rate(training) * read_again, 4),
        train_seconds=round(train_seconds, 4),
        seconds_per_step=round(train_seconds / steps, 4),
        peak_memory_bytes=peak + setup_bytes + 2 * trained,  # and the best weights, old and new for a moment
        memory_of="GPU" if training.hardware.device.type == "cuda" else "process",
        measured_steps=len(timed) + 2,
    )


def sample_rows(lengths: np.ndarray, config: RecipeSettings) -> np.ndarray:
    """Rows enough for `measure`: some of every length, and those of the largest batch."""
    order = np.argsort(lengths, kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(len(order), 6 * config.batch_size)).astype(np.int64)]
    return np.unique(np.concatenate([spread, order[-config.batch_size :]]))


def _batch_runner(training: Training) -> Callable[[np.ndarray], float]:
    """A function that trains on one batch of row numbers and returns the seconds it took."""
    device, lengths = training.hardware.device, training.data["train"].lengths

    def run(rows: np.ndarray) -> float:
        started = time.perf_counter()
        training.step(PlannedStep([rows], float(len(rows)), int(lengths[rows].sum()), len(rows)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return run


def _within_patience(rows: np.ndarray, train: Dataset, rate: float) -> np.ndarray:
    """As many rows of a batch as can be trained on in time, one at least."""
    ends = np.cumsum(train.lengths[rows])
    return rows[: max(1, int(np.searchsorted(ends, PATIENCE / rate, side="right")))]


def _evaluation_rate(training: Training) -> float:
    """Seconds a token of evaluation."""
    data = training.data.get("validation", training.data["train"])
    if data.frozen is None:  # else it is a sample already
        data = data.take(np.linspace(0, len(data) - 1, min(len(data), SAMPLE_ROWS)).astype(np.int64))
    started = time.perf_counter()
    compute_logits(training.model, data, training.hardware)
    return (time.perf_counter() - started) / int(data.lengths.sum())
