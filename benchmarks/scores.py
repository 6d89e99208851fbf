"""The same recipe and a head at random on both sides: minibert beside transformers' Trainer, by task and seed.

`python benchmarks/scores.py` (hours; stop it whenever you like: what results/scores.json holds is not repeated), or
`python benchmarks/scores.py --tasks sms_spam trec6 --seeds 1 --max-rows 100` for a look.

Both train MiniLM with the same learning rate, epochs, batch size, warm-up, weight decay, clipping and text length on
the same rows, from a head at random, and keep the best epoch by the same validation metric. They differ in the random
numbers that make batches, dropout and head. (What the plain command scores: yardsticks.py.) Each run is a process of
its own. Scores are computed here, from the test predictions of both, with scikit-learn and scipy. Needs the `bench`
extra (Trainer asks for accelerate).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split

from minibert.batching.plans import plan_epoch
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.runs.setup import demo_weights

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "scores.json"
TRAINERS = ("minibert", "transformers")
BUCKETS = "minibert --length-buckets"
ON_OUR_BATCHES = "transformers, minibert's batches and head"  # what is left of a difference: dropout and rounding
CHOICES = (*TRAINERS, BUCKETS, ON_OUR_BATCHES)
RECIPE = {"batch_size": 32, "weight_decay": 0.01, "warmup_ratio": 0.1, "max_grad_norm": 1.0, "max_length": 128}
SPLIT_SEED = 2018
THRESHOLD = 0.3  # of GoEmotions' published score

Rows = list[tuple[str, str, str]]  # text, second text or "", label (several between |)
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One data set: its rows, its recipe, and how it is scored. Scores that are not given a sign are in points."""

    name: str
    parts: Callable[[], dict[str, Rows]]
    kind: str  # single, multi or regression
    best_by: str  # validation metric that chooses the epoch, under minibert's name
    scores: Callable[[np.ndarray, np.ndarray], Scores]  # (truth, outputs [n, L]) -> scores; the first one counts
    epochs: int = 3
    learning_rate: float = 1e-4
    max_rows: int | None = None  # of training, to end in hours
    published: str = ""


def read_tsv(*path: str, header: bool) -> list[list[str]]:
    with open(SHARED.joinpath(*path), encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows[1:] if header else rows


def held_out(rows: Rows, share: float | int, stratify: bool = True) -> tuple[Rows, Rows]:
    """(kept, taken), a share or a number of rows; the same for every trainer and seed."""
    labels = [row[2] for row in rows]
    counts = Counter(labels)
    common = counts.most_common(1)[0][0]  # a label of one row cannot be divided: it goes along with these
    strata = [label if counts[label] > 1 else common for label in labels] if stratify else None
    kept, taken = train_test_split(rows, test_size=share, random_state=SPLIT_SEED, stratify=strata)
    return kept, taken


def sms_spam() -> dict[str, Rows]:
    with open(SHARED / "sms_spam" / "spamdata_v2.csv", encoding="utf-8", newline="") as file:
        rows = [(row["text"], "", row["label"]) for row in csv.DictReader(file)]
    train, rest = held_out(rows, 0.3)
    validation, test = held_out(rest, 0.5)
    return {"train": train, "validation": validation, "test": test}


def sst2() -> dict[str, Rows]:
    def part(name: str) -> Rows:
        return [(text, "", label) for text, label in read_tsv("sst2", f"{name}.tsv", header=False)]

    return {"train": part("train"), "validation": part("dev"), "test": part("test")}


def mrpc() -> dict[str, Rows]:
    def part(name: str) -> Rows:
        rows = read_tsv("mrpc", f"msr_paraphrase_{name}.txt", header=True)
        return [(row[3], row[4], row[0]) for row in rows]

    train, validation = held_out(part("train"), 0.1)
    return {"train": train, "validation": validation, "test": part("test")}


def stsb() -> dict[str, Rows]:
    def part(name: str) -> Rows:
        rows = read_tsv("stsb", "original", f"sts-{name}.tsv", header=False)
        return [(row[5], row[6], row[4]) for row in rows]

    return {"train": part("train"), "validation": part("dev"), "test": part("test")}


def trec(fine: bool) -> dict[str, Rows]:
    def part(name: str) -> Rows:
        lines = (SHARED / "trec" / f"{name}.label").read_text(encoding="latin-1").splitlines()
        pairs = [line.split(" ", 1) for line in lines if line]
        return [(text, "", label if fine else label.split(":")[0]) for label, text in pairs]

    train, validation = held_out(part("train_5500"), 0.1)
    return {"train": train, "validation": validation, "test": part("TREC_10")}


def go_emotions() -> dict[str, Rows]:
    folder = ("multilabel", "goemotions")
    names = SHARED.joinpath(*folder, "labels.txt").read_text(encoding="utf-8").split()

    def part(name: str) -> Rows:
        rows = read_tsv(*folder, f"{name}.tsv", header=False)
        return [(row[0], "", "|".join(names[int(i)] for i in row[1].split(","))) for row in rows if row[0].strip()]

    return {"train": part("train"), "validation": part("dev"), "test": part("test")}


def accuracy(truth: np.ndarray, outputs: np.ndarray) -> Scores:
    return {"accuracy": accuracy_score(truth, outputs.argmax(1))}


def f1_and_accuracy(truth: np.ndarray, outputs: np.ndarray) -> Scores:
    return {"f1": f1_score(truth, outputs.argmax(1)), **accuracy(truth, outputs)}


def correlations(truth: np.ndarray, outputs: np.ndarray) -> Scores:
    values = outputs[:, 0]
    return {"spearman": spearmanr(truth, values).statistic, "pearson": pearsonr(truth, values).statistic}


def multi_label(truth: np.ndarray, outputs: np.ndarray) -> Scores:
    given = outputs >= THRESHOLD
    return {
        name: f1_score(truth, given, average=name.split("_")[0], zero_division=0) for name in ("macro_f1", "micro_f1")
    }


TASKS = {
    task.name: task
    for task in (
        Task("sms_spam", sms_spam, "single", "macro_f1", f1_and_accuracy, published="frozen BERT-base: F1 90, acc 97"),
        Task(
            "sst2", sst2, "single", "accuracy", accuracy, max_rows=4000, published="dev, all 67k phrases: 91.5 - 93.2"
        ),
        Task(
            "mrpc", mrpc, "single", "macro_f1", f1_and_accuracy, published="dev: F1 87.3 - 89.5; test majority F1 79.9"
        ),
        Task("stsb", stsb, "regression", "spearman", correlations, published="dev: spearman 88.5 BERT-base"),
        Task("trec6", lambda: trec(False), "single", "accuracy", accuracy, published="acc 96.8 BERT-base"),
        Task("trec50", lambda: trec(True), "single", "accuracy", accuracy, epochs=6),
        Task(
            "goemotions",
            go_emotions,
            "multi",
            "loss",
            multi_label,
            max_rows=8000,
            published="macro-F1 50.3, all 43k rows",
        ),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=CHOICES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max-rows", type=int, help="cap each part, for a look; the results are not kept")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SEED"), help="Trainer on a task here (used by itself)")
    arguments = parser.parse_args()
    if arguments.one:
        folder, seed = arguments.one
        run_transformers(TASKS[arguments.tasks[0]], Path(folder), int(seed), arguments.trainers == [ON_OUR_BATCHES])
        return
    from steps import environment

    path = RESULTS if arguments.max_rows is None else Path(tempfile.mkdtemp()) / "scores.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in arguments.seeds:  # seeds outside, so that a part of the work is a whole comparison
        for name in arguments.tasks:
            for trainer in arguments.trainers:
                key = {"task": name, "trainer": trainer, "seed": seed}
                if not any(key.items() <= run.items() for run in runs):
                    run = {**key, **in_own_process(TASKS[name], trainer, seed, arguments.max_rows)}
                    run["commit"] = environment()["commit"]
                    print(json.dumps(run), flush=True)
                    runs.append(run)
                    write(path, {**environment(), "recipe": RECIPE, "verdicts": verdicts(runs), "runs": runs})
    show(runs)
    print(json.dumps(verdicts(runs)))


def write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def in_own_process(task: Task, trainer: str, seed: int, max_rows: int | None) -> dict[str, Any]:
    """Train in a fresh process on files of the task's rows; score the test outputs that it leaves."""
    parts = capped(task, max_rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, rows in parts.items():
            with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "second", "label"), *rows])
        own = [sys.executable, __file__, "--tasks", task.name, "--trainers", trainer, "--one", name, str(seed)]
        program, *flags = trainer.split()
        command = [*minibert_command(task, folder, seed), *flags] if program == "minibert" else own
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{task.name}, {trainer}, seed {seed}: {done.stderr.strip()[-2000:]}")
        outputs = minibert_outputs(task, folder) if program == "minibert" else np.load(folder / "outputs.npy")
    scores = task.scores(targets(task, parts, "test"), outputs)
    rounded = {key: round(100 * float(value), 2) for key, value in scores.items()}
    return {"scores": rounded, "train_rows": len(parts["train"]), "wall_seconds": round(seconds, 1)}


def capped(task: Task, max_rows: int | None) -> dict[str, Rows]:
    """The task's rows, training cut to the task's cap, and every part to --max-rows."""
    parts = task.parts()
    caps = {part: max_rows for part in parts}
    caps["train"] = min(filter(None, (task.max_rows, max_rows)), default=None)
    for part, cap in caps.items():
        if cap is not None and cap < len(parts[part]):
            stratify = task.kind == "single" and cap > 10 * len({row[2] for row in parts[part]})
            _, parts[part] = held_out(parts[part], cap, stratify)
    return parts


def label_names(task: Task, parts: dict[str, Rows]) -> list[str]:
    """All labels of all parts in the order of text, which is minibert's where they are not all numbers or 0 and 1."""
    return sorted({name for rows in parts.values() for row in rows for name in row[2].split("|")})


def targets(task: Task, parts: dict[str, Rows], part: str) -> np.ndarray:
    if task.kind == "regression":
        return np.array([float(row[2]) for row in parts[part]], dtype=np.float32)
    names = label_names(task, parts)
    if task.kind == "single":
        return np.array([names.index(row[2]) for row in parts[part]])
    return np.array([[name in row[2].split("|") for name in names] for row in parts[part]], dtype=np.float32)


def minibert_command(task: Task, folder: Path, seed: int) -> list[str]:
    kinds = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    flags = {**RECIPE, "epochs": task.epochs, "learning_rate": task.learning_rate, "seed": seed, "metric": task.best_by}
    flags |= {part: folder / f"{part}.csv" for part in ("train", "validation", "test")}
    flags |= {
        "text_column": "text",
        "label_column": "label",
        "problem_type": kinds[task.kind],
        "output": folder / "run",
    }
    if has_pairs(task):
        flags["text_pair_column"] = "second"
    if task.kind == "multi":
        flags["label_delimiter"] = "|"
    words = [word for key, value in flags.items() for word in ("--" + key.replace("_", "-"), str(value))]
    words += ["--head-init", "random"]
    return [sys.executable, "-m", "minibert.finetune", *words, "--quiet"]


def has_pairs(task: Task) -> bool:
    return task.name in ("mrpc", "stsb")


def minibert_outputs(task: Task, folder: Path) -> np.ndarray:
    """[n, L] probabilities, or [n, 1] values, in the order of the labels' names."""
    with open(folder / "run" / "predictions-test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = sorted(name for name in rows[0] if name.startswith("probability_")) or ["predicted"]
    return np.array([[float(row[name]) for name in columns] for row in rows])


def run_transformers(task: Task, folder: Path, seed: int, on_our_batches: bool) -> None:
    """Trainer as its documentation has it: dynamic padding, an evaluation each epoch, the best one kept."""
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    parts = {}
    for part in ("train", "validation", "test"):
        with open(folder / f"{part}.csv", encoding="utf-8", newline="") as file:
            parts[part] = [(row["text"], row["second"], row["label"]) for row in csv.DictReader(file)]
    tokenizer = AutoTokenizer.from_pretrained(demo_weights())

    def examples(part: str) -> list[dict[str, Any]]:
        rows, labels = parts[part], targets(task, parts, part).tolist()
        second = [row[1] for row in rows] if has_pairs(task) else None
        encoded = tokenizer([row[0] for row in rows], second, truncation=True, max_length=RECIPE["max_length"])
        return [{**{k: v[i] for k, v in encoded.items()}, "labels": label} for i, label in enumerate(labels)]

    def metrics(prediction: Any) -> Scores:
        logits, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if task.kind == "regression":
            return correlations(truth, logits)
        if task.kind == "multi":
            return {}  # by its loss
        found = logits.argmax(1)
        return {"accuracy": accuracy_score(truth, found), "macro_f1": f1_score(truth, found, average="macro")}

    kinds = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    labels = 1 if task.kind == "regression" else len(label_names(task, parts))
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        demo_weights(), num_labels=labels, problem_type=kinds[task.kind]
    )
    settings = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        seed=seed,
        learning_rate=task.learning_rate,
        num_train_epochs=task.epochs,
        per_device_train_batch_size=RECIPE["batch_size"],
        per_device_eval_batch_size=RECIPE["batch_size"],
        weight_decay=RECIPE["weight_decay"],
        warmup_steps=RECIPE["warmup_ratio"],
        max_grad_norm=RECIPE["max_grad_norm"],
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=task.best_by,
        greater_is_better=task.best_by != "loss",
        report_to="none",
        disable_tqdm=True,
    )
    train = examples("train")
    trainer = transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=train,
        eval_dataset=examples("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    if on_our_batches:
        copy_our_head(model, seed)
        order = OurOrder([len(example["input_ids"]) for example in train], seed)
        trainer._get_train_sampler = lambda *_: order
    trainer.train()
    logits = np.asarray(trainer.predict(examples("test")).predictions, dtype=np.float64)
    if task.kind == "multi":
        logits = 1 / (1 + np.exp(-logits))
    np.save(folder / "outputs.npy", logits)


class OurOrder:
    """A sampler: each pass over it is the next epoch of minibert's batches, row by row."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        self.lengths, self.seed, self.epoch = np.array(lengths), seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches = plan_epoch(self.lengths, batch_size=int(RECIPE["batch_size"]), seed=self.seed, epoch=self.epoch)
        self.epoch += 1
        return iter(np.concatenate(batches).tolist())


def copy_our_head(model: Any, seed: int) -> None:
    """The new head that minibert draws with this seed."""
    ours, _ = load_model(demo_weights(), BertForSequenceClassification, num_labels=model.num_labels, seed=seed)
    model.classifier.load_state_dict(ours.classifier.out.state_dict())


def verdicts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each task mean and spread of its first score by trainer, and whether the difference is more than chance."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        values: dict[str, list[float]] = {}
        for run in runs:
            if run["task"] == task:
                score = next(iter(run["scores"]))
                values.setdefault(run["trainer"], []).append(run["scores"][score])
        result[task] = {"score": score, "verdict": verdict(values), **{name: spread(v) for name, v in values.items()}}
    return result


def spread(values: list[float]) -> dict[str, Any]:
    deviation = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 2), "std": deviation, "seeds": len(values)}


def verdict(values: dict[str, list[float]]) -> str:
    """Two standard errors of the difference, but never less than half a point, count as chance."""
    ours, theirs = values.get("minibert", []), values.get("transformers", [])
    if len(ours) < 2 or len(theirs) < 2:
        return "too few runs"
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    if abs(difference) <= max(2 * error, 0.5):
        return "level"
    return f"minibert {'better' if difference > 0 else 'worse'} by {abs(difference):.1f}"


def show(runs: list[dict[str, Any]]) -> None:
    print(f"\n{'task':<12}{'score':<10}{'minibert':>18}{'transformers':>18}  {'verdict':<24}published elsewhere")
    for task, found in verdicts(runs).items():
        cells = ""
        for trainer in TRAINERS:
            numbers = found.get(trainer)
            cells += f"{'-' if numbers is None else shown(numbers):>18}"
        cap = f" (trained on {TASKS[task].max_rows} rows)" if TASKS[task].max_rows else ""
        print(f"{task:<12}{found['score']:<10}{cells}  {found['verdict']:<24}{TASKS[task].published}{cap}")


def shown(numbers: dict[str, Any]) -> str:
    return f"{numbers['mean']:.2f}" + ("" if numbers["std"] is None else f" ± {numbers['std']:.2f}")


if __name__ == "__main__":
    main()
