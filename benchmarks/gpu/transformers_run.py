"""A whole run of transformers at its best, in the place of the command.

`python -m gpu.transformers_run MODEL TRAIN VALIDATION OUTPUT EPOCHS TEXTS` (the last: of each file, at most) tokenises,
trains on batches of like length, evaluates after every epoch and saves.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.batching.plans import plan_evaluation
from minibert.batching.tokens import Tokens, offsets_of

from .clock import synchronize
from .transformers_steps import avoid_cudnn_attention, batches, make_step, pad
from .workloads import LONGEST, SENTENCES_SORTED, Encoded

EVALUATION_TOKENS = 1 << 16


def main() -> None:
    import transformers

    model_folder, train, validation, output, epochs, most = sys.argv[1:]
    avoid_cudnn_attention()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader: Any = transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(model_folder, num_labels=2, attn_implementation="sdpa", dtype=torch.float32)
    model = model.to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    data = encode(tokenizer, Path(train), int(most)), encode(tokenizer, Path(validation), int(most))
    started = time.perf_counter()
    accuracy, steps = fit(model, *data, epochs=int(epochs))
    seconds = time.perf_counter() - started
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    figures = {"train_seconds": round(seconds, 2), "steps": steps, "validation": {"accuracy": accuracy}}
    (Path(output) / "metrics.json").write_text(json.dumps(figures))


def encode(tokenizer: Any, path: Path, most: int) -> Encoded:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:most]
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=LONGEST)["input_ids"]
    flat = np.concatenate([np.array(each, dtype=np.int32) for each in ids])
    tokens = Tokens(flat, offsets_of(np.array([len(each) for each in ids])), None, np.zeros(len(rows), np.int32))
    return Encoded(tokens, np.array([int(row["label"]) for row in rows]), np.unique(flat))


def fit(model: Any, train: Encoded, validation: Encoded, epochs: int) -> tuple[float, int]:
    """(accuracy of the last evaluation, steps)"""
    each = -(-len(train.tokens) // SENTENCES_SORTED.texts)
    step, accuracy = make_step(model.train(), epochs * each), 0.0
    for number, (_, batch) in enumerate(batches(train, SENTENCES_SORTED), start=1):
        step(batch)
        if number % each == 0:
            accuracy = evaluate(model, validation)
        if number == epochs * each:
            break
    synchronize()
    return accuracy, epochs * each


def evaluate(model: Any, data: Encoded) -> float:
    """Accuracy."""
    right = 0
    model.eval()
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
        for rows in plan_evaluation(data.tokens.lengths, batch_tokens=EVALUATION_TOKENS):
            batch = pad(data.tokens, data.labels, rows, multiple=8)
            labels = batch.pop("labels")
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            right += int((logits.argmax(1).cpu() == labels).sum())
    model.train()
    return right / len(data.tokens)


if __name__ == "__main__":
    main()
