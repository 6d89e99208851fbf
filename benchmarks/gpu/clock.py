"""Clocks: windows of training steps on the wall, and single calls on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

WARM_UP = 3  # windows, in which shapes are captured and kernels compile


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Windows:
    """Times of training at the ends of windows of steps, each of which has waited for the device.

    The first `WARM_UP` windows are left out. It is enough after `seconds` and `fewest` further windows.
    """

    def __init__(self, smoke: bool, seconds: float = 4.0, fewest: int = 8) -> None:
        self.seconds, self.fewest = (0.0, 2) if smoke else (seconds, fewest)
        self.started = time.perf_counter()
        self.ends: list[tuple[float, int, int]] = []  # seconds since the start, steps, tokens
        self.loss: float | None = None

    def end(self, steps: int, tokens: int, loss: float | None) -> bool:
        """Note the end of a window, by what was trained so far; returns whether it was the last one needed."""
        self.ends.append((time.perf_counter() - self.started, steps, tokens))
        self.loss = loss
        measured = len(self.ends) - WARM_UP
        return measured >= self.fewest and self.ends[-1][0] - self.ends[WARM_UP - 1][0] >= self.seconds

    def figures(self) -> dict[str, Any]:
        seconds, steps, tokens = np.diff(np.array(self.ends[WARM_UP - 1 :]), axis=0).T
        per_step = seconds / steps
        step = float(np.median(per_step))
        return {
            "ms_per_step": round(1000 * step, 4),
            "steps_per_second": round(1 / step, 2),
            "spread": round(float(np.subtract(*np.percentile(per_step, [90, 10]))) / step, 4),
            "tokens_per_second": round(float(tokens.sum() / seconds.sum())),
            "tokens_per_step": round(float(tokens.sum() / steps.sum()), 1),
            "windows": len(seconds),
            "steps_per_window": round(float(steps.mean()), 1),
            "warm_up_seconds": round(self.ends[WARM_UP - 1][0], 2),
            "loss": self.loss if self.loss is None else round(self.loss, 4),
        }


def peak_gigabytes() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {"peak_gigabytes": round(torch.cuda.max_memory_reserved() / 1e9, 2)}


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of `call` on the device, by CUDA events; by the clock on a CPU."""
    for _ in range(3):
        call()
    return float(np.median([_device_time(call) if torch.cuda.is_available() else _time(call) for _ in range(repeats)]))


def _device_time(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - before)


def as_graph(call: Callable[[], None]) -> Callable[[], None]:
    """Its kernels without the host's time to launch them: a CUDA graph's replay."""
    if not torch.cuda.is_available():
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        call()  # compiles, and lets the libraries take their workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay
