"""Memory and time of training, evaluating and predicting by the number of rows: peak resident memory of each command.

`python benchmarks/load.py [--rows 100000 300000 1000000]`. A CSV of made questions (as in tokens.py) is trained on for
one epoch with a tiny BERT of random weights and MiniLM's vocabulary, so that rows and not the model are what memory
goes to; the result is evaluated on the same file, predicts it from --file, and predicts its texts from standard input
to standard output. Each command is a process of its own. What a further row costs is the slope between the smallest
and the largest file. Last line: JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from steps import environment
from tokens import write_questions

from minibert.batching.tokenizer import Tokenizer
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import save_model
from minibert.model.config import BertConfig
from minibert.runs.setup import demo_weights

TRAIN = "--epochs 1 --batch-size 128 --max-length 64 --device cpu --quiet".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--output", help="write the result to this JSON file")
    arguments = parser.parse_args()
    counts = sorted(arguments.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny(folder / "tiny")
        measured = {rows: load(folder, rows) for rows in counts}
    result = {
        "commands": {
            command: {f"{rows} rows": measured[rows][command] for rows in counts}
            | {"bytes_a_row": bytes_a_row([(rows, measured[rows][command]["peak_megabytes"]) for rows in counts])}
            for command in measured[counts[0]]
        },
        **environment(),
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def save_tiny(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig.from_dict({"vocab_size": 30522, **sizes}), 2)
    save_model(folder, model, ["0", "1"])
    Tokenizer.from_folder(Path(demo_weights())).save(folder, 512)


def load(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    """Every command on one file of so many rows."""
    data, texts, run = folder / f"{rows}.csv", folder / f"{rows}.txt", folder / f"run-{rows}"
    write_questions(data, rows)
    with open(data, encoding="utf-8", newline="") as file, open(texts, "w", encoding="utf-8") as lines:
        lines.writelines(f"{row['question_text']}\n" for row in csv.DictReader(file))
    commands = {
        "finetune": ["finetune", "--train", data, "--model", folder / "tiny", "--output", run, *TRAIN],
        "evaluate": ["evaluate", run, "--file", data, "--device", "cpu"],
        "predict --file": ["predict", run, "--file", data, "--output", folder / "predictions.csv", "--device", "cpu"],
        "predict < texts": ["predict", run, "--device", "cpu"],
    }
    found = {}
    for name, (module, *flags) in commands.items():
        with open(texts, "rb") as source, open(folder / "out", "wb") as sink:
            found[name] = measure([f"minibert.{module}", *map(str, flags)], source, sink)
        print(f"{rows:>9} rows  {name:<16} {found[name]}", file=sys.stderr, flush=True)
        if name == "predict < texts":
            answered = (folder / "out").read_bytes().count(b"\n") - 1
            assert answered == rows, f"{answered} rows of output for {rows} of input"
    data.unlink()
    texts.unlink()
    return found


def measure(module: list[str], source, sink) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Run `python -m ...` to its end; the highest resident memory that the system has seen of it, and seconds.

    Read from /proc: what wait() reports has this process's own memory in it, from before the child became Python.
    """
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", *module], stdin=source, stdout=sink)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.01)
    assert process.returncode == 0, module
    return {"peak_megabytes": round(peak / 1024, 1), "seconds": round(time.perf_counter() - started, 1)}


def bytes_a_row(points: list[tuple[int, float]]) -> int | None:
    (few, low), (many, high) = points[0], points[-1]
    return round((high - low) * 2**20 / (many - few)) if many > few else None


if __name__ == "__main__":
    main()
