"""The model card: README.md in the run's folder, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from minibert.problem.problem import MULTI, REGRESSION, SINGLE
from minibert.reporting.charts import cut, fixed
from minibert.reporting.html_report import TITLES, Finished, command, model_name, verdict
from minibert.runtime.files import write_text
from minibert.training.optimizer import peak_learning_rate

CLASSES = 40  # the most rows of the table of classes
HUB_NAMES = {  # ours -> the name of the metric on the Hub
    SINGLE: {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation", "roc_auc": "roc_auc"},
    MULTI: {"micro_f1": "f1", "macro_f1": "f1", "subset_accuracy": "accuracy"},
    REGRESSION: {"pearson": "pearsonr", "spearman": "spearmanr", "mse": "mse", "mae": "mae"},
}
OUTLAWED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]+")


def write_card(output: Path, run: Finished) -> None:
    name = plain(output.resolve().name)
    parts = [f"---\n{metadata(run, name)}\n---", f"# {markdown(name)}", introduction(run), data(run), recipe(run)]
    parts += [results(run), use(run), limits(run), reproduce(run)]
    write_text(output / "README.md", "\n\n".join(parts) + "\n")


def metadata(run: Finished, name: str) -> str:
    """The YAML block: how to load the model, what it was made from and what it reached."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics = {} if run.part is None else run.metrics[run.part]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="text",
            dataset_name=source_name(run),
            dataset_split=run.part,
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
        base_model=base_model(run),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def base_model(run: Finished) -> str | None:
    """The model's id on the Hub, where that is what --model was: a folder's path says nothing to others."""
    model = run.config.model or ""
    return model if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not Path(model).exists() else None


def source_name(run: Finished) -> str:
    return plain(Path(run.config.train).name if run.config.train else "texts from Python") or "data"


def plain(text: str) -> str:
    """Text on one line that YAML can hold."""
    return OUTLAWED.sub(" ", text.encode("utf-8", "replace").decode("utf-8")).strip()


def markdown(text: object) -> str:
    """Text from data as Markdown that shows it as it is, in a table too."""
    escaped = re.sub(r"([\\`*_{}\[\]|~$:])", r"\\\1", cut(plain(str(text)), 80))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def introduction(run: Finished) -> str:
    kind = {SINGLE: "one label", MULTI: "any number of labels", REGRESSION: "a number"}[run.problem.kind]
    subject = "a pair of texts" if run.data.columns.pair else "a text"
    names = ", ".join(markdown(name) for name in run.problem.labels[:12])
    more = f" and {len(run.problem.labels) - 12} more" if len(run.problem.labels) > 12 else ""
    model = base_model(run) or model_name(run)
    return (
        f"A BERT classifier, fine-tuned from {markdown(model)} with minibert: it gives {subject} {kind} "
        f"({names}{more}). {verdict(run, lambda label: f'“{markdown(label)}”')}"
    )


def data(run: Finished) -> str:
    rows = [
        [part, f"{len(examples):,}", markdown(Path(examples.source).name)] for part, examples in run.data.splits.items()
    ]
    lengths, lost = run.sets["train"].tokens.full_lengths, run.sets["train"].tokens.truncated
    limit, truncation = run.config.max_length, run.config.truncation
    text = f"A text has {lengths.mean():.0f} tokens on average. "
    if truncation == "window":
        text += f"Texts of more than {limit} tokens are read in overlapping windows."
    else:
        share = f"{(lost > 0).mean():.1%} of the training rows"
        text += f"Texts are cut to {limit} tokens ({truncation}), which shortens {share}."
    return f"## Data\n\n{rows_of(['part', 'rows', 'file'], rows)}\n\n{text}"


def recipe(run: Finished) -> str:
    config, speed = run.config, run.metrics["speed"]
    size = f"{config.batch_tokens} tokens" if config.batch_tokens else f"{config.batch_size} texts"
    head = peak_learning_rate("classifier.weight", 0, config)
    rates = f"{head:g}" if config.freeze == "all" else f"{config.learning_rate:g}"
    rates += f" (head {head:g})" if f"{head:g}" != rates else ""
    steps = f"{run.metrics['train']['steps']:,} steps were taken"
    planned = ("steps", f"{config.max_steps:,}") if config.max_steps else ("epochs", f"{config.epochs:g}")
    clipping = f"gradients clipped at {config.max_grad_norm:g}" if config.max_grad_norm else "gradients not clipped"
    weights = config.class_weights if config.class_weights.startswith("{") else Path(config.class_weights).name
    rows: list[tuple[str, Any]] = [
        (planned[0], f"{planned[1]} (at most; {steps})"),
        ("batch", f"{size}, times {config.gradient_accumulation_steps}"),
        ("learning rate", f"{rates}, {config.schedule}, warm-up {config.warmup_ratio:.0%}"),
        ("optimiser", f"AdamW, weight decay {config.weight_decay:g}, {clipping}"),
        ("frozen", config.freeze),
        ("class weights", markdown(weights)),
        ("label smoothing", f"{config.label_smoothing:g}"),
        ("head", config.head),
        ("seed", config.seed),
        ("computed on", f"{speed['device']}, {speed['precision']}, {speed['train_seconds']:.0f} s of training"),
    ]
    return "## Recipe\n\n" + rows_of(["setting", "value"], [[name, str(value)] for name, value in rows])


def results(run: Finished) -> str:
    if run.part is None:
        return "## Metrics\n\nNone: no rows were kept for validation or test."
    parts = [part for part in ("validation", "test") if part in run.metrics]
    names = [name for name, value in run.metrics[run.part].items() if isinstance(value, float)]
    rows = [[name.replace("_", " "), *(fixed(run.metrics[part].get(name), 4) for part in parts)] for name in names]
    pieces = ["## Metrics", rows_of(["metric", *parts], rows), calibration(run, run.part), classes(run, run.part)]
    return "\n\n".join(piece for piece in pieces if piece)


def calibration(run: Finished, part: str) -> str:
    if "calibration" not in run.metrics:
        return ""
    error = run.metrics["calibration"][part]["expected_calibration_error"]
    others = (
        ""
        if run.config.mlp_size()
        else "; transformers does not know of it and gives the same labels with unscaled probabilities"
    )
    return (
        f"The temperature of the probabilities is {run.problem.temperature:.4g}: expected calibration error on "
        f"{part} {fixed(error['after'], 4)}, without it {fixed(error['before'], 4)}. minibert applies it{others}."
    )


def classes(run: Finished, part: str) -> str:
    per_class = run.metrics[part].get("per_class", {})
    if not per_class:
        return ""
    rows = [
        [markdown(name), *(fixed(row[key], 4) for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for name, row in list(per_class.items())[:CLASSES]
    ]
    rest = f"\n\nThe first {CLASSES} of {len(per_class)} classes." if len(per_class) > CLASSES else ""
    return rows_of(["class", "precision", "recall", "F1", "rows"], rows) + rest


def use(run: Finished) -> str:
    example = '("a text", "its second text")' if run.data.columns.pair else '"a text"'
    text = f"""## Intended use

For texts like those it was trained on: same language, same kind of source, same meaning of the labels.

```python
import minibert

classifier = minibert.load("path/to/this/folder")
print(classifier.predict([{example}])[0])
```"""
    if run.config.mlp_size():
        return (
            text
            + "\n\nThe head has a hidden layer, which transformers lacks and refuses: load the folder with minibert."
        )
    return text + "\n\n`AutoModelForSequenceClassification.from_pretrained` of transformers loads the folder too."


def limits(run: Finished) -> str:
    lines = [
        "Measured on rows like the training rows; on texts from elsewhere it will be less good. Try it on your own."
    ]
    if run.part is not None:
        lines.append(f"The figures come from {len(run.sets[run.part].targets):,} rows; small differences are chance.")
    if run.part == "validation":
        lines.append("They are of the validation rows, which also chose the best weights: expect a little less.")
    per_class = run.metrics.get(run.part or "", {}).get("per_class", {})
    seen = {name: row for name, row in per_class.items() if row["support"]}
    if seen:
        worst = min(seen, key=lambda name: seen[name]["f1"])
        f1, rows = fixed(seen[worst]["f1"], 4), seen[worst]["support"]
        lines.append(f"Weakest class: {markdown(worst)}, F1 {f1} on {rows:,} rows.")
    lost = run.sets["train"].tokens.truncated
    if (lost > 0).any():
        lines.append(
            f"Of a text longer than {run.config.max_length} tokens it reads only a part ({run.config.truncation})."
        )
    lines.append("It repeats the biases of its data and of the pretrained model. Decisions about people need a person.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def reproduce(run: Finished) -> str:
    line = " ".join(re.sub(r"^(['\"]?)[/~].*/(?=.)", r"\1", word) for word in plain(command(run)).split(" "))
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    versions = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
    return f"## Reproduce\n\n{fence}\n{line}\n{fence}\n\nWith {versions}. `report.html` beside this file has the plots."
