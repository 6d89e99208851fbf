"""Where the time of a step goes, by kernel."""

from __future__ import annotations

from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .clock import WARM_UP, Windows
from .minibert_steps import prepare, run_in_windows
from .workloads import Setting, Workload, encode

SHOWN = 20


def kernels_of_step(setting: Setting, size: str, workload: Workload, **flags: Any) -> dict[str, Any]:
    """Times and counts of the kernels of one window of minibert's loop, the longest first; of operations on a CPU."""
    workload = workload.tiny() if setting.smoke else workload
    training = prepare(setting, size, workload, encode(setting, workload), flags)
    on_gpu = setting.device.type == "cuda"
    recorded = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])

    def record_one_window(number: int) -> None:
        if number == WARM_UP:
            recorded.start()
        elif number == WARM_UP + 1:
            recorded.stop()

    run_in_windows(setting, training, Windows(setting.smoke, seconds=0.0, fewest=2), record_one_window)
    return {"hardware": str(training.hardware)} | table(recorded, on_gpu, workload.steps)


def table(recorded: profile, on_gpu: bool, steps: int) -> dict[str, Any]:
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [  # ranges that someone named lie over the kernels and would count twice
        event
        for event in recorded.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 / steps for e in events}
    counts = {e.key: e.count / steps for e in events}
    total = sum(times.values())
    return {
        "ms_in_kernels_per_step": round(total, 4),
        "kernels_per_step": round(sum(counts.values()), 1),
        "top": [
            {
                "kernel": name[:160],
                "ms_per_step": round(times[name], 4),
                "calls_per_step": round(counts[name], 2),
                "fraction": round(times[name] / total, 4),
            }
            for name in sorted(times, key=times.__getitem__, reverse=True)[:SHOWN]
        ],
    }
