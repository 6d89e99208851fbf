"""Where a training step's time goes on a CPU, by torch's profiler: `python benchmarks/breakdown.py`.

MiniLM on SMS spam, batches of 32 of middling length. Writes results/breakdown-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from steps import environment, matmul_rate, useful_flop
from torch.profiler import ProfilerActivity, profile
from trainers import minibert_training, sms_spam

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "_DropoutAttention", "aten::_softmax_backward_data"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "LayerNorm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "AdamW and gradient norm": ("aten::_fused_adamw_", "aten::linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::index_select", "aten::index_copy_"),
    "zeros of the embedding gradient": ("aten::fill_",),
    "dropout and residuals": ("aten::ge", "aten::mul", "aten::mul_", "aten::addcmul", "aten::add_", "aten::add"),
}
STEPS = 10


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    training = minibert_training(sms_spam())
    steps = sorted(training.steps_of_epoch(0), key=lambda step: step.tokens)
    middle = steps[(len(steps) - STEPS) // 2 :][:STEPS]
    for step in middle:
        training.step(step)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in middle:
            training.step(step)
    milliseconds = {e.key: e.self_cpu_time_total / 1000 / STEPS for e in profiler.key_averages()}
    total = sum(milliseconds.values())
    parts = {kind: sum(milliseconds.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    parts["everything else"] = total - sum(parts.values())
    for kind, value in parts.items():
        print(f"{kind:<34} {value:7.1f} ms {value / total:6.1%}")
    lengths = training.data["train"].lengths
    flop = sum(useful_flop(lengths[rows]) for step in middle for rows in step.batches) / STEPS
    result = {
        "milliseconds": {kind: round(value, 2) for kind, value in parts.items()},
        "tokens_a_step": sum(step.tokens for step in middle) / STEPS,
        "gflops_of_the_matrix_products": round(flop / parts["matrix products"] / 1e6, 1),
        "gflops_of_a_large_product": round(matmul_rate() / 1e9, 1),
        **environment(),
    }
    (Path(__file__).parent / "results" / "breakdown-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
