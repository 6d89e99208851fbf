"""From a CSV of 1.3 million short questions to batches: seconds and peak memory.

`python benchmarks/tokens.py [--rows 1300000]`. The questions are made: words of the TREC questions, in numbers drawn
from those questions' lengths, 17 tokens a row on average. Tokenizing is also timed beside transformers' fast tokenizer
on the same rows, in turns. Last line: JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from steps import environment
from trainers import SHARED

from minibert.batching.dataset import collate
from minibert.batching.plans import plan_epoch
from minibert.batching.tokenizer import Tokenizer
from minibert.config import RunConfig
from minibert.data.loading import load_data
from minibert.data.tables import read_table
from minibert.runs.setup import demo_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--output", help="write the result to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.csv"
        write_questions(path, arguments.rows)
        result = csv_to_batches(path)
        result |= beside_transformers(path)
    result = {"rows": arguments.rows, **result, **environment()}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def write_questions(path: Path, rows: int) -> None:
    questions = [text.split() for text in read_table(SHARED / "trec" / "train_5500.label").columns["text"]]
    words = np.array([word for question in questions for word in question])
    rng = np.random.default_rng(0)
    lengths = rng.choice([len(question) + 4 for question in questions], rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_text", "target"])
        for length in lengths:
            writer.writerow([" ".join(rng.choice(words, length)), int(rng.random() < 0.06)])


def csv_to_batches(path: Path) -> dict[str, float]:
    """Everything a run does before its first step, and the packing of every batch of an epoch."""
    started = time.perf_counter()
    data = load_data(RunConfig(train=str(path), validation_split=0.0))
    read = time.perf_counter() - started
    examples = data.splits["train"]
    tokens = Tokenizer.from_folder(Path(demo_weights())).encode(examples.texts, None, 128)
    encoded = time.perf_counter() - started - read
    for rows in plan_epoch(tokens.lengths, batch_size=32):
        collate(tokens, rows)
    total = time.perf_counter() - started
    return {
        "seconds": round(total, 1),
        "seconds_reading": round(read, 1),
        "seconds_tokenizing": round(encoded, 1),
        "seconds_packing": round(total - read - encoded, 1),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "mean_tokens": round(float(tokens.lengths.mean()), 2),
    }


def beside_transformers(path: Path, rows: int = 40_000, rounds: int = 3) -> dict[str, float]:
    from transformers import AutoTokenizer

    texts = read_table(path).columns["question_text"][:rows]
    ours, theirs = Tokenizer.from_folder(Path(demo_weights())), AutoTokenizer.from_pretrained(demo_weights())
    seconds: dict[str, list[float]] = {"minibert": [], "transformers": []}
    for _ in range(rounds):
        started = time.perf_counter()
        ours.encode(texts, None, 128)
        seconds["minibert"].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs(texts, truncation=True, max_length=128)
        seconds["transformers"].append(time.perf_counter() - started)
    return {f"{name}_texts_per_second": round(rows / float(np.median(s))) for name, s in seconds.items()}


if __name__ == "__main__":
    main()
