"""What a run leaves once it has trained: metrics, predictions, the saved model, report and card."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minibert.data.examples import Examples
from minibert.filenames import METRICS, TRAIN_LOG, predictions_file
from minibert.inference.classifier import Classifier, load
from minibert.inference.hub import write_gitignore
from minibert.inference.logits import check_finite, compute_logits
from minibert.inference.predictions import write_predictions
from minibert.problem.baseline import collapsed, majority_baseline
from minibert.problem.calibration import calibration_metrics, fit_calibration
from minibert.problem.problem import REGRESSION, Calibration
from minibert.reporting.advice import advice
from minibert.reporting.console import terminal_name
from minibert.reporting.html_report import write_report
from minibert.reporting.model_card import write_card
from minibert.reporting.results import Finished, headline
from minibert.runs.setup import Job
from minibert.runtime import distributed
from minibert.runtime.files import write_json, writing
from minibert.training.best import LOWER_IS_BETTER
from minibert.training.loop import Training

RELOADED_TEXTS = 16  # texts whose logits are compared after saving


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
    """Write what a run leaves: model, predictions, metrics, report and card; returns the report's headline."""
    with writing(output):  # a folder deleted meanwhile is not made again, half filled
        output.stat()
    classifier.write(output)
    for part, values in logits.items():
        path, examples = output / predictions_file(part), job.data.splits[part]
        write_predictions(path, examples, job.data.problem, values, job.sets[part].targets)
    state = training.state
    log = log_lines(output)
    best_step = state.step if state.best_value is None else state.best_step  # 0: the head as it was fitted
    metrics["train"] = {"best_step": best_step, "steps": state.step, **last_losses(log)}
    metrics["train"]["advice"] = advice(
        evaluations_of(log), training.metric, training.metric in LOWER_IS_BETTER, training.epoch
    )
    metrics["train"]["advice"] += no_better_than_baseline(training, metrics)
    if probe := probe_scores(log):
        metrics["linear_probe"] = {"validation": probe}
    metrics["speed"] = speed(training, time.perf_counter() - moments[0])
    metrics["reload_max_difference"] = reload_difference(output, classifier, job.data.splits["train"])
    metrics["speed"]["seconds_by_part"] = seconds_by_part(training, [*moments, time.perf_counter()])
    write_json(output / METRICS, metrics)
    finished = Finished(job.config, job.data, job.sets, logits, metrics, record)
    write_report(output, finished)
    write_card(output, finished)
    write_gitignore(output)
    text, label = headline(finished)
    return text.format(label=f"“{terminal_name(label)}”")


def evaluate_splits(training: Training) -> tuple[dict[str, Any], dict[str, np.ndarray], Calibration]:
    """Metrics and logits of validation and test with the best weights, and what was fitted on validation."""
    metrics: dict[str, Any] = {}
    logits: dict[str, np.ndarray] = {}
    problem = training.problem
    for part in ("validation", "test"):
        if part in training.data:
            data = training.data[part]
            known = training.best.logits if part == "validation" else None
            if known is None:
                known = compute_logits(training.model, data, training.hardware, all_ranks=True)
            logits[part] = known = check_finite(known)
            if part == "validation":
                fitted = fit_calibration(problem, known, data.targets, training.config.temperature)
                problem = replace(problem, calibration=fitted)
            metrics[part] = problem.metrics(known, data.targets)
            if problem.thresholds:
                untuned = replace(problem, calibration=Calibration(problem.temperature)).metrics(known, data.targets)
                names = ("micro_f1", "macro_f1", "subset_accuracy")
                metrics[part]["at_threshold_0.5"] = {name: untuned[name] for name in names}
    if logits and problem.kind != REGRESSION:
        targets = {part: training.data[part].targets for part in logits}
        metrics["calibration"] = calibration_metrics(problem, logits, targets)
    return metrics, logits, problem.calibration


def no_better_than_baseline(training: Training, metrics: dict[str, Any]) -> list[str]:
    """A line where the model has learned nothing that the labels' frequencies do not say."""
    if "validation" not in metrics or not len(training.data["validation"].targets):
        return []
    metric, value = training.metric, metrics["validation"][training.metric]
    baseline = majority_baseline(training.problem, training.data["validation"].targets)[metric]
    (reason,) = collapsed([value], baseline, metric in LOWER_IS_BETTER)
    return [f"{reason} on validation {metric}; more epochs or another --learning-rate may help"] if reason else []


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
    with writing(output / TRAIN_LOG):
        text = (output / TRAIN_LOG).read_text(encoding="utf-8")
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
        "processes": distributed.world_size(),
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
