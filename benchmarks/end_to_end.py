"""Whole trainings on SMS spam, each in a process of its own: wall time, peak memory, accuracy and spam F1 over seeds.

`python benchmarks/end_to_end.py --trainers frozen-tutorial frozen-minibert --seeds 1 2 3 --output FILE.json`

The split is the tutorial's: 70% to train, 15% to validate, 15% to test, stratified, random_state 2018. The frozen
trainers do what the tutorial does: BERT frozen, a dense ReLU head of 512, balanced class weights, 10 epochs, the best
epoch kept; the tutorial cuts texts to 25 tokens, minibert reads them whole. The others train all weights for
`--epochs`. Results are added to the file after each run, and runs that it holds are not repeated. Last line: JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight
from steps import environment
from trainers import BATCH, Texts, sms_spam, transformers_optimizer

from minibert.runs.setup import demo_weights

LEARNING_RATE = 1e-4  # of full fine-tuning, all trainers
HEAD_LEARNING_RATE = 1e-3  # of the frozen trainers: the tutorial's
MINIBERT_FLAGS = {
    "frozen-minibert": ["--freeze", "all", "--head", "mlp:512", "--class-weights", "balanced", "--epochs", "10"],
    "minibert": [],
}
TRAINERS = ("frozen-tutorial", "frozen-minibert", "padded-128", "dynamic", "best", "minibert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=1, help="of full fine-tuning")
    parser.add_argument("--output", default="end-to-end.json")
    parser.add_argument("--one", choices=TRAINERS, help="run this trainer here, with the first seed (used by itself)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.one, arguments.seeds[0], arguments.epochs)))
        return
    path = Path(arguments.output)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for seed in arguments.seeds:  # seeds outside, so that trainers take turns
        for trainer in arguments.trainers:
            if not any((run["trainer"], run["seed"]) == (trainer, seed) for run in runs):
                runs.append(in_own_process(trainer, seed, arguments.epochs) | {"commit": environment()["commit"]})
                path.write_text(json.dumps({**environment(), "summary": summary(runs), "runs": runs}, indent=2) + "\n")
    for trainer, numbers in summary(runs).items():
        print(trainer, numbers)
    print(json.dumps(summary(runs)))


def in_own_process(trainer: str, seed: int, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", trainer, "--seeds", str(seed), "--epochs", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result, flush=True)
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for trainer in dict.fromkeys(run["trainer"] for run in runs):
        of_trainer = [run for run in runs if run["trainer"] == trainer]
        result[trainer] = {"seeds": len(of_trainer)}
        for name in ("wall_seconds", "peak_megabytes", "accuracy", "spam_f1"):
            values = [run[name] for run in of_trainer]
            result[trainer][name] = {"mean": round(float(np.mean(values)), 4), "std": round(float(np.std(values)), 4)}
    return result


def run_one(trainer: str, seed: int, epochs: int) -> dict[str, Any]:
    """Wall time is from the texts in memory (or in a file) to the test predictions, imports not counted."""
    parts = split(sms_spam())
    torch.manual_seed(seed)
    if trainer in MINIBERT_FLAGS:
        seconds, predicted = run_minibert(parts, MINIBERT_FLAGS[trainer], seed, epochs)
    else:
        import transformers  # noqa: F401 - imported before the clock starts

        started = time.perf_counter()
        predicted = (
            run_frozen_tutorial(parts) if trainer == "frozen-tutorial" else run_transformers(parts, trainer, epochs)
        )
        seconds = time.perf_counter() - started
    labels = parts["test"].labels
    return {
        "trainer": trainer,
        "seed": seed,
        "wall_seconds": round(seconds, 2),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "accuracy": round(float((predicted == labels).mean()), 4),
        "spam_f1": round(float(f1_score(labels, predicted)), 4),
    }


def split(data: Texts) -> dict[str, Texts]:
    rows = np.arange(len(data.texts))
    train, rest = train_test_split(rows, random_state=2018, test_size=0.3, stratify=data.labels)
    validation, test = train_test_split(rest, random_state=2018, test_size=0.5, stratify=data.labels[rest])
    return {"train": data.take(train), "validation": data.take(validation), "test": data.take(test)}


def run_minibert(parts: dict[str, Texts], flags: list[str], seed: int, epochs: int) -> tuple[float, np.ndarray]:
    """The command itself, from CSV files to the model folder and its predictions file."""
    from minibert import finetune, run  # noqa: F401 - torch and all else imported before the clock starts

    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--seed", str(seed), "--epochs", str(epochs), "--lr", str(LEARNING_RATE), "--quiet", *flags]
        if "--freeze" in flags:
            arguments += ["--head-learning-rate", str(HEAD_LEARNING_RATE)]
        for part, texts in parts.items():
            path = Path(folder) / f"{part}.csv"
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *zip(texts.texts, texts.labels, strict=True)])
            arguments += [f"--{part}", str(path)]
        output = Path(folder) / "run"
        started = time.perf_counter()
        finetune.main([*arguments, "--batch-size", str(BATCH), "--output", str(output)])
        seconds = time.perf_counter() - started
        with open(output / "predictions-test.csv", encoding="utf-8", newline="") as file:
            return seconds, np.array([int(row["predicted"]) for row in csv.DictReader(file)])


def run_frozen_tutorial(parts: dict[str, Texts], length: int = 25, epochs: int = 10) -> np.ndarray:
    """The tutorial's loop, with MiniLM in the place of BERT-base: every epoch runs the frozen encoder again."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bert = AutoTokenizer.from_pretrained(demo_weights()), AutoModel.from_pretrained(demo_weights())
    for parameter in bert.parameters():
        parameter.requires_grad = False
    head = torch.nn.Sequential(
        torch.nn.Linear(384, 512),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(512, 2),
        torch.nn.LogSoftmax(1),
    )
    labels = parts["train"].labels
    weights = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    criterion = torch.nn.NLLLoss(weight=torch.tensor(weights, dtype=torch.float32))
    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_LEARNING_RATE)
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    encoded = {part: tokenizer(texts.texts, **options) for part, texts in parts.items()}

    def outputs(part: str, rows: torch.Tensor) -> torch.Tensor:
        inputs = {key: value[rows] for key, value in encoded[part].items() if key != "token_type_ids"}
        return head(bert(**inputs).pooler_output)

    def evaluate(part: str) -> torch.Tensor:
        bert.eval()
        head.eval()
        with torch.no_grad():
            return torch.cat([outputs(part, rows) for rows in torch.arange(len(parts[part].labels)).split(BATCH)])

    best_loss, best_state = float("inf"), head.state_dict()
    for _ in range(epochs):
        bert.train()
        head.train()
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = criterion(outputs("train", rows), torch.from_numpy(labels[rows.numpy()]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss = criterion(evaluate("validation"), torch.from_numpy(parts["validation"].labels))
        if float(loss) < best_loss:
            best_loss, best_state = float(loss), {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(best_state)
    return evaluate("test").argmax(1).numpy()


def run_transformers(parts: dict[str, Texts], kind: str, epochs: int) -> np.ndarray:
    """Full fine-tuning in a plain loop: padded to 128, to the longest of a random batch, or of one of like length.

    With batches of like length it also predicts in order of length.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    tokenizer = AutoTokenizer.from_pretrained(demo_weights())
    model = AutoModelForSequenceClassification.from_pretrained(demo_weights(), num_labels=2, attn_implementation="sdpa")
    fixed = {"padding": "max_length", "max_length": 128} if kind == "padded-128" else {"max_length": 512}
    encoded = {part: [tokenizer(t, truncation=True, **fixed) for t in texts.texts] for part, texts in parts.items()}
    optimizer = transformers_optimizer(model, fused=kind == "best", learning_rate=LEARNING_RATE)
    labels = parts["train"].labels
    total = epochs * -(-len(labels) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * total), total)
    lengths = {part: np.array([len(e["input_ids"]) for e in texts]) for part, texts in encoded.items()}
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(labels)).numpy()
        if kind == "best":
            order = order[np.argsort(lengths["train"][order], kind="stable")]
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        for i in torch.randperm(len(batches)).tolist():
            inputs = tokenizer.pad([encoded["train"][row] for row in batches[i]], return_tensors="pt")
            model(**inputs, labels=torch.from_numpy(labels[batches[i]])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for part in ("validation", "test"):
            order = np.argsort(lengths[part]) if kind == "best" else np.arange(len(lengths[part]))
            predictions = np.empty(len(order), dtype=np.int64)
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                inputs = tokenizer.pad([encoded[part][row] for row in rows], return_tensors="pt")
                predictions[rows] = model(**inputs).logits.argmax(1)
    return predictions


if __name__ == "__main__":
    main()
