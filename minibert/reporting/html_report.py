"""report.html: what a person wants to look at after a run, in one file without scripts that loads nothing.

Every list and curve is bounded, so the file stays small whatever the number of rows and classes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minibert.batching.dataset import Dataset
from minibert.config import RunConfig
from minibert.data.loading import RunData
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.reporting.charts import (
    Bars,
    Html,
    Series,
    bar_list,
    chart,
    cut,
    esc,
    figure,
    fixed,
    join,
    keys,
    section,
    stacked,
    table,
    tile,
)
from minibert.reporting.figures import Judged, calibration_charts, class_table, quality_charts, text_tables
from minibert.reporting.search_report import search_section
from minibert.runtime.files import write_text

NOTHING = Html("")
LABELS = 20  # the most rows of the label distribution
SHOWN_METRICS = {
    SINGLE: ("macro_f1", "accuracy", "mcc"),
    MULTI: ("micro_f1", "macro_f1", "subset_accuracy"),
    REGRESSION: ("spearman", "pearson", "mae"),
}
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
    def part(self) -> str | None:
        """The rows to judge by: test, or else validation."""
        return next((part for part in ("test", "validation") if part in self.logits and len(self.logits[part])), None)

    def judged(self, part: str) -> Judged:
        targets, examples = self.sets[part].targets, self.data.splits[part]
        return Judged(part, self.problem, self.logits[part], targets, self.metrics[part], examples)


def write_report(output: Path, run: Finished) -> None:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    write_text(output / "report.html", page(run, log, output.resolve().name, search_section(output)))


def page(run: Finished, log: list[dict[str, Any]], name: str, search: Html = NOTHING) -> str:
    """The whole file; `log` has the lines of train_log.jsonl, `search` what --search tried."""
    sections = [
        header(run, name),
        section("Training", training_charts(run, log)),
        search,
        section("Data", [labels_figure(run), lengths_figure(run)]),
        *([] if run.part is None else judgement(run, run.part)),
        section("Speed", speed_charts(run)),
        section("Do it again", reproduce(run), grid=False),
    ]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, no script runs
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(name)} · minibert</title><style>\n{style}</style></head>\n"
        f"<body><main>{join(sections)}</main></body></html>\n"
    )


def judgement(run: Finished, part: str) -> list[Html]:
    """The sections on predictions: figures of one part, texts of validation and test."""
    judged = run.judged(part)
    return [
        section(f"On {part}", quality_charts(judged)),
        section("Calibration", calibration_charts(judged, fitted_on(run, part))),
        section("Each class", class_table(judged), grid=False),
        *text_tables([run.judged(each) for each, logits in run.logits.items() if len(logits)]),
    ]


def fitted_on(run: Finished, part: str) -> str:
    if run.problem.temperature == 1 and not run.config.temperature:
        return "No temperature was fitted (--no-temperature)."
    if "validation" not in run.logits:
        return "There were no validation rows to fit a temperature on."
    if run.problem.temperature == 1:
        return "The validation rows give no reason for a temperature other than 1."
    return "The temperature was fitted on " + ("these very rows." if part == "validation" else "validation.")


# The result at a glance


def header(run: Finished, name: str) -> Html:
    kind = run.problem.kind.replace("_", " ")
    rows = " · ".join(f"{len(examples):,} {part}" for part, examples in run.data.splits.items())
    lead = verdict(run, lambda label: f"“<bdi>{esc(cut(label, 40))}</bdi>”")
    return Html(
        f"<header><h1><bdi>{esc(name)}</bdi></h1>"
        f'<div class="soft">{esc(kind)} · {esc(model_name(run))} · {esc(rows)} rows</div>'
        f'<p class="lead">{lead}</p><div class="tiles">{join(tiles(run))}</div></header>\n'
    )


def model_name(run: Finished) -> str:
    """The last part of --model; two parts where the last says nothing."""
    parts = Path(run.config.model or "").parts
    return "/".join(parts[-2:] if parts and parts[-1] == "model" else parts[-1:])


def verdict(run: Finished, quoted: Callable[[str], str]) -> str:
    """One sentence: how good, how sure, and compared to knowing nothing; `quoted` writes a label in it."""
    if run.part is None:
        return "No rows were kept for validation or test, so there is nothing to judge the model by."
    train, targets, metrics = run.sets["train"].targets, run.sets[run.part].targets, run.metrics[run.part]
    rows = f"{len(targets):,} {run.part} rows"
    if run.problem.kind == REGRESSION:
        constants = {"mean": train.mean(dtype=np.float64), "median": np.median(train)}
        errors = {name: float(np.abs(targets - constant).mean()) for name, constant in constants.items()}
        best = min(errors, key=errors.__getitem__)
        return (
            f"Off by {short(metrics['mae'])} on average on {rows}; the training {best} is off by {short(errors[best])}."
        )
    if run.problem.kind == MULTI:
        share, none = metrics["subset_accuracy"], float((targets.sum(1) == 0).mean())
        known = f"{none:.1%} have none" if none else "all have some"
        return f"All labels right in {share:.1%} of {rows} ({known}); micro F1 {fixed(metrics['micro_f1'])}."
    common = int(np.bincount(targets).argmax())  # the best constant answer on the very rows that are judged
    low, high = wilson(metrics["accuracy"], len(targets))
    return (
        f"{metrics['accuracy']:.1%} of {rows} right (95% interval {low:.1%} to {high:.1%}); "
        f"always answering {quoted(run.problem.labels[common])} would get {(targets == common).mean():.1%}."
    )


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n rows."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def tiles(run: Finished) -> list[Html]:
    found = [] if run.part is None else [*metric_tiles(run, run.part), *calibration_tile(run, run.part)]
    speed = run.metrics["speed"]
    whole = f"whole run {duration(speed['total_seconds'])}"
    return [
        *found,
        tile("training time", duration(speed["train_seconds"]), whole),
        tile("tokens a second", f"{speed['tokens_per_second']:,.0f}", f"{speed['device']} · {speed['precision']}"),
    ]


def metric_tiles(run: Finished, part: str) -> list[Html]:
    metrics, result = run.metrics[part], []
    for name in (*SHOWN_METRICS[run.problem.kind], "roc_auc", "average_precision"):
        if metrics.get(name) is not None:
            other = run.metrics.get("validation", {}).get(name) if part == "test" else None
            more = part if other is None else f"test · validation {fixed(other)}"
            result.append(tile(TITLES.get(name, name), fixed(metrics[name]), more))
    return result


def calibration_tile(run: Finished, part: str) -> list[Html]:
    if "calibration" not in run.metrics:
        return []
    error = run.metrics["calibration"][part]["expected_calibration_error"]
    fitted = run.metrics["calibration"]["temperature"] != 1
    return [
        tile(
            "calibration error",
            fixed(error["after"]),
            f"{fixed(error['before'])} without temperature" if fitted else part,
        )
    ]


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# Training


def training_charts(run: Finished, log: list[dict[str, Any]]) -> list[Html]:
    """Loss, validation metrics and learning rate over the epochs, from the lines of the log."""
    steps = [line for line in log if "loss" in line]
    evaluations = [line for line in log if any(key.startswith("validation_") for key in line)]
    epochs = [line["epoch"] for line in evaluations if line["step"] == run.metrics["train"]["best_step"]]
    best = [(epoch, "best") for epoch in epochs[:1]]
    span = (0.0, max([line["epoch"] for line in log], default=1.0) or 1.0)

    def drawn(title: str, y_name: str, curves: list[Series], best: list[tuple[float, str]], note: str = "") -> Html:
        body = chart(curves, "epoch", y_name, marks=best, x_range=span)
        return figure(title, body, legend=keys(curves) if len(curves) > 1 else (), note=note)

    losses = [curve("training loss", steps, "loss", 1)]
    if evaluations:
        key = "mse" if run.problem.kind == REGRESSION else "loss"  # the one is the other's name there
        losses.append(curve("validation loss", evaluations, f"validation_{key}", 2, dots=True))
    names = [name for name in SHOWN_METRICS[run.problem.kind] if name != "mae"]  # which may be of any size
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


def labels_figure(run: Finished) -> Html:
    targets = run.sets["train"].targets
    return values_figure(run, targets) if run.problem.kind == REGRESSION else label_distribution(run, targets)


def label_distribution(run: Finished, targets: np.ndarray) -> Html:
    """Training rows of each label, the most frequent first."""
    multi, names = run.problem.kind == MULTI, run.problem.labels
    counts = targets.sum(0).astype(np.int64) if multi else np.bincount(targets, minlength=len(names))  # [L]
    order = np.argsort(-counts, kind="stable")
    shown, rest = order[:LABELS], order[LABELS:]
    note = "Training rows of each label."
    if len(rest):
        note = f"The {len(shown)} most frequent of {len(order)} labels; the others: {counts[rest].sum():,} rows."
    if multi:
        note += f" {targets.sum(1).mean():.2f} labels a row."
    return figure(
        "Labels", bar_list([(cut(names[i], 60), float(counts[i]), f"{counts[i]:,}") for i in shown]), note=note
    )


def values_figure(run: Finished, targets: np.ndarray) -> Html:
    values = targets.astype(np.float64)  # 30 bins of float32 may be finer than its numbers
    counts, edges = np.histogram(values, 30)
    note = f"Mean {values.mean():.3g}, standard deviation {values.std():.3g}."
    name = cut(run.problem.labels[0], 40)
    return figure("Values", chart([], name, "training rows", bars=Bars(edges, counts)), note=note)


def lengths_figure(run: Finished) -> Html:
    """A histogram of the training texts' tokens, with the cut that --max-length makes."""
    tokens = run.sets["train"].tokens
    whole, lost = tokens.full_lengths, tokens.truncated
    limit = run.config.max_length or int(whole.max())
    highest = max(min(int(np.quantile(whole, 0.995)), 4 * limit), 8)
    edges = np.linspace(0, max(highest, limit if (lost > 0).any() else 0) + 1, 41)
    counts, _ = np.histogram(np.minimum(whole, edges[-1] - 0.5), edges)
    does = "windows of" if tokens.windows is not None else "cut at"
    marks = [(float(limit), f"{does} {limit}")] if limit < edges[-1] else []
    effect = f"{(whole > limit).mean():.1%} of the rows are longer than --max-length {limit} and read in windows."
    if tokens.windows is None:
        shares = f"{(lost > 0).mean():.1%} of the rows and {lost.sum() / max(whole.sum(), 1):.1%} of the tokens"
        effect = f"--max-length {limit} cuts {shares}."
    body = chart([], "tokens a text", "training rows", bars=Bars(edges, counts), marks=marks)
    return figure("Token lengths", body, note=f"Median {np.median(whole):.0f}, longest {whole.max():,}. {effect}")


# Speed, and how to do it again


def speed_charts(run: Finished) -> list[Html]:
    speed = run.metrics["speed"]
    rows = [(name, share, f"{share:.1%}") for name, share in padding_shares(run)]
    note = (
        f"Share of the positions that hold padding. {speed['tokens_per_second']:,.0f} tokens and "
        f"{speed['examples_per_second']:,.0f} texts a second in training; {speed['device']}, {speed['precision']}, "
        f"{speed['attention']} attention, {speed['engine']}."
    )
    figures = [figure("Padding", bar_list(rows), note=note)]
    parts = [(name, seconds) for name, seconds in speed.get("seconds_by_part", {}).items() if seconds > 0]
    legend = [(f"{name} {duration(seconds)}", (i + 1) % 4) for i, (name, seconds) in enumerate(parts)]
    return [*figures, figure("Time by part", stacked(parts), legend=legend)] if parts else figures


def padding_shares(run: Finished) -> list[tuple[str, float]]:
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


def reproduce(run: Finished) -> list[Html]:
    """The command, and the settings, data and versions that it ran with."""
    defaults = RunConfig().to_dict()
    changed = {key: value for key, value in run.config.to_dict().items() if value != defaults[key] and key != "output"}
    lines = [(key, json.dumps(value, ensure_ascii=False)) for key, value in changed.items()]
    lines += [(f"{part} sha256", file["sha256"]) for part, file in run.record["data"].items()]
    lines += [(name, version) for name, version in run.record["versions"].items()]
    settings = table(["setting, file or package", "value"], "lt", lines)
    summary = "<summary>Settings other than the defaults, data and versions</summary>"
    return [Html(f"<pre>{esc(command(run))}</pre>"), Html(f"<details>{summary}{settings}</details>")]


def command(run: Finished) -> str:
    """The command line, or the call for a run from lists."""
    given = [word for word in run.record["command"] if word.replace("_", "-") not in RESUME]
    if len(given) != 1 or "(" not in given[0]:
        return shlex.join(given)
    return python_call(run.config)


def python_call(config: RunConfig) -> str:
    """The call that makes such a run from Python."""
    defaults, skipped = RunConfig(), ("output", "resume", "quiet", "overwrite")
    flags = {
        key: value for key, value in vars(config).items() if value != getattr(defaults, key) and key not in skipped
    }
    return ", ".join(["minibert.finetune(texts, labels", *(f"{key}={value!r}" for key, value in flags.items())]) + ")"
