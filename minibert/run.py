"""A whole run, top to bottom: data, model, training, evaluation, and the folder that it leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minibert.config import OutputSettings, RunConfig
from minibert.data.in_memory import load_in_memory
from minibert.data.loading import RunData, load_data
from minibert.errors import UserError
from minibert.filenames import CHECKPOINTS, TRAIN_LOG
from minibert.inference.classifier import Classifier
from minibert.problem.problem import class_weights
from minibert.reporting.console import Progress, console, describe, summarise
from minibert.reporting.data_summary import summary_lines
from minibert.runs.check import check
from minibert.runs.finish import evaluate_splits, finish
from minibert.runs.folder import open_output, refuse_at_once
from minibert.runs.record import begun_with, fingerprint_of, first_command, must_be_alike, run_record, write_record
from minibert.runs.search import Encoded, Watch, run_search
from minibert.runs.seeds import run_each_seed
from minibert.runs.setup import Job, get_ready, prepare_sets, recipe_lines, start_head
from minibert.runs.trackers import Trackers, open_trackers
from minibert.runtime import distributed
from minibert.training.compact_vocabulary import CompactVocabulary
from minibert.training.loop import Interrupted, Training
from minibert.training.resume import (
    STATE_FILE,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    share_checkpoint,
    weights_digest,
)

logger = logging.getLogger(__name__)
DEMO_DATA = Path(__file__).parent / "demo" / "messages.csv"


def run_from_files(given: dict[str, Any], command: list[str]) -> Classifier | None:
    """The command line's run: read files, train, save, print; with --check, look and train nothing.

    given: the settings that flags or a --config file name.
    """
    config = RunConfig(**given)
    if config.train is None and config.resume and config.output is not None:
        config = RunConfig(**begun_with(Path(config.output), config) | given)
    elif config.train is None:
        if config.validation or config.test:
            raise UserError("--train is missing: give the training file beside the others")
        config = RunConfig(**demonstration() | given)
    with distributed.processes(config), console(quiet_here(config)):
        refuse_at_once(config)
        if config.check:
            check(config, load_data(config))
            return None
        return published(run(config, load_data(config), command), config)


def demonstration() -> dict[str, Any]:
    """The bundled data, a part of it to test on."""
    return {"train": str(DEMO_DATA), "test_split": 0.15}


def run_in_memory(config: RunConfig, given: dict[str, Any], sample_weight: Iterable[float] | None = None) -> Classifier:
    """The Python API's run: the same, from lists and tables."""
    with distributed.processes(config), console(quiet_here(config)):
        refuse_at_once(config)
        data = load_in_memory(given, config, sample_weight)
        return published(run(config, data, ["minibert.finetune(...)"]), config)


def published(classifier: Classifier, config: OutputSettings) -> Classifier:
    """The same, after --push-to-hub."""
    if config.push_to_hub is not None and distributed.is_main_process():
        address = classifier.push_to_hub(config.push_to_hub)
        logger.info(f"published: {address}")
    return classifier


def quiet_here(config: OutputSettings) -> bool:
    """Whether this process says nothing: one of several, or --quiet, which --check does not heed."""
    return (config.quiet and not config.check) or not distributed.is_main_process()


def run(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """Train on prepared data and leave the output folder of the contract."""
    if config.search is not None:
        return run_search(config, data, command, train_run, finish_run)
    if config.seeds:
        return run_each_seed(config, data, command, run)
    with ExitStack() as held:  # the output folder, against a second run
        return finish_run(train_run(config, data, command, held))


@dataclass
class Trained:
    """A run whose training is over: what is left is to evaluate it and to write its folder."""

    job: Job
    training: Training
    output: Path
    record: dict[str, Any]
    trackers: Trackers
    compact: CompactVocabulary | None
    moments: list[float]


def train_run(
    config: RunConfig,
    data: RunData,
    command: list[str],
    held: ExitStack,
    watch: Watch = lambda line: None,
    encoded: Encoded | None = None,
) -> Trained:
    """The run up to the end of its training.

    `watch` is given each line of the log; what it raises ends the run. `encoded` holds the tokens of each part that
    an earlier run on the same data has encoded, and takes up those that are missing.
    """
    moments = [time.perf_counter()]
    config = replace(config, quiet=config.quiet or not distributed.is_main_process())
    job = get_ready(config, data, encoded)
    describe(job.config, job.report, job.hardware, job.frozen, config.model is not None)
    for line in [*summary_lines(job.inspection), *recipe_lines(job)]:
        logger.info(line)

    weights = class_weights(data.problem, config.class_weights, job.sets["train"].targets)
    fingerprint = fingerprint_of(job.config, data, job.tokenizer, job.hardware, weights_digest(job.model), weights)
    if distributed.world_size() > 1:
        logger.info(f"spread  over {distributed.world_size()} processes, each batch split by tokens")
        distributed.check_same_on_all_ranks(must_be_alike(fingerprint, job.model.config, job.sets))
    compact = prepare_sets(job)
    start_head(job, weights, resumed=has_checkpoint(config))
    if distributed.world_size() > 1:
        distributed.broadcast_parameters(job.model)
    fitted = job.head_is_new and job.config.head_init == "probe"
    training = Training(job.model, data.problem, job.sets, job.config, job.hardware, weights, logger.info, fitted)
    job.hardware = training.hardware  # eager, where the engine that `auto` chose does not work
    fingerprint["hardware"] = str(job.hardware)
    moments.append(time.perf_counter())
    output = open_output(config, held)  # the last thing before training: an earlier run there is safe from mistakes
    record = run_record(job.config, data, first_command(output, command) if config.resume else command)
    record["automatic"] = list(job.automatic)
    begin(job, training, output, record, fingerprint)
    moments = [moment - training.state.seconds for moment in moments]  # a resumed run has trained before
    trackers = begin_tracking(job.config, output, record, training.state.step)
    held.callback(trackers.stop)  # however this ends; else its run would seem to go on
    train(training, output, fingerprint, trackers, watch)
    moments.append(time.perf_counter())
    return Trained(job, training, output, record, trackers, compact, moments)


def finish_run(run: Trained) -> Classifier:
    """Evaluate a trained model and leave the output folder of the contract."""
    job, training, output = run.job, run.training, run.output
    metrics, logits, calibration = evaluate_splits(training)
    problem = replace(job.data.problem, calibration=calibration)
    job = replace(job, data=replace(job.data, problem=problem))
    if run.compact is not None:
        run.compact.expand()
    classifier = job.classifier()
    classifier.folder, classifier.metrics = output, metrics
    if distributed.is_main_process():
        judged = finish(job, training, classifier, output, run.record, metrics, logits, run.moments)
        run.trackers.finish(metrics, output)
        summarise(output, metrics, job.model.mlp_size, job.data.columns.pair is not None, judged, training.metric)
        if not job.config.keep_checkpoint:
            remove_checkpoint(output)
    return classifier


def begin(
    job: Job,
    training: Training,
    output: Path,
    record: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """Put a resumed run where its checkpoint stood, and write down what this run is."""
    first = distributed.is_main_process()  # it alone reads and writes the folder
    if job.config.resume and not has_checkpoint(job.config):
        logger.info("no checkpoint yet: from the beginning")
    elif job.config.resume:
        if first:
            load_checkpoint(output / CHECKPOINTS, training, fingerprint)
        share_checkpoint(training)
        logger.info(f"resumed at step {training.state.step} of {training.total_steps}")
    if first:
        write_record(output, record, job.inspection, job.config, job.data)


def has_checkpoint(config: OutputSettings) -> bool:
    """Whether the run goes on from a checkpoint, by the first process's folder."""
    state = Path(config.output or "") / CHECKPOINTS / STATE_FILE
    return bool(distributed.broadcast(config.resume and distributed.is_main_process() and state.is_file()))


def begin_tracking(config: OutputSettings, output: Path, record: dict[str, Any], step: int) -> Trackers:
    """The first process alone reports."""
    config = config if distributed.is_main_process() else replace(config, report_to=())
    return open_trackers(config, output, record, step)


def train(training: Training, output: Path, fingerprint: dict[str, Any], trackers: Trackers, watch: Watch) -> None:
    """Train to the end, with checkpoints and tracker; KeyboardInterrupt after a checkpoint where asked to stop."""
    save = partial(save_checkpoint, output / CHECKPOINTS, training, fingerprint)
    progress = Progress(training)

    def log(line: dict[str, Any]) -> None:
        trackers.log(line)
        progress.log(line)
        watch(line)

    try:
        training.run(output / TRAIN_LOG, save if distributed.is_main_process() else lambda: None, log)
    except Interrupted:
        logger.info(f"checkpoint at step {training.state.step}; continue with --resume --output {output}")
        distributed.barrier()
        raise KeyboardInterrupt from None
