"""Write benchmarks/README.md from its template and the results: `python benchmarks/readme.py` (a test compares)."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE / "README.md"

TRAINERS = {
    "transformers, padded to 175": "transformers, padded to 175 (as in tutorials)",
    "transformers, padded to 128": "transformers, padded to 128",
    "transformers, dynamic padding": "transformers, dynamic padding",
    "transformers, best": "transformers at its best",
    "minibert": "**minibert**",
}
SAVINGS = {
    "minibert, batches of like length": "with `--length-buckets`",
    "minibert without CLS-only last layer": "without the [CLS]-only last layer",
    "minibert without compact vocabulary": "without the compact vocabulary",
    "minibert without bulk dropout": "without bulk dropout",
    "minibert without attention chunks": "without small groups in attention",
    "minibert without kept memory": "without kept memory (removed since)",
    "minibert without dropout": "with dropout 0",
}
TRAININGS = {
    "best": "all weights, 1 epoch, transformers at its best",
    "minibert": "all weights, 1 epoch, **minibert**",
    "frozen-tutorial": "frozen, 10 epochs, the tutorial's loop in transformers",
    "frozen-minibert": "frozen, 10 epochs, **minibert**",
}
SERVING = {
    "transformers pipeline": "transformers' pipeline, batches of 32",
    "transformers pipeline, sorted by length": "transformers' pipeline, sorted by length",
    "onnxruntime": "onnxruntime, the same batches",
    "onnxruntime, sorted by length": "onnxruntime, sorted by length",
    "minibert": "**minibert**",
    "onnxruntime int8, sorted by length": "onnxruntime, int8, sorted by length",
}
COMMANDS = {
    "finetune": "`finetune`, an epoch",
    "evaluate": "`evaluate`",
    "predict --file": "`predict --file`",
    "predict < texts": "`predict`, standard input to standard output",
}
TASKS = {
    "sms_spam": ("SMS spam", "F1 of spam"),
    "sst2": ("SST-2, 4,000 sentences", "accuracy"),
    "mrpc": ("MRPC", "F1"),
    "stsb": ("STS-B", "Spearman"),
    "trec6": ("TREC-6", "accuracy"),
    "trec50": ("TREC-50, 6 epochs", "accuracy"),
    "goemotions": ("GoEmotions, 8,000 rows", "macro F1, threshold 0.3"),
}
YARDSTICK_TASKS = {
    "sms_spam": "SMS spam",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "trec6": "TREC, 6 classes",
    "trec50": "TREC, 50 classes",
    "goemotions": "GoEmotions",
}
YARDSTICK_SIZES = {"few": "20 rows per class"}


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *rows))


def plus_minus(numbers: dict[str, float], digits: int, several: bool = True) -> str:
    spread = f" ± {numbers['std']:.{digits}f}" if several else ""
    return f"{numbers['mean']:.{digits}f}{spread}"


def steps() -> dict[str, str]:
    measured = results("steps-cpu")
    milliseconds, ratios = measured["milliseconds_a_step"], measured["minibert_is_faster_by"]

    def rows(names: dict[str, str], digits: int) -> list[list[str]]:
        return [
            [shown, f"{milliseconds[name]:.0f}", "" if name == "minibert" else f"{ratios[name]:.{digits}f}x"]
            for name, shown in names.items()
        ]

    return {
        "commit": measured["commit"],
        "trainers": table(["trainer", "ms per step", "minibert is faster by"], rows(TRAINERS, 1)),
        "savings": table(["minibert", "ms per step", "minibert as it is, faster by"], rows(SAVINGS, 2)),
        "compiled": f"{milliseconds['transformers, best, compiled'] / 1000:.1f}",
        "share": f"{measured['share_of_matmul_rate']:.0%}",
    }


def breakdown() -> dict[str, str]:
    measured = results("breakdown-cpu")
    parts = measured["milliseconds"]
    rows = [[name, f"{ms:.1f}", f"{ms / sum(parts.values()):.0%}"] for name, ms in parts.items()]
    return {"commit": measured["commit"], "table": table(["part of a step", "ms", "fraction"], rows)}


def training() -> dict[str, str]:
    measured = results("end-to-end")
    rows = []
    for name, shown in TRAININGS.items():
        found = measured["summary"][name]
        several = found["seeds"] > 1
        gigabytes = f"{found['peak_megabytes']['mean'] / 1000:.1f} GB"
        scores = [plus_minus(found[score], 3, several) for score in ("accuracy", "spam_f1")]
        seeds = f"({found['seeds']} seed{'s' if several else ''})"
        rows.append([f"{shown} {seeds}", plus_minus(found["wall_seconds"], 1, several), gigabytes, *scores])
    earlier = next(run["commit"] for run in measured["runs"] if run["trainer"] == "frozen-tutorial")
    head = ["", "seconds", "peak memory", "accuracy", "spam F1"]
    return {"commit": measured["commit"], "tutorial_commit": earlier, "table": table(head, rows)}


def serving() -> dict[str, str]:
    measured = results("serving-cpu")
    rates, ratios = measured["texts_per_second"], measured["faster_than_the_pipeline"]
    rows = [[shown, f"{rates[name]:.0f}", f"{ratios[name]:.1f}x"] for name, shown in SERVING.items()]
    difference = measured["largest_difference_of_a_probability"]["onnxruntime int8, sorted by length"]
    head = ["", "texts per second", "faster than the pipeline by"]
    return {"commit": measured["commit"], "table": table(head, rows), "int8_difference": f"{difference:.2f}"}


def tokens() -> dict[str, str]:
    measured = results("tokens-cpu")
    return {
        "commit": measured["commit"],
        "seconds": f"{measured['seconds']:.1f}",
        "megabytes": f"{measured['peak_megabytes']}",
        "minibert": f"{round(measured['minibert_texts_per_second'], -2):,}",
        "transformers": f"{round(measured['transformers_texts_per_second'], -2):,}",
    }


def load() -> dict[str, str]:
    measured = results("load-cpu")
    rows = []
    for name, shown in COMMANDS.items():
        found = measured["commands"][name]
        peaks = [f"{found[rows]['peak_megabytes']:.0f} MB" for rows in ("100000 rows", "1000000 rows")]
        rows.append([shown, *peaks, f"{found['bytes_a_row']} bytes"])
    head = ["", "100,000 rows", "1,000,000 rows", "per further row"]
    return {"commit": measured["commit"], "table": table(head, rows)}


def scores() -> dict[str, str]:
    verdicts = results("scores")["verdicts"]
    rows = []
    for task, names in TASKS.items():
        sides = [verdicts[task][side] for side in ("minibert", "transformers")]
        rows.append([*names, *(f"{plus_minus(side, 1)} ({side['seeds']} seeds)" for side in sides)])
    return {"table": table(["task", "score", "minibert", "transformers"], rows)}


def yardsticks() -> dict[str, str]:
    return {"table": yardstick_table(results("yardsticks")["runs"], YARDSTICK_TASKS, YARDSTICK_SIZES)}


def yardstick_table(runs: list[dict[str, Any]], tasks: Mapping[str, str], sizes: Mapping[str, str]) -> str:
    """A row for each task and size, a column for each trainer; `tasks` and `sizes` may have other names for them."""
    trainers = list(dict.fromkeys(run["trainer"] for run in runs))
    rows = []
    for task, size in dict.fromkeys((run["task"], run["size"]) for run in runs):
        of_trainer: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in trainers}
        for run in runs:
            if (run["task"], run["size"]) == (task, size):
                of_trainer[run["trainer"]].append(run)
        rows.append([f"{tasks.get(task, task)}, {sizes.get(size, size)}", *map(yardstick_cell, of_trainer.values())])
    return table(["", *trainers], rows)


def yardstick_cell(runs: list[dict[str, Any]]) -> str:
    """Mean and spread of the scores over seeds, in brackets how many, and the mean of the seconds."""
    if not runs:
        return "–"
    scores = [run["score"] for run in runs]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    seconds = statistics.fmean(run["seconds"] for run in runs)
    return f"{statistics.fmean(scores):.1f}{spread} ({len(scores)}), {seconds:.0f} s"


SECTIONS = (steps, breakdown, training, serving, tokens, load, scores, yardsticks)


def page() -> str:
    values = {f"{part.__name__}.{name}": text for part in SECTIONS for name, text in part().items()}
    template = (HERE / "readme.template.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: values[match[1]], template)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
