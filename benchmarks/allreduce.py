"""What adding up gradients costs: measured over gloo on loopback, and worked out for faster links.

`torchrun --nproc-per-node 2 benchmarks/allreduce.py`, also with 4. Times the one all-reduce that a step makes, as
`sum_gradients` of minibert.runtime.distributed makes it (one buffer, added up, handed back as views), for parameters of
all-MiniLM-L6-v2 and of BERT base. Writes results/allreduce-N.json; last line: JSON. What is called a model there is
arithmetic: a ring sends and receives 2 (N - 1) / N of the bytes over each link, and nothing overlaps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from steps import environment
from torch import nn

from minibert.config import RunConfig
from minibert.runtime import distributed

PARAMETERS = {"MiniLM": 22_713_216, "BERT base": 109_482_240}  # without the head
GIGABITS = {"1 Gbit/s": 1, "10 Gbit/s": 10, "100 Gbit/s": 100, "400 Gbit/s": 400, "NVLink, 450 GB/s": 3600}
MACHINES = 16
ROUNDS = 7


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    load = os.getloadavg()[0]
    distributed.join(RunConfig(device="cpu"))
    seconds = {name: measure(count) for name, count in PARAMETERS.items()}
    result = {
        "processes": distributed.world_size(),
        "threads_each": torch.get_num_threads(),
        "load_before": load,  # other programs' share of the machine
        "megabytes": {name: {"fp32": count * 4 / 1e6, "bf16": count * 2 / 1e6} for name, count in PARAMETERS.items()},
        "measured_seconds": seconds,
        "model_seconds": {
            f"{name}, {kind}, {MACHINES} machines": {
                link: float(f"{ring_seconds(count * size, speed, MACHINES):.3g}") for link, speed in GIGABITS.items()
            }
            for name, count in PARAMETERS.items()
            for kind, size in (("fp32", 4), ("bf16", 2))
        },
        **environment(),
    }
    if distributed.is_main_process():
        path = Path(__file__).parent / "results" / f"allreduce-{distributed.world_size()}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result))


def measure(count: int) -> dict[str, float]:
    """Median and best seconds of adding up `count` gradients, in tensors of a layer's usual size."""
    size = 768 * 3072
    parameters = [nn.Parameter(torch.empty(min(size, count - start))) for start in range(0, count, size)]
    times = []
    for _ in range(ROUNDS):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        distributed.barrier()
        started = time.perf_counter()
        distributed.sum_gradients(parameters, torch.zeros(()))
        times.append(time.perf_counter() - started)
    assert parameters[0].grad is not None and float(parameters[0].grad[0]) == distributed.world_size()
    return {"median": round(sorted(times)[ROUNDS // 2], 4), "best": round(min(times), 4)}


def ring_seconds(size: float, gigabits: float, processes: int) -> float:
    return 2 * (processes - 1) / processes * size * 8 / (gigabits * 1e9)


if __name__ == "__main__":
    main()
