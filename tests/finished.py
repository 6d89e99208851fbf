"""Finished runs without a training: random predictions of any problem type and size, to make reports and cards of."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens, offsets_of
from minibert.config import RunConfig
from minibert.data.columns import Columns
from minibert.data.examples import Examples
from minibert.data.loading import RunData
from minibert.problem.calibration import calibration_metrics
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Calibration, Problem
from minibert.reporting.results import Finished


def finished(
    kind: str = SINGLE,
    labels: list[str] | None = None,
    rows: int = 300,
    texts: list[str] | None = None,
    classes: list[int] | None = None,
    **flags: Any,
) -> Finished:
    """A run whose model is right more often than not; `classes` are the ones that occur in the test rows."""
    rate = {} if flags.get("freeze") == "all" else {"learning_rate": 5e-5}
    rng = np.random.default_rng(0)
    labels = labels or (["score"] if kind == REGRESSION else ["ham", "spam"])
    problem = Problem(kind, labels, Calibration(1.0 if kind == REGRESSION else 1.3))
    config = RunConfig(**{"model": "org/model", "max_length": 128, "epochs": 3.0, **rate, **flags})
    data = RunData({}, problem, Columns(("text",), None, ("label",)), [])
    run = Finished(config, data, {}, {}, {}, {"command": ["minibert.finetune(...)"], "data": {}, "versions": {}})
    for part in ("train", "validation", "test"):
        targets = targets_of(kind, rng, rows, len(labels), classes if part == "test" else None)
        lengths = rng.integers(5, 128, rows)
        tokens = Tokens(np.zeros(0, np.int32), offsets_of(lengths), None, (lengths > 120) * np.int32(9))
        run.sets[part] = Dataset(tokens, targets)
        some = texts or ["a text of some words", "another one"]
        data.splits[part] = Examples(f"{part}.csv", [some[i % len(some)] for i in range(rows)], lines=[*range(rows)])
        if part != "train":
            add_predictions(run, part, logits_of(kind, rng, targets, len(labels)))
    run.metrics["train"] = {"best_step": 40, "steps": 60, "loss": 0.3, "advice": []}
    speed = dict.fromkeys("examples_per_second tokens_per_second train_seconds total_seconds".split(), 123.4)
    words = dict.fromkeys(("device", "precision", "attention", "engine"), "cpu")
    parts = {"preparing": 1.0, "training steps": 5.0, "evaluation while training": 0.5, "evaluating and saving": 2.0}
    padding = {"padding_fraction": 0.05, "padding_fraction_elsewhere": 0.0}
    run.metrics["speed"] = {**speed, **words, **padding, "seconds_by_part": parts}
    return run


def targets_of(kind: str, rng: np.random.Generator, rows: int, labels: int, classes: list[int] | None) -> np.ndarray:
    if kind == REGRESSION:
        return (rng.random(rows) * 5).astype(np.float32)
    if kind == MULTI:
        return (rng.random((rows, labels)) < rng.uniform(0.02, 0.3, labels)).astype(np.float32)
    return rng.choice(range(labels) if classes is None else classes, rows)


def logits_of(kind: str, rng: np.random.Generator, targets: np.ndarray, labels: int) -> np.ndarray:
    noise = rng.normal(size=(len(targets), labels))
    if kind == REGRESSION:
        noise = targets[:, None] + noise / 2
    elif kind == MULTI:
        noise += 4 * targets * rng.uniform(0.2, 1, labels) - 2
    else:
        noise[np.arange(len(targets)), targets] += rng.uniform(1, 4, labels)[targets]
    return noise.astype(np.float32)


def add_predictions(run: Finished, part: str, logits: np.ndarray) -> None:
    """Logits of a part, with the metrics that a run has of them."""
    problem, targets = run.problem, run.sets[part].targets
    run.logits[part] = logits
    run.metrics[part] = problem.metrics(logits, targets)
    if problem.kind != REGRESSION:
        run.metrics["calibration"] = calibration_metrics(
            problem, run.logits, {name: run.sets[name].targets for name in run.logits}
        )


def log_of(run: Finished) -> list[dict[str, Any]]:
    """Lines of train_log.jsonl to go with it: 60 steps, an evaluation every 20."""
    log: list[dict[str, Any]] = []
    for step in range(1, 61):
        rate = 5e-5 * min(step / 6, (60 - step) / 54)
        line = {"step": step, "epoch": step / 20, "learning_rate": rate, "grad_norm": 1.0}
        log.append({**line, "loss": None if step == 30 else 1 / (1 + step / 10)})
        if step % 20 == 0:
            numbers = {k: v for k, v in run.metrics["validation"].items() if isinstance(v, float)}
            log.append({"step": step, "epoch": step / 20} | {f"validation_{k}": v for k, v in numbers.items()})
    return log
