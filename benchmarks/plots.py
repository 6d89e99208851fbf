"""How time grows with text length, batch size, model size and number of texts: `python benchmarks/plots.py`.

Writes results/growth-cpu.json and results/growth-cpu.png. Weights and token ids are random (they do not change the
time); lengths are those of SMS spam, scaled to the mean that a point asks for. All trainers pass over the same texts,
in turns, once to warm up and once for the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from steps import environment
from trainers import sms_spam, transformers_optimizer

from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens, offsets_of
from minibert.config import RunConfig
from minibert.model.bert import BertForSequenceClassification
from minibert.model.config import BertConfig
from minibert.problem.problem import SINGLE, Problem
from minibert.runs.setup import demo_weights
from minibert.runtime.device import choose
from minibert.training.loop import Training

RESULTS = Path(__file__).parent / "results"
MINILM = (6, 384)  # layers, hidden size
POINTS: dict[str, list[tuple[str, dict[str, int]]]] = {
    "mean tokens a text (batch 16)": [(str(m), {"mean": m, "batch": 16, "texts": 16}) for m in (8, 24, 64, 96)],
    "texts a batch": [(str(b), {"batch": b, "texts": 2 * b}) for b in (4, 8, 16, 32, 64)],
    "layers x hidden size (batch 16)": [
        (f"{layers}x{hidden}", {"layers": layers, "hidden": hidden, "batch": 16, "texts": 16})
        for layers, hidden in ((3, 384), (6, 384), (12, 384), (12, 768))
    ],
    "number of texts (batch 32)": [(str(n), {"batch": 32, "texts": n}) for n in (32, 64, 128, 256)],
}
Pass = Callable[[], Iterator[None]]  # one pass over the texts, a step at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    lengths = Tokenizer.from_folder(Path(demo_weights())).encode(sms_spam().texts, None, 512).lengths
    curves = {}
    for axis, points in POINTS.items():
        curves[axis] = {label: seconds(lengths, **point) for label, point in points}
        print(axis, curves[axis], flush=True)
    RESULTS.mkdir(exist_ok=True)
    result = {"seconds_a_pass": curves, **environment()}
    (RESULTS / "growth-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(curves, RESULTS / "growth-cpu.png")


def seconds(
    lengths: np.ndarray, mean: int = 25, batch: int = 32, texts: int = 64, layers: int = 6, hidden: int = 384
) -> dict[str, float]:
    """Seconds of one pass over `texts` texts, for each trainer."""
    rng = np.random.default_rng(0)
    drawn = np.clip(np.round(rng.choice(lengths, texts) * mean / lengths.mean()), 4, 512).astype(np.int64)
    offsets = offsets_of(drawn)
    ids = rng.integers(1000, 30_000, offsets[-1]).astype(np.int32)
    tokens = Tokens(ids, offsets, None, np.zeros(texts, np.int32))
    labels = rng.integers(0, 2, texts)
    passes: dict[str, Pass] = {
        "transformers, dynamic padding": transformers_pass(tokens, labels, batch, layers, hidden, grouped=False),
        "transformers, best": transformers_pass(tokens, labels, batch, layers, hidden, grouped=True),
        "minibert": minibert_pass(tokens, labels, batch, layers, hidden),
    }
    for one in passes.values():
        for _ in one():
            pass
    total = dict.fromkeys(passes, 0.0)
    running = {name: one() for name, one in passes.items()}
    for _ in range(-(-texts // batch)):
        for name, steps in running.items():
            started = time.perf_counter()
            next(steps)
            total[name] += time.perf_counter() - started
    return {name: round(value, 4) for name, value in total.items()}


def minibert_pass(tokens: Tokens, labels: np.ndarray, batch: int, layers: int, hidden: int) -> Pass:
    config = BertConfig(
        vocab_size=30_522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if hidden < 768 else 12,
        intermediate_size=4 * hidden,
    )
    run = RunConfig(device="cpu", batch_size=batch, quiet=True)
    model = BertForSequenceClassification(config, 2)
    training = Training(model, Problem(SINGLE, ["0", "1"]), {"train": Dataset(tokens, labels)}, run, choose(run))

    def steps() -> Iterator[None]:
        for step in training.steps_of_epoch(0):
            training.step(step)
            yield

    return steps


def transformers_pass(tokens: Tokens, labels: np.ndarray, batch: int, layers: int, hidden: int, grouped: bool) -> Pass:
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if hidden < 768 else 12,
        intermediate_size=4 * hidden,
        num_labels=2,
        attn_implementation="sdpa",
    )
    model = transformers.BertForSequenceClassification(config).train()
    optimizer = transformers_optimizer(model, fused=grouped)
    order = np.random.default_rng(0).permutation(len(labels))
    if grouped:
        order = order[np.argsort(tokens.lengths[order], kind="stable")]

    def steps() -> Iterator[None]:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            texts = [
                torch.from_numpy(tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].astype(np.int64)) for i in rows
            ]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            model(ids, attention_mask=(ids > 0).long(), labels=torch.from_numpy(labels[rows])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    return steps


def draw(curves: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for trainer in next(iter(points.values())):
            axis.plot(list(points), [point[trainer] for point in points.values()], marker="o", label=trainer)
        axis.set(xlabel=name, ylabel="seconds a pass", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
