"""What a first, plain command scores, beside what its users would take instead: same weights, same rows, by seed.

`python benchmarks/yardsticks.py` (hours; what results/yardsticks.json holds is not repeated), for example
`python benchmarks/yardsticks.py --tasks trec6 sst2 --sizes few --minutes 30`; `--table` prints what there is.

Every trainer gets the training rows and nothing else; what validates, it takes from them. Scores are those of the test
rows, in points: accuracy, micro-F1 of the labels given (GoEmotions) or Spearman's correlation (STS-B). Each run is a
process of its own, and its seconds count everything: start, encoding, training, prediction.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from readme import yardstick_table
from scipy.stats import spearmanr
from scores import ROOT, TASKS, Rows, Task, has_pairs, held_out, label_names, targets, write
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeCV
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier

from minibert.runs.setup import demo_weights
from minibert.training.recipe import choose_recipe

RESULTS = ROOT / "benchmarks" / "results" / "yardsticks.json"
SIZES = ("few", "2000", "all")
A_CLASS, NUMBERS = 20, 100  # rows of `few`: of each class or label, or of a regression
MOST, MOST_TEST = 8_000, 2_000  # rows, so that a run ends in minutes
USUAL = (5e-5, 3.0)  # transformers' own learning rate and epochs
MAX_LENGTH, BATCH, WIDTH = 128, 32, 384


def chosen(task: Task, size: str, seed: int) -> dict[str, Rows]:
    """The training and test rows of a cell; another seed draws other rows."""
    parts = task.parts()
    test = parts["test"] if len(parts["test"]) <= MOST_TEST else held_out(parts["test"], MOST_TEST, False)[1]
    order = np.random.default_rng(seed).permutation(len(parts["train"]))
    shuffled = [parts["train"][row] for row in order]
    if size != "few":
        return {"train": shuffled[: MOST if size == "all" else int(size)], "test": test}
    if task.kind == "regression":
        return {"train": shuffled[:NUMBERS], "test": test}
    taken, counts = [], Counter[str]()
    for row in shuffled:
        labels = row[2].split("|")
        if any(counts[label] < A_CLASS for label in labels):
            taken.append(row)
            counts.update(labels)
    return {"train": taken, "test": test}


def minibert(task: Task, parts: dict[str, Rows], folder: Path, seed: int, *flags: str) -> np.ndarray:
    """The plain command: the files, and what says how several labels are separated."""
    for part, rows in parts.items():
        header = ("sentence1", "sentence2", "label") if has_pairs(task) else ("text", "label")
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *(row if has_pairs(task) else (row[0], row[2]) for row in rows)])
    files = ["--train", f"{folder}/train.csv", "--test", f"{folder}/test.csv", "--output", f"{folder}/run"]
    several = ["--label-delimiter", "|"] * (task.kind == "multi")
    command = [sys.executable, "-m", "minibert.finetune", *files, *several, "--seed", str(seed), "--quiet", *flags]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.stderr.strip()[-2000:])
    with open(folder / "run" / "predictions-test.csv", encoding="utf-8", newline="") as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    if task.kind == "regression":
        return np.array([float(value) for value in predicted])
    names = label_names(task, parts)
    if task.kind == "single":
        return np.array([names.index(name) for name in predicted])
    return np.array([[name in given.split("|") for name in names] for given in predicted])


def transformers(task: Task, parts: dict[str, Rows], folder: Path, seed: int, rate: float, epochs: float) -> np.ndarray:
    """Trainer with dynamic padding and its own defaults otherwise; the last weights, as its scripts take them."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(demo_weights())
    kinds = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    labels = 1 if task.kind == "regression" else len(label_names(task, parts))
    hf.set_seed(seed)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        demo_weights(), num_labels=labels, problem_type=kinds[task.kind]
    )

    def examples(part: str) -> list[dict[str, Any]]:
        rows = parts[part]
        second = [row[1] for row in rows] if has_pairs(task) else None
        encoded = tokenizer([row[0] for row in rows], second, truncation=True, max_length=MAX_LENGTH)
        truth = targets(task, parts, part).tolist()
        return [{**{k: v[i] for k, v in encoded.items()}, "labels": label} for i, label in enumerate(truth)]

    settings = hf.TrainingArguments(
        output_dir=str(folder / "trainer"),
        seed=seed,
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collate = hf.DataCollatorWithPadding(tokenizer)
    trainer = hf.Trainer(model=model, args=settings, train_dataset=examples("train"), data_collator=collate)
    trainer.train()
    logits = np.asarray(trainer.predict(examples("test")).predictions)
    if task.kind == "single":
        return logits.argmax(1)
    return logits > 0 if task.kind == "multi" else logits[:, 0]


def sentence_encoder() -> Any:
    """The same weights as mean-pooled sentence embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    encoder = Transformer(demo_weights(), max_seq_length=MAX_LENGTH)
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_word_embedding_dimension(), "mean")])


def logistic_regression(task: Task, parts: dict[str, Rows], folder: Path, seed: int) -> np.ndarray:
    """On mean-pooled sentence embeddings of the same weights; of pairs both and their difference. Ridge for numbers."""
    model = sentence_encoder()

    def embedded(part: str) -> np.ndarray:
        first = model.encode([row[0] for row in parts[part]], normalize_embeddings=True)
        if not has_pairs(task):
            return first
        second = model.encode([row[1] for row in parts[part]], normalize_embeddings=True)
        return np.concatenate([first, second, np.abs(first - second)], 1)

    x, y = embedded("train"), targets(task, parts, "train")
    if task.kind == "regression":
        return RidgeCV(alphas=[0.1, 1, 10]).fit(x, y).predict(embedded("test"))
    scoring: dict[str, Any] = {"Cs": [1, 10, 100], "max_iter": 2000, "cv": 3}
    classifier: Any = LogisticRegressionCV(**scoring)
    if task.kind == "multi":
        classifier = OneVsRestClassifier(classifier)
    return classifier.fit(x, y).predict(embedded("test"))


def setfit(task: Task, parts: dict[str, Rows], folder: Path, seed: int) -> np.ndarray:
    """SetFit (Tunstall et al. 2022), 20 pairs drawn for each text as in its paper; it has no pairs and no numbers."""
    import datasets
    import setfit as sf

    strategy = "one-vs-rest" if task.kind == "multi" else None
    head = LogisticRegression(max_iter=1000)
    model = sf.SetFitModel(sentence_encoder(), OneVsRestClassifier(head) if strategy else head, strategy)
    texts, labels = [row[0] for row in parts["train"]], targets(task, parts, "train").astype(int).tolist()
    settings = sf.TrainingArguments(
        output_dir=str(folder / "setfit"), num_iterations=20, num_epochs=1, batch_size=16, seed=seed, report_to="none"
    )
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    trainer = sf.Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    return np.asarray(model.predict([row[0] for row in parts["test"]], as_numpy=True))


def with_our_recipe(task: Task, parts: dict[str, Rows], folder: Path, seed: int) -> np.ndarray:
    return transformers(task, parts, folder, seed, *choose_recipe(WIDTH, len(parts["train"]), False))


TRAINERS: dict[str, Callable[[Task, dict[str, Rows], Path, int], np.ndarray]] = {
    "minibert": minibert,
    "transformers, 5e-5 x 3": lambda *given: transformers(*given, *USUAL),
    "logistic regression on embeddings": logistic_regression,
    "transformers, our rate and epochs": with_our_recipe,
    "SetFit": setfit,
    "minibert --search 20": lambda *given: minibert(*given, "--search", "20"),
}


def score(task: Task, parts: dict[str, Rows], found: np.ndarray) -> float:
    truth = targets(task, parts, "test")
    if task.kind == "regression":
        constant = float(np.ptp(found)) == 0  # which orders nothing
        return 0.0 if constant else 100 * float(spearmanr(truth, found).statistic)
    if task.kind == "multi":
        return 100 * float(f1_score(truth, found, average="micro", zero_division=0))
    return 100 * float(accuracy_score(truth, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS)[:4], choices=list(TRAINERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what the results hold, and run nothing")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_here(*arguments.one)))
        return
    runs: list[dict[str, Any]] = json.loads(arguments.results.read_text())["runs"] if arguments.results.exists() else []
    if not arguments.table:
        run_missing(arguments, runs)
    print(yardstick_table(runs, {}, {}))


def run_missing(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """All cells that have no run yet, the quick ones and the first seed before the others."""
    from steps import environment

    started = time.monotonic()
    cells = [
        {"task": task, "size": size, "seed": seed, "trainer": trainer}
        for size in arguments.sizes
        for seed in arguments.seeds
        for task in arguments.tasks
        for trainer in arguments.trainers
    ]
    for cell in cells:
        if any(cell.items() <= run.items() for run in runs) or not can_train(cell):
            continue
        if time.monotonic() - started > 60 * arguments.minutes:
            print("time is up", file=sys.stderr)
            return
        runs.append({**cell, **in_own_process(cell), **environment()})
        print(json.dumps(runs[-1]), flush=True)
        write(arguments.results, {"runs": runs})


def can_train(cell: dict[str, Any]) -> bool:
    """SetFit is for few rows, and has neither pairs nor numbers."""
    task = TASKS[cell["task"]]
    return cell["trainer"] != "SetFit" or (cell["size"] == "few" and task.kind != "regression" and not has_pairs(task))


def in_own_process(cell: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = [str(cell[name]) for name in ("task", "size", "seed", "trainer")]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--one", *words, folder], capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{cell}: {done.stderr.strip()[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(seconds, 1)}


def run_here(task: str, size: str, seed: str, trainer: str, folder: str) -> dict[str, Any]:
    parts = chosen(TASKS[task], size, int(seed))
    found = TRAINERS[trainer](TASKS[task], parts, Path(folder), int(seed))
    return {"score": round(score(TASKS[task], parts, found), 2), "train_rows": len(parts["train"])}


if __name__ == "__main__":
    main()
