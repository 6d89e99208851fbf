"""report.html: what a person wants to look at after a run, in one file without scripts that loads nothing.

Every list and curve is bounded, so the file stays small whatever the number of rows and classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from minibert.config import RunConfig
from minibert.filenames import REPORT, TRAIN_LOG
from minibert.problem.problem import MULTI, REGRESSION
from minibert.reporting.charts import Bars, Series, chart, keys
from minibert.reporting.error_rows import error_sections
from minibert.reporting.figures import calibration_charts, class_table, quality_charts
from minibert.reporting.format import shorten
from minibert.reporting.render import Section, pieces, render, visible
from minibert.reporting.results import MAIN_METRICS, TITLES, Finished, headline, tiles
from minibert.reporting.search_report import search_sections
from minibert.runtime.device import duration
from minibert.runtime.files import write_text

LABELS = 20  # the most rows of the label distribution
LENGTH_BINS = 40


def write_report(output: Path, run: Finished) -> None:
    lines = (output / TRAIN_LOG).read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    write_text(output / REPORT, page(run, log, output.resolve().name, search_sections(output)))


def page(run: Finished, log: list[dict[str, Any]], name: str, search: Sequence[Section] = ()) -> str:
    """The whole file; `log` has the lines of train_log.jsonl, `search` what --search tried."""
    kind, splits = run.problem.kind.replace("_", " "), run.data.splits.items()
    rows = " · ".join(f"{len(examples):,} {split}" for split, examples in splits)
    text, label = headline(run)
    sections = [
        Section("Training", training_charts(run, log)),
        *search,
        Section("Data", [labels_figure(run), lengths_figure(run)]),
        *([] if run.split is None else prediction_sections(run, run.split)),
        Section("Speed", speed_charts(run)),
    ]
    return render(
        "page.html.jinja",
        name=name,
        about=[f"{kind} · {run.model_name} · {run.source_name} · {rows} rows"],
        lead=Markup(text).format(label=Markup("“<bdi>{}</bdi>”").format(visible(shorten(label, 40)))),
        tiles=tiles(run),
        sections=sections,
        command=run.command,
        settings=settings(run),
    )


def prediction_sections(run: Finished, split: str) -> list[Section]:
    """The sections on predictions: figures of one split, texts of validation and test."""
    result = run.result(split)
    return [
        Section(f"On {split}", quality_charts(result)),
        Section("Calibration", calibration_charts(result, fitted_on(run, split))),
        Section("Each class", class_table(result), grid=False),
        *error_sections([run.result(each) for each, logits in run.logits.items() if len(logits)]),
    ]


def fitted_on(run: Finished, split: str) -> str:
    if run.problem.temperature == 1 and not run.config.temperature:
        return "No temperature was fitted (--no-temperature)."
    if "validation" not in run.logits:
        return "There were no validation rows to fit a temperature on."
    if run.problem.temperature == 1:
        return "The validation rows give no reason for a temperature other than 1."
    return "The temperature was fitted on " + ("these very rows." if split == "validation" else "validation.")


# Training


def training_charts(run: Finished, log: list[dict[str, Any]]) -> list[Markup]:
    """Loss, validation metrics and learning rate over the epochs, from the lines of the log."""
    steps = [line for line in log if "loss" in line]
    evaluations = [line for line in log if any(key.startswith("validation_") for key in line)]
    epochs = [line["epoch"] for line in evaluations if line["step"] == run.metrics["train"]["best_step"]]
    best = [(epoch, "best") for epoch in epochs[:1]]
    span = (0.0, max([line["epoch"] for line in log], default=1.0) or 1.0)

    def drawn(title: str, y_name: str, curves: list[Series], best: list[tuple[float, str]], note: str = "") -> Markup:
        body = chart(curves, "epoch", y_name, marks=best, x_range=span)
        return pieces.figure(title, body, legend=keys(curves) if len(curves) > 1 else (), note=note)

    losses = [curve("training loss", steps, "loss", 1)]
    if evaluations:
        key = "mse" if run.problem.kind == REGRESSION else "loss"  # the one is the other's name there
        losses.append(curve("validation loss", evaluations, f"validation_{key}", 2, dots=True))
    names = [name for name in MAIN_METRICS[run.problem.kind] if name != "mae"]  # which may be of any size
    metrics = [
        curve(TITLES.get(name, name), evaluations, f"validation_{name}", tone, dots=True)
        for tone, name in enumerate(names, start=1)
    ]
    warmup = f"{run.config.warmup_ratio:.0%} of the steps warm up" if run.config.warmup_ratio else "no warm-up"
    rate = [curve("learning rate", steps, "learning_rate", 1)]
    return [
        drawn("Loss", "loss", losses, best),
        *([drawn("Metrics on validation", "validation", metrics, best)] if evaluations else []),
        drawn("Learning rate", "learning rate", rate, [], f"{run.config.schedule}; {warmup}."),
    ]


def curve(name: str, lines: list[dict[str, Any]], key: str, tone: int, dots: bool = False) -> Series:
    """A number of the log over the epochs; where it is missing there is no point."""
    epochs, values = (
        np.array([math.nan if line.get(each) is None else line[each] for line in lines], dtype=np.float64)
        for each in ("epoch", key)
    )
    return Series(name, epochs, values, tone, dots=dots)


# Data


def labels_figure(run: Finished) -> Markup:
    targets = run.sets["train"].targets
    return values_figure(run, targets) if run.problem.kind == REGRESSION else label_distribution(run, targets)


def label_distribution(run: Finished, targets: np.ndarray) -> Markup:
    """Training rows of each label, the most frequent first."""
    multi, names = run.problem.kind == MULTI, run.problem.labels
    counts = targets.sum(0).astype(np.int64) if multi else np.bincount(targets, minlength=len(names))  # [L]
    order = np.argsort(-counts, kind="stable")
    shown, rest = order[:LABELS], order[LABELS:]
    note = "Training rows of each label."
    if len(rest):
        note = f"The {len(shown)} most frequent of {len(order)} labels; the others: {counts[rest].sum():,} rows."
    if multi:
        note += f" {targets.sum(1).mean():.2f} labels per row."
    return pieces.figure(
        "Labels",
        pieces.bar_list([(shorten(names[i], 60), float(counts[i]), f"{counts[i]:,}") for i in shown]),
        note=note,
    )


def values_figure(run: Finished, targets: np.ndarray) -> Markup:
    values = targets.astype(np.float64)  # 30 bins of float32 may be finer than its numbers
    counts, edges = np.histogram(values, 30)
    note = f"Mean {values.mean():.3g}, standard deviation {values.std():.3g}."
    name = shorten(run.problem.labels[0], 40)
    return pieces.figure("Values", chart([], name, "training rows", bars=Bars(edges, counts)), note=note)


def lengths_figure(run: Finished) -> Markup:
    """A histogram of the training texts' tokens, with the cut that --max-length makes."""
    tokens = run.sets["train"].tokens
    whole, lost = tokens.full_lengths, tokens.truncated
    limit = run.config.max_length or int(whole.max())
    highest = max(min(int(np.quantile(whole, 0.995)), 4 * limit), 8)
    highest = max(highest, limit if (lost > 0).any() else 0)
    step = -(-(highest + 1) // LENGTH_BINS)
    edges = np.arange(0, highest + 1 + step, step)
    counts, _ = np.histogram(np.minimum(whole, edges[-1] - 1), edges)
    does = "windows of" if tokens.windows is not None else "cut at"
    marks = [(float(limit), f"{does} {limit}")] if limit < edges[-1] else []
    effect = f"{(whole > limit).mean():.1%} of the rows are longer than --max-length {limit} and read in windows."
    if tokens.windows is None:
        fractions = f"{(lost > 0).mean():.1%} of the rows and {lost.sum() / max(whole.sum(), 1):.1%} of the tokens"
        effect = f"--max-length {limit} cuts {fractions}."
    body = chart([], "tokens per text", "training rows", bars=Bars(edges, counts), marks=marks)
    return pieces.figure(
        "Token lengths", body, note=f"Median {np.median(whole):.0f}, longest {whole.max():,}. {effect}"
    )


# Speed, and what repeats the run


def speed_charts(run: Finished) -> list[Markup]:
    speed = run.metrics["speed"]
    rows = [(name, fraction, f"{fraction:.1%}") for name, fraction in padding_fractions(run)]
    note = (
        f"Fraction of the positions that hold padding. {speed['tokens_per_second']:,.0f} tokens and "
        f"{speed['examples_per_second']:,.0f} texts per second in training; {speed['device']}, {speed['precision']}, "
        f"{speed['attention']} attention, {speed['engine']}."
    )
    figures = [pieces.figure("Padding", pieces.bar_list(rows), note=note)]
    parts = [(name, seconds) for name, seconds in speed.get("seconds_by_part", {}).items() if seconds > 0]
    legend = [(f"{name} {duration(seconds)}", (i + 1) % 4) for i, (name, seconds) in enumerate(parts)]
    return [*figures, pieces.figure("Time by part", pieces.stacked(parts), legend=legend)] if parts else figures


def padding_fractions(run: Finished) -> list[tuple[str, float]]:
    """Padding of the usual ways on these texts (or their windows), and what is left of it here."""
    lengths, size = run.sets["train"].tokens.lengths, run.config.batch_size
    limit = run.config.max_length or int(lengths.max())
    order = np.random.default_rng(run.config.seed).permutation(len(lengths))
    starts = np.arange(0, len(lengths), size)
    longest = np.maximum.reduceat(lengths[order], starts)  # of each batch
    slots = float(longest @ np.diff(np.append(starts, len(lengths))))
    total = float(lengths.sum())
    return [
        (f"padded to {limit}", 1 - total / (limit * len(lengths))),
        (f"padded to the longest of {size}", 1 - total / slots),
        ("minibert, inside attention", float(run.metrics["speed"]["padding_fraction"])),
        ("minibert, everywhere else", float(run.metrics["speed"]["padding_fraction_elsewhere"])),
    ]


def settings(run: Finished) -> Markup:
    """The settings, data and versions that the run had."""
    defaults = RunConfig().to_dict()
    changed = {key: value for key, value in run.config.to_dict().items() if value != defaults[key] and key != "output"}
    lines = [(key, json.dumps(value, ensure_ascii=False)) for key, value in changed.items()]
    lines += [(f"{split} sha256", file["sha256"]) for split, file in run.record["data"].items()]
    lines += [(name, version) for name, version in run.record["versions"].items()]
    return pieces.table(["setting, file or package", "value"], "lt", lines)
