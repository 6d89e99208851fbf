"""Does a run's memory stay flat? Trains a tiny model for many steps and fails if resident memory grows above a bound.

`python memory.py` takes 2,000 steps; `--leak` keeps something of every step on purpose, to show that growth is seen.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens, offsets_of
from minibert.config import RunConfig
from minibert.model.bert import BertForSequenceClassification
from minibert.model.config import BertConfig
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime.device import choose
from minibert.training.loop import Training

BOUND = 4 << 20  # bytes that may come in the second half of the steps: the allocator's own changes


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def training(steps: int) -> Training:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64), 2)
    lengths = rng.integers(3, 40, 256)
    ids = rng.integers(5, 200, int(lengths.sum())).astype(np.int32)
    data = Dataset(Tokens(ids, offsets_of(lengths), None, np.zeros(256, np.int32)), rng.integers(0, 2, 256))
    config = RunConfig(max_steps=steps, epochs=1e6, batch_size=16, quiet=True, device="cpu", eval_steps=50)
    return Training(model, Problem(SINGLE, ["a", "b"]), {"train": data, "validation": data}, config, choose(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--leak", action="store_true")
    arguments = parser.parse_args()
    job = training(arguments.steps)
    sizes: list[int] = []
    kept: list[np.ndarray] = []
    step = job.step

    def measured(chosen):  # type: ignore[no-untyped-def]
        if arguments.leak:
            kept.append(np.ones(20_000))
        sizes.append(resident())
        return step(chosen)

    job.step = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        job.run(Path(folder) / "train_log.jsonl", lambda: None)
    grown = max(sizes[-10:]) - max(sizes[len(sizes) // 2 - 10 : len(sizes) // 2])
    print(f"{len(sizes)} steps: {sizes[-1] / 2**20:.1f} MB in the end; the second half grew by {grown / 2**20:.2f} MB")
    return int(grown > BOUND)


if __name__ == "__main__":
    sys.exit(main())
