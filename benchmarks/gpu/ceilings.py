"""What the machine gives at best: matrix products, copies, launches."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from .clock import as_graph, milliseconds, synchronize
from .workloads import Setting, bert_config

PRODUCTS = {"qkv": (3, 1), "attention output": (1, 1), "intermediate": (4, 1), "output": (1, 4)}  # of a layer: n, k


def rates(setting: Setting) -> dict[str, float]:
    """The largest rates: of a product that fills the device, of a copy, and of launches of a kernel of no work."""
    size, elements = (128, 1 << 16) if setting.smoke else (8192, 1 << 31)
    return {
        "matmul_tflops": float(f"{product_rate(setting, size, size, size, sets=3):.4g}"),
        "copy_gigabytes_per_second": round(copy_rate(setting, elements), 1),  # read and written
        "launch_microseconds": round(launch_time(setting), 2),
    }


def layer_products(setting: Setting, size: str, tokens: int) -> dict[str, float]:
    """TFLOP/s of the four products of a layer for so many tokens, and of a layer as a whole."""
    hidden = bert_config(setting, size).hidden_size
    tokens = 16 if setting.smoke else tokens
    found = {name: product_rate(setting, tokens, k * hidden, n * hidden) for name, (n, k) in PRODUCTS.items()}
    weights = {name: n * k for name, (n, k) in PRODUCTS.items()}
    whole = sum(weights.values()) / sum(weights[name] / found[name] for name in PRODUCTS)
    return {"tflops": round(whole, 2)} | {name: round(rate, 2) for name, rate in found.items()}


@torch.no_grad()
def product_rate(setting: Setting, rows: int, inner: int, columns: int, sets: int = 16) -> float:
    """TFLOP/s of [rows, inner] x [inner, columns] in bf16, on random numbers and so many operands in turn.

    On zeros a GPU is faster, and with few operands the caches are measured.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16)

    pairs = [(random(rows, inner), random(columns, inner)) for _ in range(sets)]

    def all_products() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return 2 * rows * inner * columns * sets / milliseconds(as_graph(all_products)) / 1e9


def copy_rate(setting: Setting, elements: int) -> float:
    """GB/s, counting what is read and what is written."""
    source = torch.empty(elements, dtype=torch.bfloat16, device=setting.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def launch_time(setting: Setting, launches: int = 500) -> float:
    """Microseconds of host time for each launch of a kernel that does nearly nothing."""
    x = torch.randn(32, device=setting.device)
    for _ in range(100):
        x.add_(1)
    synchronize()
    started = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    host = time.perf_counter() - started
    synchronize()
    return 1e6 * host / launches
