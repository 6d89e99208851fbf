"""report.html: what a person wants to look at after a run, in one file without scripts that loads nothing.

Every list and curve is bounded, so the file stays small whatever the number of rows and classes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minibert.calibration import confidences
from minibert.charts import (
    Bars,
    Html,
    Series,
    bar_list,
    chart,
    cut,
    esc,
    figure,
    heat_map,
    join,
    meter,
    stacked,
    table,
    tile,
)
from minibert.config import RunConfig
from minibert.data import RunData
from minibert.files import write_text
from minibert.metrics import calibration_gap, precision_recall_points, reliability_bins, roc_points
from minibert.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.train import Dataset

CLASSES, MATRIX, TEXTS, TEXT_LENGTH = 60, 20, 20, 400  # the most rows of each table, and the longest text in one
CERTAIN = 0.8  # a row of at least this confidence is not among the least certain
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
    "mae": "mean error",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
}


@dataclass
class Finished:
    """What is known at the end of a run."""

    config: RunConfig
    data: RunData
    sets: dict[str, Dataset]
    logits: dict[str, np.ndarray]  # of validation and test, as far as there are such
    metrics: dict[str, Any]  # metrics.json
    record: dict[str, Any]  # run.json

    @property
    def problem(self) -> Problem:
        return self.data.problem

    @property
    def part(self) -> str | None:
        """The rows to judge by: test, or else validation."""
        return next((part for part in ("test", "validation") if part in self.logits and len(self.logits[part])), None)


def write_report(output: Path, run: Finished) -> None:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    write_text(output / "report.html", page(run, [json.loads(line) for line in lines], output.resolve().name))


def page(run: Finished, log: list[dict[str, Any]], name: str) -> str:
    sections = [
        header(run, name),
        section("Training", training_charts(run, log)),
        section("Data", data_charts(run)),
    ]
    if run.part is not None:
        sections += [
            section(f"On {run.part}", quality_charts(run, run.part)),
            section("Calibration", calibration_charts(run, run.part)),
            section("Each class", class_table(run, run.part), grid=False),
            *text_tables(run),
        ]
    sections += [section("Speed", speed_charts(run)), reproduce(run)]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, no script runs
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(name)} · minibert</title><style>\n{style}</style></head>\n"
        f"<body><main>{join(sections)}</main></body></html>\n"
    )


def section(title: str, pieces: Sequence[Html], grid: bool = True) -> Html:
    """A headline and its pieces; nothing where there are none."""
    if not pieces:
        return Html("")
    body = join(pieces)
    return Html(f'<section><h2>{esc(title)}</h2>{f"""<div class="grid">{body}</div>""" if grid else body}</section>\n')


# The result at a glance


def header(run: Finished, name: str) -> Html:
    kind = run.problem.kind.replace("_", " ")
    rows = " · ".join(f"{len(examples):,} {part}" for part, examples in run.data.parts.items())
    return Html(
        f"<header><h1><bdi>{esc(name)}</bdi></h1>"
        f'<div class="soft">{esc(kind)} · {esc(model_name(run))} · {esc(rows)} rows</div>'
        f'<p class="lead">{esc(verdict(run))}</p><div class="tiles">{join(tiles(run))}</div></header>\n'
    )


def model_name(run: Finished) -> str:
    """The last part of --model; two parts where the last says nothing."""
    parts = Path(run.config.model or "").parts
    return "/".join(parts[-2:] if parts and parts[-1] == "model" else parts[-1:])


def verdict(run: Finished) -> str:
    """One sentence: how good, how sure, and compared to knowing nothing."""
    if run.part is None:
        return "No rows were kept for validation or test, so there is nothing to judge the model by."
    targets, metrics = run.sets[run.part].targets, run.metrics[run.part]
    n = len(targets)
    if run.problem.kind == REGRESSION:
        guess = float(np.abs(targets - run.sets["train"].targets.mean()).mean())
        return (
            f"Off by {metrics['mae']:.3g} on average on {n:,} {run.part} rows; the training mean is off by {guess:.3g}."
        )
    if run.problem.kind == MULTI:
        share = metrics["subset_accuracy"]
        return f"All labels right in {share:.1%} of {n:,} {run.part} rows; micro F1 {metrics['micro_f1']:.3f}."
    common = int(np.bincount(run.sets["train"].targets).argmax())
    low, high = wilson(metrics["accuracy"], n)
    return (
        f"{metrics['accuracy']:.1%} of {n:,} {run.part} rows right (95% interval {low:.1%} to {high:.1%}); "
        f"always answering “{cut(run.problem.labels[common], 40)}” would get {(targets == common).mean():.1%}."
    )


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n rows."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def tiles(run: Finished) -> list[Html]:
    result = []
    if run.part is not None:
        metrics = run.metrics[run.part]
        for name in (*SHOWN_METRICS[run.problem.kind], "roc_auc", "average_precision"):
            if metrics.get(name) is not None:
                other = run.metrics.get("validation", {}).get(name) if run.part == "test" else None
                more = run.part if other is None else f"test · validation {other:.3f}"
                result.append(tile(TITLES.get(name, name), f"{metrics[name]:.3f}", more))
        if "calibration" in run.metrics:
            error = run.metrics["calibration"][run.part]["expected_calibration_error"]
            temperature = run.metrics["calibration"]["temperature"]
            more = f"{error['before']:.3f} without temperature" if temperature != 1 else run.part
            result.append(tile("calibration error", f"{error['after']:.3f}", more))
    speed = run.metrics["speed"]
    result.append(
        tile("training time", duration(speed["train_seconds"]), f"whole run {duration(speed['total_seconds'])}")
    )
    tokens = f"{speed['tokens_per_second']:,.0f}"
    return [*result, tile("tokens a second", tokens, f"{speed['device']} · {speed['precision']}")]


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# Training


def training_charts(run: Finished, log: list[dict[str, Any]]) -> list[Html]:
    steps = [line for line in log if "loss" in line]
    evaluations = [line for line in log if any(key.startswith("validation_") for key in line)]
    epochs = [line["epoch"] for line in log if line["step"] == run.metrics["train"]["best_step"]]
    best = [(epochs[0], "best")] if epochs and evaluations else []
    losses = [Series("training loss", column(steps, "epoch"), column(steps, "loss"), 1)]
    if run.problem.kind != REGRESSION and evaluations:
        values = column(evaluations, "validation_loss")
        losses.append(Series("validation loss", column(evaluations, "epoch"), values, 2, dots=True))
    elif evaluations:
        values = column(evaluations, "validation_mse")
        losses.append(Series("validation loss (mse)", column(evaluations, "epoch"), values, 2, dots=True))
    epoch_range = (0.0, max([line["epoch"] for line in log], default=1.0) or 1.0)
    pieces = [
        figure("Loss", chart(losses, "epoch", "loss", marks=best, x_range=epoch_range), legend=keys(losses)),
    ]
    names = [name for name in SHOWN_METRICS[run.problem.kind] if name != "mae"]
    curves = [
        Series(
            TITLES.get(name, name),
            column(evaluations, "epoch"),
            column(evaluations, f"validation_{name}"),
            i,
            dots=True,
        )
        for i, name in enumerate(names, start=1)
    ]
    if evaluations:
        body = chart(curves, "epoch", "validation", marks=best, x_range=epoch_range)
        pieces.append(figure("Metrics on validation", body, legend=keys(curves)))
    rate = [Series("learning rate", column(steps, "epoch"), column(steps, "learning_rate"), 1)]
    body = chart(rate, "epoch", "learning rate", x_range=epoch_range)
    return [*pieces, figure("Learning rate", body, note=f"{run.config.schedule}, after warm-up")]


def column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    values = [line.get(key) for line in lines]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def keys(series: Sequence[Series]) -> list[tuple[str, int]]:
    return [(s.name, s.tone) for s in series]


# Data


def data_charts(run: Finished) -> list[Html]:
    train = run.sets["train"]
    labels = target_histogram(run) if run.problem.kind == REGRESSION else label_distribution(run)
    lengths, lost = train.lengths, train.tokens.cut
    whole = lengths + lost  # what each text would have without the cut
    limit = run.config.max_length or int(lengths.max())
    top = max(min(int(np.quantile(whole, 0.995)), 4 * limit), 8)
    edges = np.linspace(0, max(top, limit if (lost > 0).any() else 0) + 1, 41)
    counts, _ = np.histogram(np.minimum(whole, edges[-1] - 0.5), edges)
    marks = [(float(limit), f"cut at {limit}")] if limit < edges[-1] else []
    note = (
        f"Median {np.median(whole):.0f}, longest {whole.max():,}. --max-length {limit} cuts "
        f"{(lost > 0).mean():.1%} of the rows and {lost.sum() / max(whole.sum(), 1):.1%} of the tokens."
    )
    body = chart([], "tokens a text", "training rows", bars=Bars(edges, counts), marks=marks)
    return [labels, figure("Token lengths", body, note=note)]


def label_counts(problem: Problem, targets: np.ndarray) -> np.ndarray:
    """[L] rows of each label"""
    if problem.kind == MULTI:
        return targets.sum(0).astype(np.int64)
    return np.bincount(targets, minlength=len(problem.labels))


def label_distribution(run: Finished) -> Html:
    counts = label_counts(run.problem, run.sets["train"].targets)
    order = np.argsort(-counts, kind="stable")
    shown = order[:MATRIX]
    rows = [(cut(run.problem.labels[i], 60), float(counts[i]), f"{counts[i]:,}") for i in shown]
    rest = order[MATRIX:]
    note = "Training rows of each label."
    if len(rest):
        note = f"The {len(shown)} most frequent of {len(order)} labels; the others: {counts[rest].sum():,} rows."
    if run.problem.kind == MULTI:
        note += f" {run.sets['train'].targets.sum(1).mean():.2f} labels a row."
    return figure("Labels", bar_list(rows), note=note)


def target_histogram(run: Finished) -> Html:
    targets = run.sets["train"].targets
    counts, edges = np.histogram(targets, 30)
    note = f"Mean {targets.mean():.3g}, standard deviation {targets.std():.3g}."
    return figure("Values", chart([], run.problem.labels[0], "training rows", bars=Bars(edges, counts)), note=note)


# Quality


def quality_charts(run: Finished, part: str) -> list[Html]:
    logits, targets = run.logits[part], run.sets[part].targets
    if run.problem.kind == REGRESSION:
        return regression_charts(logits[:, 0], targets)
    if run.problem.kind == MULTI:
        return []
    pieces = confusion(run.problem.labels, np.array(run.metrics[part]["confusion_matrix"]))
    if len(run.problem.labels) == 2 and 0 < (targets == 1).sum() < len(targets):
        pieces += binary_charts(run, part, run.problem.probabilities(logits)[:, 1], targets)
    return pieces


def confusion(labels: list[str], counts: np.ndarray) -> list[Html]:
    """The confusion matrix; of many classes, those with the most errors, and the pairs most often confused."""
    wrong = counts - np.diag(np.diag(counts))
    if len(labels) <= MATRIX:
        note = "Rows: the label. Columns: the prediction. Colour: share of the row."
        return [figure("Confusion matrix", heat_map(labels, counts), note=note)]
    chosen = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[: MATRIX - 1])
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    groups: list[list[int]] = [*([int(i)] for i in chosen), others.tolist()]
    small = np.array([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
    note = f"The {len(chosen)} of {len(labels)} classes with the most errors. Rows: the label. Columns: the prediction."
    names = [*(labels[i] for i in chosen), f"({len(others)} others)"]
    places = np.argsort(-wrong, axis=None, kind="stable")[:MATRIX]
    pairs = [divmod(int(place), len(labels)) for place in places]
    rows = [
        (labels[a], labels[b], counts[a, b], f"{counts[a, b] / counts[a].sum():.0%}") for a, b in pairs if wrong[a, b]
    ]
    body = table(["label", "predicted", "rows", "of label"], "llnn", rows)
    wide = figure("Confusion matrix", heat_map(names, small), note=note, wide=True)
    return [wide, figure("Most often confused", body, wide=True)] if rows else [wide]


def binary_charts(run: Finished, part: str, scores: np.ndarray, targets: np.ndarray) -> list[Html]:
    positive, metrics = cut(run.problem.labels[1], 40), run.metrics[part]
    precision, recall, _ = precision_recall_points(targets, scores)
    share = float((targets == 1).mean())
    curves = [
        Series("model", np.append(0, recall), np.append(precision[0], precision), 1),
        Series(f"share of {positive}", np.array([0, 1]), np.array([share, share]), 0, dashed=True),
    ]
    body = chart(curves, "recall", "precision", x_range=(0, 1), y_range=(0, 1))
    note = f"Of “{positive}”. Average precision {metrics['average_precision']:.4f}."
    pieces = [figure("Precision and recall", body, legend=keys(curves), note=note)]
    false, true = roc_points(targets, scores)
    curves = [
        Series("model", np.append(0, false), np.append(0, true), 1),
        Series("chance", np.array([0, 1]), np.array([0, 1]), 0, dashed=True),
    ]
    body = chart(curves, "false positive rate", "true positive rate", x_range=(0, 1), y_range=(0, 1))
    note = f"Of “{positive}”. Area under the curve {metrics['roc_auc']:.4f}."
    return [*pieces, figure("ROC", body, legend=keys(curves), note=note)]


def regression_charts(predictions: np.ndarray, targets: np.ndarray) -> list[Html]:
    keep = np.linspace(0, len(targets) - 1, min(len(targets), 1500)).astype(np.int64)
    limits = np.array([min(targets.min(), predictions.min()), max(targets.max(), predictions.max())], dtype=np.float64)
    curves = [
        Series("perfect", limits, limits, 0, dashed=True),
        Series("rows", targets[keep], predictions[keep], 1, curve=False, dots=True),
    ]
    errors = predictions - targets
    counts, edges = np.histogram(errors[np.isfinite(errors)], 30)
    note = f"Mean {errors.mean():+.3g}, standard deviation {errors.std():.3g}."
    return [
        figure("Predicted and true", chart(curves, "true value", "predicted value"), legend=keys(curves)),
        figure("Errors", chart([], "predicted minus true", "rows", bars=Bars(edges, counts)), note=note),
    ]


# Calibration


def calibration_charts(run: Finished, part: str) -> list[Html]:
    if run.problem.kind == REGRESSION:
        return []
    temperature, multi = run.problem.temperature, run.problem.kind == MULTI
    stages = [("without temperature", 1.0, 2), (f"with temperature {temperature:.3g}", temperature, 1)]
    used = stages if temperature != 1 else [("as trained", 1.0, 1)]
    curves = [Series("perfect", np.array([0, 1]), np.array([0, 1]), 0, dashed=True)]
    errors, stated = [], np.zeros(0)
    for name, value, tone in used:
        stated, found = confidences(run.problem, run.logits[part], run.sets[part].targets, value)
        counts, x, y = reliability_bins(stated, found)
        seen = counts > 0
        sizes = counts[seen] / counts.sum()
        curves.append(Series(name, x[seen], y[seen], tone, dots=True, sizes=sizes))
        errors.append(f"{calibration_gap(stated, found):.4f} {name}")
    what = "stated probability" if multi else "confidence"
    body = chart(curves, what, "share that was right" if not multi else "share that had the label", **UNIT)
    note = f"Expected calibration error: {', '.join(errors)}. The area of a dot is its share of the rows."
    note += fitted_on(run, part)
    counts, edges = np.histogram(stated, 30, (0, 1))
    rows = "labels of rows" if multi else "rows"
    return [
        figure("Reliability", body, legend=keys(curves), note=note),
        figure(f"Distribution of {what}", chart([], what, rows, bars=Bars(edges, counts), x_range=(0, 1))),
    ]


UNIT: dict[str, Any] = {"x_range": (0.0, 1.0), "y_range": (0.0, 1.0)}


def fitted_on(run: Finished, part: str) -> str:
    if run.problem.temperature == 1 and not run.config.temperature:
        return " No temperature was fitted (--no-temperature)."
    if run.problem.temperature == 1:
        return " The validation rows give no reason for a temperature other than 1."
    return " The temperature was fitted on " + ("these very rows." if part == "validation" else "validation.")


# Tables


def class_table(run: Finished, part: str) -> list[Html]:
    per_class: dict[str, dict[str, Any]] = run.metrics[part].get("per_class", {})
    if not per_class:
        return []
    items = list(per_class.items())
    pieces = []
    if len(items) > CLASSES:
        items = sorted(items, key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))[:CLASSES]
        text = f"The {CLASSES} of {len(per_class)} classes with the lowest F1; all of them are in metrics.json."
        pieces.append(Html(f"<p class='soft'>{text}</p>"))
    multi = run.problem.kind == MULTI
    rows = []
    for name, row in items:
        numbers = [meter(row["precision"]), meter(row["recall"]), meter(row["f1"]), f"{row['support']:,}"]
        rows.append([cut(name, 80), *numbers, *([f"{row['threshold']:.2f}"] if multi else [])])
    names = ["class", "precision", "recall", "F1", "rows", *(["threshold"] if multi else [])]
    return [*pieces, table(names, "lnnnn" + "n" * multi, rows)]


@dataclass
class Found:
    """A row worth reading: where it is, and how sure the model was."""

    part: str
    row: int
    rank: float  # the higher, the earlier in the table
    predicted: str
    truth: str
    shown: str  # the number of the table's column


def text_tables(run: Finished) -> list[Html]:
    """Rows of validation and test: the most confidently wrong, and the least certain."""
    finders = {SINGLE: single_finds, MULTI: multi_finds, REGRESSION: regression_finds}
    wrong: list[Found] = []
    unsure: list[Found] = []
    for part in run.logits:
        if len(run.logits[part]):
            most_wrong, least_sure = finders[run.problem.kind](
                run.problem, part, run.logits[part], run.sets[part].targets
            )
            wrong, unsure = wrong + most_wrong, unsure + least_sure
    number = {SINGLE: "probability", MULTI: "probability", REGRESSION: "off by"}[run.problem.kind]
    title = "Furthest off" if run.problem.kind == REGRESSION else "Most confidently wrong"
    advice = "Read these first: where a good model is sure and wrong, the mistake is often in the label."
    if run.problem.kind == REGRESSION:
        advice = "Read these first: where a good model is far off, the mistake is often in the label."
    pieces = []
    if wrong:
        pieces.append(
            section(title, [Html(f'<p class="soft">{advice}</p>'), find_table(run, wrong, number)], grid=False)
        )
    if unsure:
        advice = "Rows the model could not decide on: labels like these, more of them, would teach it most."
        unsure_pieces = [Html(f'<p class="soft">{advice}</p>'), find_table(run, unsure, number)]
        pieces.append(section("Least certain", unsure_pieces, grid=False))
    return pieces


def find_table(run: Finished, finds: list[Found], number: str) -> Html:
    rows = []
    for found in sorted(finds, key=lambda f: -f.rank)[:TEXTS]:
        examples = run.data.parts[found.part]
        text = cut(examples.texts[found.row], TEXT_LENGTH)
        if examples.pairs is not None:
            text += "\n— " + cut(examples.pairs[found.row], TEXT_LENGTH)
        where = f"{found.part} {examples.lines[found.row]}"
        rows.append([text, cut(found.truth, 60), cut(found.predicted, 60), found.shown, where])
    return table(["text", "label", "predicted", number, "part, line"], "tllnn", rows)


def top(values: np.ndarray, count: int = TEXTS) -> np.ndarray:
    """Row numbers of the highest values, highest first; rows of -inf are left out."""
    count = min(count, len(values))
    chosen = np.argpartition(-values, count - 1)[:count]
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    return chosen[values[chosen] > -np.inf]


def single_finds(
    problem: Problem, part: str, logits: np.ndarray, targets: np.ndarray
) -> tuple[list[Found], list[Found]]:
    stated, right = confidences(problem, logits, targets, problem.temperature)
    predicted = logits.argmax(1)

    def found(row: int, rank: float) -> Found:
        names = problem.labels[predicted[row]], problem.labels[targets[row]]
        return Found(part, row, rank, *names, f"{stated[row]:.3f}")

    wrong = top(np.where(right > 0, -np.inf, stated))
    unsure = np.where(stated < CERTAIN, -stated, -np.inf)
    return [found(i, stated[i]) for i in wrong], [found(i, -stated[i]) for i in top(unsure)]


def multi_finds(
    problem: Problem, part: str, logits: np.ndarray, targets: np.ndarray
) -> tuple[list[Found], list[Found]]:
    """One label of a row: the one it is most wrong about, or the one nearest to its threshold."""
    p = problem.probabilities(logits)
    thresholds = problem.threshold_array()
    mistakes = np.where((p >= thresholds) != (targets > 0), np.abs(p - targets), -np.inf)
    nearness = -np.abs(p - thresholds)

    def found(row: int, values: np.ndarray) -> Found:
        label = int(values[row].argmax())
        name, given = problem.labels[label], p[row, label] >= thresholds[label]
        truth = name if targets[row, label] else f"not {name}"
        return Found(part, row, values[row, label], name if given else f"not {name}", truth, f"{p[row, label]:.3f}")

    wrong = [found(i, mistakes) for i in top(mistakes.max(1))]
    return wrong, [found(i, nearness) for i in top(nearness.max(1))]


def regression_finds(
    problem: Problem, part: str, logits: np.ndarray, targets: np.ndarray
) -> tuple[list[Found], list[Found]]:
    errors = logits[:, 0] - targets
    rows = top(np.abs(errors))
    values = [(f"{logits[i, 0]:.4g}", f"{targets[i]:.4g}", f"{errors[i]:+.3g}") for i in rows]
    return [Found(part, int(i), abs(float(errors[i])), *v) for i, v in zip(rows, values, strict=True)], []


# Speed, and how to do it again


def speed_charts(run: Finished) -> list[Html]:
    speed = run.metrics["speed"]
    padding = padding_shares(run)
    rows = [(name, share, f"{share:.1%}") for name, share in padding]
    note = (
        f"Share of the positions that hold padding. {speed['tokens_per_second']:,.0f} tokens and "
        f"{speed['examples_per_second']:,.0f} texts a second in training; {speed['device']}, {speed['precision']}, "
        f"{speed['attention']} attention, {speed['engine']}."
    )
    parts = [(name, seconds) for name, seconds in speed.get("seconds_by_part", {}).items() if seconds > 0]
    legend = [(f"{name} {duration(seconds)}", (i + 1) % 4) for i, (name, seconds) in enumerate(parts)]
    pieces = [figure("Padding", bar_list(rows), note=note)]
    return [*pieces, figure("Time by part", stacked(parts), legend=legend)] if parts else pieces


def padding_shares(run: Finished) -> list[tuple[str, float]]:
    """Padding of the usual ways on these texts, and what is left of it here."""
    lengths, size = run.sets["train"].lengths, run.config.batch_size
    mean = float(lengths.mean())
    order = np.random.default_rng(run.config.seed).permutation(len(lengths))
    longest = np.maximum.reduceat(lengths[order], np.arange(0, len(lengths), size))
    sizes = np.diff(np.append(np.arange(0, len(lengths), size), len(lengths)))
    dynamic = 1 - float(lengths.sum()) / float(longest @ sizes)
    return [
        (f"padded to {run.config.max_length}", 1 - mean / (run.config.max_length or mean)),
        (f"padded to the longest of {size}", dynamic),
        ("minibert, inside attention", float(run.metrics["speed"]["padding_fraction"])),
        ("minibert, everywhere else", 0.0),
    ]


def reproduce(run: Finished) -> Html:
    changed = {
        key: value
        for key, value in run.config.to_dict().items()
        if value != RunConfig().to_dict()[key] and key != "output"
    }
    lines = [(key, json.dumps(value, ensure_ascii=False)) for key, value in changed.items()]
    lines += [(f"{part} sha256", file["sha256"]) for part, file in run.record["data"].items()]
    lines += [(name, version) for name, version in run.record["versions"].items()]
    settings = table(["setting, file or package", "value"], "lt", lines)
    details = f"<details><summary>Settings other than the defaults, data and versions</summary>{settings}</details>"
    return Html(f"<section><h2>Do it again</h2><pre>{esc(command(run))}</pre>{details}</section>")


def command(run: Finished) -> str:
    """The command line, or the call for a run from lists."""
    given = [word for word in run.record["command"] if word not in ("--resume", "--resume-from-checkpoint")]
    if len(given) != 1 or "(" not in given[0]:
        return shlex.join(given)
    defaults, skipped = RunConfig(), ("output", "resume", "quiet", "overwrite")
    flags = {
        key: value for key, value in vars(run.config).items() if value != getattr(defaults, key) and key not in skipped
    }
    return ", ".join(["minibert.finetune(texts, labels", *(f"{key}={value!r}" for key, value in flags.items())]) + ")"
