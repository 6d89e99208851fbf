"""A finished run and its result at a glance: one sentence, metrics worth a tile, the command that repeats it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.batching.dataset import Dataset
from minibert.config import RunConfig
from minibert.data.loading import RunData
from minibert.problem.baseline import majority_baseline
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.reporting.figures import SplitResult
from minibert.reporting.format import fixed
from minibert.runtime.device import duration

MAIN_METRICS = {
    SINGLE: ("macro_f1", "accuracy", "mcc"),
    MULTI: ("micro_f1", "macro_f1", "subset_accuracy"),
    REGRESSION: ("spearman", "pearson", "mae"),
}
OF_TWO_CLASSES = ("roc_auc", "average_precision", "precision_at_recall_50")
TITLES = {
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "mcc": "MCC",
    "subset_accuracy": "all labels right",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "mae": "mean absolute error",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "precision_at_recall_50": "precision at recall 0.5",
}
RESUME = ("--resume", "--resume-from-checkpoint")


@dataclass
class Finished:
    """What is known at the end of a run."""

    config: RunConfig
    data: RunData
    sets: dict[str, Dataset]
    logits: dict[str, np.ndarray]  # [n, L] of validation and test, as far as there are such
    metrics: dict[str, Any]  # metrics.json
    record: dict[str, Any]  # run.json

    @property
    def problem(self) -> Problem:
        return self.data.problem

    @property
    def split(self) -> str | None:
        """The rows to judge by: test, or else validation."""
        return next((name for name in ("test", "validation") if name in self.logits and len(self.logits[name])), None)

    @property
    def model_name(self) -> str:
        """The last part of --model; two parts where the last says nothing."""
        parts = Path(self.config.model or "").parts
        return "/".join(parts[-2:] if parts and parts[-1] == "model" else parts[-1:])

    @property
    def source_name(self) -> str:
        """The training file's name."""
        return Path(self.config.train).name if self.config.train else "texts from Python"

    @property
    def command(self) -> str:
        """The command line, or the call for a run from lists."""
        given = [word for word in self.record["command"] if word.replace("_", "-") not in RESUME]
        if len(given) != 1 or "(" not in given[0]:
            return shlex.join(given)
        return python_call(self.config)

    def result(self, split: str) -> SplitResult:
        targets, examples = self.sets[split].targets, self.data.splits[split]
        return SplitResult(split, self.problem, self.logits[split], targets, self.metrics[split], examples)


class Headline(NamedTuple):
    """One sentence with "{label}" in it where it names a label."""

    text: str
    label: str = ""


def headline(run: Finished) -> Headline:
    """How good, how sure, and compared to the majority baseline."""
    if run.split is None:
        return Headline("No rows were kept for validation or test, so there is nothing to judge the model by.")
    targets, metrics = run.sets[run.split].targets, run.metrics[run.split]
    rows = f"{len(targets):,} {run.split} rows"
    if run.problem.kind == REGRESSION:
        error, of_median = metrics["mae"], majority_baseline(run.problem, targets)["mae"]
        off = "–" if error is None else f"{error:.3g}"
        return Headline(f"Off by {off} on average on {rows}; their median is off by {of_median:.3g}.")
    if run.problem.kind == MULTI:
        right, none = metrics["subset_accuracy"], float((targets.sum(1) == 0).mean())
        known = f"{none:.1%} have none" if none else "all have some"
        return Headline(
            f"All labels right in {right:.1%} of {rows} ({known}); micro F1 {fixed(metrics['micro_f1'], 3)}."
        )
    common = int(np.bincount(targets).argmax())
    low, high = wilson(metrics["accuracy"], len(targets))
    return Headline(
        f"{metrics['accuracy']:.1%} of {rows} right (95% interval {low:.1%} to {high:.1%}); "
        f"always answering {{label}} would get {majority_baseline(run.problem, targets)['accuracy']:.1%}.",
        run.problem.labels[common],
    )


def wilson(fraction: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction of n rows."""
    centre = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


Tile = tuple[str, str, str]  # a name, a value and what stands below it


def tiles(run: Finished) -> list[Tile]:
    found = [] if run.split is None else [*metric_tiles(run, run.split), *calibration_tile(run, run.split)]
    speed = run.metrics["speed"]
    return [
        *found,
        ("training time", duration(speed["train_seconds"]), f"whole run {duration(speed['total_seconds'])}"),
        ("tokens per second", f"{speed['tokens_per_second']:,.0f}", f"{speed['device']} · {speed['precision']}"),
    ]


def metric_tiles(run: Finished, split: str) -> list[Tile]:
    metrics, result = run.metrics[split], []
    for name in dict.fromkeys((*named_metric(run), *MAIN_METRICS[run.problem.kind], *OF_TWO_CLASSES)):
        if metrics.get(name) is not None:
            other = run.metrics.get("validation", {}).get(name) if split == "test" else None
            more = split if other is None else f"test · validation {fixed(other, 3)}"
            result.append((TITLES.get(name, name.replace("_", " ")), fixed(metrics[name], 3), more))
    return result


def named_metric(run: Finished) -> list[str]:
    """What --metric names."""
    return [run.config.metric] if run.config.metric else []


def calibration_tile(run: Finished, split: str) -> list[Tile]:
    if "calibration" not in run.metrics:
        return []
    error = run.metrics["calibration"][split]["expected_calibration_error"]
    fitted = run.metrics["calibration"]["temperature"] != 1
    more = f"{fixed(error['before'], 3)} without temperature" if fitted else split
    return [("calibration error", fixed(error["after"], 3), more)]


def python_call(config: RunConfig) -> str:
    """The call that makes such a run from Python."""
    defaults, skipped = RunConfig(), ("output", "resume", "quiet", "overwrite")
    flags = {
        key: value for key, value in vars(config).items() if value != getattr(defaults, key) and key not in skipped
    }
    return ", ".join(["minibert.finetune(texts, labels", *(f"{key}={value!r}" for key, value in flags.items())]) + ")"
