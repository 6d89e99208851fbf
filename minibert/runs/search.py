"""--search: recipes tried one after another by Optuna, judged on validation; the best one is then finished as a run.

A trial is an ordinary run in the folder `trial-N`, up to the end of its training: it starts from the same weights and
the same encoded texts as the others, and no test row is scored. `search.json` is written after each trial; --resume
goes on with Optuna's journal beside it and with the checkpoint of the trial that was under way.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.data.loading import RunData
from minibert.errors import UserError
from minibert.inference.classifier import Classifier
from minibert.problem.problem import class_weights
from minibert.reporting.console import describe, only_warnings
from minibert.reporting.data_summary import summary_lines
from minibert.reporting.format import fixed
from minibert.reporting.search_report import described, table_lines
from minibert.runs.folder import clear, output_folder, remove_runs, remove_trials, trial_folder
from minibert.runs.record import common_fingerprint
from minibert.runs.search_study import (
    Search,
    begin_search,
    summary_of,
    trial_command,
    trial_config,
    trial_record,
    write_summary,
)
from minibert.runs.setup import get_ready
from minibert.runtime.device import duration
from minibert.runtime.files import locked, one_line, writing
from minibert.training.best import checked_metric
from minibert.training.loop import Diverged

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

RANDOM_TRIALS = 6  # before Optuna's model (TPE) proposes recipes
Watch = Callable[[dict[str, Any]], None]
logger = logging.getLogger(__name__)

Encoded = dict[str, Tokens]  # the encoded texts of each part
Train = Callable[[RunConfig, list[str], Watch], float | None]


def run_search(
    config: RunConfig,
    data: RunData,
    command: list[str],
    train_run: Callable[..., Any],
    finish_run: Callable[[Any], Classifier],
) -> Classifier:
    """--search: trials of recipes, judged on validation; the best one is then finished, its test rows scored."""
    if "validation" not in data.splits:
        raise UserError("--search: no validation rows to judge trials by; give --validation or a --validation-split")
    encoded: Encoded = {}
    job = get_ready(config, data, encoded)
    metric = checked_metric(data.problem, config, job.sets["train"].targets)
    class_weights(data.problem, config.class_weights, job.sets["train"].targets)
    describe(job.config, job.report, job.hardware, job.frozen, config.model is not None)
    for line in summary_lines(job.inspection):
        logger.info(line)
    output = output_folder(config)
    config = replace(config, output=str(output))
    fingerprint = common_fingerprint(config, data)
    bert, ready = job.model.config, job.config
    del job  # each trial loads the weights anew

    def train_trial(one: RunConfig, words: list[str], watch: Watch) -> float | None:
        with ExitStack() as held, only_warnings():
            return train_run(one, data, words, held, watch, encoded).training.state.best_value

    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output):  # each trial locks its own folder, too
            if not config.resume:
                clear(output)
                remove_runs(output)
                remove_trials(output)
            search = begin_search(config, bert, ready, metric, fingerprint)
            number, best, words = run_trials(search, command, train_trial)
            if trial_folder(output, number).is_dir():
                clear(output)
                move_up(trial_folder(output, number), output)
    except KeyboardInterrupt:
        logger.info(f"for the whole search: the same command with --resume --output {output}")
        raise
    with ExitStack() as held:
        with only_warnings():  # its training is over: this reads the checkpoint
            trained = train_run(replace(best, resume=True), data, words, held, encoded=encoded)
        classifier = finish_run(trained)
    logger.info(f"the same model again: {shlex.join(words) if len(words) > 1 else words[0]}")
    return classifier


def move_up(folder: Path, output: Path) -> None:
    """Move what a trial left to the top; its checkpoint last, so that what was stopped can be done again."""
    for path in sorted(folder.iterdir(), key=lambda path: path.is_dir()):
        os.replace(path, output / path.name)
    folder.rmdir()


def run_trials(search: Search, command: list[str], train: Train) -> tuple[int, RunConfig, list[str]]:
    """Train trial after trial until the budget is used up; returns the best one's number, settings and command."""
    search.command = command
    write_summary(search)
    while not search.is_over():
        trial = next_trial(search)
        run_trial(search, trial, train)
        gc.collect()  # a trial's model and optimiser refer to each other: memory for the next one
        write_summary(search)
        clear_trials(search)
        announce(search, search.finished[-1])
    best = search.best
    if best is None:
        raise UserError("--search: no trial came to a result; try another model, or look at the data with --check")
    logger.info("\n" + "\n".join(table_lines(summary_of(search))))
    number = search.number(best)
    config = trial_config(search, number, best.params)
    return number, config, trial_command(config, search.command)


def next_trial(search: Search) -> Trial:
    """The trial that a killed search was at, or a new one; the first is the recipe as it was given."""
    import optuna

    study = search.study
    for known in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        if set(known.params) == set(search.space):
            return optuna.trial.Trial(study, known._trial_id)
        study.tell(known.number, state=optuna.trial.TrialState.FAIL)  # killed while it was proposed
    if not search.proposed:
        start = {name: search.start[name] for name in search.space}
        study.enqueue_trial(start | {"epochs": round(start["epochs"])} if "epochs" in start else start)
    # A sampler for each trial: a resumed search proposes what one that was never stopped would.
    seed = (search.given.seed + len(search.proposed)) % (1 << 32)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
    return study.ask(fixed_distributions=search.space)


def run_trial(search: Search, trial: Trial, train: Train) -> None:
    """Train one recipe and tell Optuna what came of it."""
    from optuna import TrialPruned
    from optuna.trial import TrialState

    number = search.number(trial)
    one = trial_config(search, number, trial.params)
    command, folder = trial_command(one, search.command), trial_folder(search.output, number)
    one = replace(one, output=str(folder), resume=True, quiet=True, overwrite=False)
    started = time.monotonic()
    value, reason = None, ""
    try:
        value = train(one, command, watcher(search, trial, started))
        reason = "" if value is not None and math.isfinite(value) else f"{search.metric} is undefined"
    except TrialPruned as stop:
        reason = str(stop)
    except Diverged as error:
        reason = f"diverged: {one_line(error)}"
    trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
    trial.set_user_attr("reason", reason)
    if reason:
        search.study.tell(trial, state=TrialState.PRUNED)
    else:
        search.study.tell(trial, value)


def watcher(search: Search, trial: Trial, started: float) -> Watch:
    """Reports the evaluations of a trial, and ends it where it is behind the others or the time is over."""
    from optuna import TrialPruned

    name, spent = f"validation_{search.metric}", search.spent()
    every, first = search.given.eval_steps, search.number(trial) == 1
    known = set(search.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def watch(line: dict[str, Any]) -> None:
        if line.get(name) is None:
            return
        number = math.ceil(line["step"] / every if every else line["epoch"])  # of the evaluation
        if number not in known:
            trial.report(line[name], number)
            known.add(number)
        if not first and trial.should_prune():
            raise TrialPruned(f"behind the median at evaluation {number}")
        if not first and search.seconds and spent + time.monotonic() - started > search.seconds:
            raise TrialPruned("the time was over")

    return watch


def clear_trials(search: Search) -> None:
    """Remove the folders of trials that are done, except the best one's: a checkpoint is as large as four models."""
    best = search.best
    for trial in search.finished:
        if best is None or trial.number != best.number:
            shutil.rmtree(trial_folder(search.output, search.number(trial)), ignore_errors=True)


def announce(search: Search, trial: FrozenTrial) -> None:
    record, best = trial_record(search, trial), search.best
    total = f" of {search.trials}" if search.trials else ""
    result = f"{search.metric} {fixed(record['value'])}" if not record["reason"] else record["reason"]
    found = "none yet" if best is None else f"{fixed(best.value)} (trial {search.number(best)})"
    logger.info(
        f"trial {record['number']}{total} · {result} · best {found} · {described(record['settings'])} · "
        f"{duration(record['seconds'])}, {search.left()} left"
    )
