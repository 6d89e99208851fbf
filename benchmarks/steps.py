"""Training steps of all trainers side by side: `python benchmarks/steps.py [--batches 16] [--output FILE.json]`.

Every trainer trains on the same messages of SMS spam, in batches of 32, with dropout, in fp32. Each lives in a process
of its own, so that none inherits another's heap or caches, and they take turns step by step, so that a slow minute of
the machine hits all of them. The time of a trainer is the sum over its batches, for batches of like length differ.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from trainers import BATCH, TRAINERS, Texts, sms_spam

from minibert.batching.tokenizer import Tokenizer
from minibert.runs.setup import demo_weights
from minibert.runtime.processor import has_bf16

WARM_UP = 4  # of so many batches one is trained on before the clock runs
SETTLE = 0.02  # seconds for the last trainer's threads to stop spinning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=16, help="of 32 messages, for each trainer")
    parser.add_argument("--output", help="write the result to this JSON file")
    parser.add_argument("--only", nargs="*", help="names of trainers (default all)")
    parser.add_argument("--threads", type=int, help="of each trainer (default torch's own number)")
    arguments = parser.parse_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the trainers' processes
        torch.set_num_threads(arguments.threads)
    names = [name for name in TRAINERS if not arguments.only or name in arguments.only]
    names = [name for name in names if "bf16" not in name or has_bf16()]
    seconds, matmul = interleave({name: start(name, arguments.batches) for name in names}, arguments.batches)
    result = report(chosen(arguments.batches).texts, seconds, matmul, arguments.batches)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def chosen(batches: int) -> Texts:
    everything = sms_spam()
    return everything.take(np.random.default_rng(0).permutation(len(everything.texts))[: BATCH * batches])


def start(name: str, batches: int) -> Connection:
    """Start a trainer's process; it has warmed up when the returned connection first says something."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(name, batches, there), daemon=True).start()
    here.recv()
    return here


def serve(name: str, batches: int, driver: Connection) -> None:
    """Make one step and report its seconds, as often as asked."""
    torch.manual_seed(0)
    steps = list(TRAINERS[name](chosen(batches)))
    for step in steps[::WARM_UP]:
        step()
    driver.send("ready")
    for step in steps:
        driver.recv()
        started = time.perf_counter()
        step()
        driver.send(time.perf_counter() - started)


def interleave(workers: dict[str, Connection], batches: int) -> tuple[dict[str, float], float]:
    """Seconds of each trainer over all its steps, and the median rate of a large product between them (FLOP/s)."""
    seconds = dict.fromkeys(workers, 0.0)
    rates = []
    for _ in range(batches):
        for name, worker in workers.items():
            time.sleep(SETTLE)
            worker.send("step")
            seconds[name] += worker.recv()
        rates.append(matmul_rate())
    return seconds, float(np.median(rates))


def matmul_rate(size: int = 2048) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def useful_flop(lengths: np.ndarray, layers: int = 6, hidden: int = 384) -> float:
    """Forward and backward products that real tokens need: all layers, the last one's [CLS] row alone."""
    per_token = 2 * 12 * hidden**2 * layers - 2 * 10 * hidden**2
    attention = 4 * hidden * (layers - 1) * (lengths**2).sum() + 4 * hidden * lengths.sum()
    return 3.0 * (lengths.sum() * per_token + len(lengths) * 2 * 10 * hidden**2 + attention)


def report(texts: list[str], seconds: dict[str, float], matmul: float, batches: int) -> dict[str, Any]:
    lengths = Tokenizer.from_folder(Path(demo_weights())).encode(texts, None, 512).lengths
    ours = seconds.get("minibert")
    flop = useful_flop(lengths)
    print(f"{'trainer':<42} ms a step   minibert is faster by")
    for name, total in seconds.items():
        print(f"{name:<42} {1000 * total / batches:>9.0f}   {total / ours if ours else float('nan'):>6.2f}x")
    share = flop / ours / matmul if ours else None
    print(f"large matmul {matmul / 1e9:.0f} GFLOP/s; minibert does {share or 0:.0%} of it in useful FLOP")
    return {
        "milliseconds_a_step": {name: round(1000 * total / batches, 1) for name, total in seconds.items()},
        "minibert_is_faster_by": {name: round(total / ours, 2) for name, total in seconds.items()} if ours else {},
        "matmul_gflops": round(matmul / 1e9, 1),
        "share_of_matmul_rate": round(share, 3) if share else None,
        "batches": batches,
        "tokens_a_step": round(float(lengths.sum()) / batches, 1),
        **environment(),
    }


def commit() -> str:
    """The commit that is measured; a copy of the files without git says it by MINIBERT_COMMIT."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return os.environ.get("MINIBERT_COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("MINIBERT_COMMIT", "unknown")


def environment() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit(),
        "machine": f"{cpu[0] if cpu else platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
