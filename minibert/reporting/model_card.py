"""The model card: README.md in the run's folder, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minibert.filenames import CARD
from minibert.problem.problem import MULTI, REGRESSION, SINGLE
from minibert.reporting.base_card import base_metadata
from minibert.reporting.format import fixed, shorten
from minibert.reporting.render import ENVIRONMENT, render
from minibert.reporting.results import TITLES, Finished, headline
from minibert.runtime.files import write_text
from minibert.training.optimizer import peak_learning_rate

CLASSES, LABELS = 40, 12  # the most rows of the table of classes, and labels in a sentence
HUB_NAMES = {  # ours -> the name of the metric on the Hub
    SINGLE: {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation", "roc_auc": "roc_auc"},
    MULTI: {"micro_f1": "f1", "macro_f1": "f1", "subset_accuracy": "accuracy"},
    REGRESSION: {"pearson": "pearsonr", "spearman": "spearmanr", "mse": "mse", "mae": "mae"},
}
CONTROL_CHARS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]+")


def plain(text: str) -> str:
    """Text on one line that YAML can hold."""
    return CONTROL_CHARS.sub(" ", text.encode("utf-8", "replace").decode("utf-8")).strip()


def markdown(text: object) -> str:
    """Text from data as Markdown that shows it as it is, in a table too."""
    escaped = re.sub(r"([\\`*_{}\[\]|~$:])", r"\\\1", shorten(plain(str(text)), 80))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


ENVIRONMENT.filters["md"] = markdown


def write_card(output: Path, run: Finished) -> None:
    name, config, lengths = plain(output.resolve().name), run.config, run.sets["train"].tokens
    names = ", ".join(markdown(label) for label in run.problem.labels[:LABELS])
    more = f" and {len(run.problem.labels) - LABELS} more" if len(run.problem.labels) > LABELS else ""
    text, label = headline(run)
    command = " ".join(re.sub(r"^(['\"]?)[/~].*/(?=.)", r"\1", word) for word in plain(run.command).split(" "))
    card = render(
        "card.md.jinja",
        table=table,
        name=name,
        metadata=metadata(run, name),
        model=base_metadata(run.config.model)["base_model"] or run.model_name,
        subject="a pair of texts" if run.data.columns.pair else "a text",
        gives={SINGLE: "one label", MULTI: "any number of labels", REGRESSION: "a number"}[run.problem.kind],
        labels=names + more,
        headline=text.format(label=f"“{markdown(label)}”"),
        data=[(split, f"{len(rows):,}", Path(rows.source).name) for split, rows in run.data.splits.items()],
        mean_length=float(lengths.full_lengths.mean()),
        cut_fraction=float((lengths.truncated > 0).mean()),
        config=config,
        recipe=recipe(run),
        pairs=run.data.columns.pair is not None,
        mlp=config.mlp_size() > 0,
        fence="`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", command)), default=0)),
        command=command,
        versions=", ".join(f"{name} {version}" for name, version in run.record["versions"].items()),
        **({"split": None, "weakest": None} if run.split is None else results(run, run.split)),
    )
    write_text(output / CARD, card)


def metadata(run: Finished, name: str) -> str:
    """The YAML block: how to load the model, what it was made from and what it reached."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics = {} if run.split is None else run.metrics[run.split]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="text",
            dataset_name=plain(run.source_name) or "data",
            dataset_split=run.split,
            metric_type=theirs,
            metric_name=TITLES.get(ours, ours),
            metric_value=round(metrics[ours], 6),
        )
        for ours, theirs in HUB_NAMES[run.problem.kind].items()
        if metrics.get(ours) is not None and math.isfinite(metrics[ours])
    ]
    card = ModelCardData(
        library_name="minibert" if run.config.mlp_size() else "transformers",
        pipeline_tag="text-classification",
        tags=["bert", "minibert", run.problem.kind.replace("_", "-")],
        **base_metadata(run.config.model),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def recipe(run: Finished) -> list[tuple[str, object]]:
    config, speed = run.config, run.metrics["speed"]
    size = f"{config.batch_tokens} tokens" if config.batch_tokens else f"{config.batch_size} texts"
    head = f"{peak_learning_rate('classifier.weight', 0, config):g}"
    rate = head if config.freeze == "all" else f"{config.learning_rate:g}"
    rates = f"{rate} (head {head})" if head != rate else rate
    planned = ("steps", f"{config.max_steps:,}") if config.max_steps else ("epochs", f"{config.epochs:g}")
    clipping = f"gradients clipped at {config.max_grad_norm:g}" if config.max_grad_norm else "gradients not clipped"
    weights = config.class_weights if config.class_weights.startswith("{") else Path(config.class_weights).name
    return [
        (planned[0], f"{planned[1]} (at most; {run.metrics['train']['steps']:,} steps were taken)"),
        ("batch", f"{size}, times {config.gradient_accumulation_steps}"),
        ("learning rate", f"{rates}, {config.schedule}, warm-up {config.warmup_ratio:.0%}"),
        ("optimizer", f"AdamW, weight decay {config.weight_decay:g}, {clipping}"),
        ("frozen", config.freeze),
        ("class weights", weights),
        ("label smoothing", f"{config.label_smoothing:g}"),
        ("head", config.head),
        ("seed", config.seed),
        ("computed on", f"{speed['device']}, {speed['precision']}, {speed['train_seconds']:.0f} s of training"),
    ]


def results(run: Finished, split: str) -> dict[str, Any]:
    """What the card says of the metrics, if there are rows that were judged."""
    splits = [name for name in ("validation", "test") if name in run.metrics]
    metrics = run.metrics[split]
    per_class: dict[str, dict[str, Any]] = metrics.get("per_class", {})
    seen = {name: row for name, row in per_class.items() if row["support"]}
    weakest = min(seen, key=lambda name: seen[name]["f1"]) if seen else ""
    calibration = run.metrics.get("calibration")
    error = calibration[split]["expected_calibration_error"] if calibration else {}
    return {
        "split": split,
        "splits": splits,
        "judged_rows": len(run.sets[split].targets),
        "metrics": [
            (name.replace("_", " "), *(fixed(run.metrics[each].get(name)) for each in splits))
            for name, value in metrics.items()
            if isinstance(value, float)
        ],
        "classes": [
            (name, *(fixed(row[key]) for key in ("precision", "recall", "f1")), f"{row['support']:,}")
            for name, row in list(per_class.items())[:CLASSES]
        ],
        "more_classes": max(0, len(per_class) - CLASSES),
        "weakest": {"name": weakest, "f1": fixed(seen[weakest]["f1"]), "rows": f"{seen[weakest]['support']:,}"}
        if seen
        else None,
        "calibration": calibration
        and {key: fixed(value) for key, value in error.items()} | {"temperature": calibration["temperature"]},
    }
