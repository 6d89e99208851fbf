"""Compile every kernel ahead of time, without a GPU, and print what it takes of a multiprocessor.

    python benchmarks/compile_kernels.py            # sm_80 and sm_90, all configurations
    python benchmarks/compile_kernels.py --arch 90 --only attention

Registers that do not fit go to the stack in slow memory ("spills"); the stack column should be 0. Triton's wheel brings
ptxas and cuobjdump along.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minibert_kernels import (
    adamw,
    attention,
    backend,
    embedding,
    first_token,
    gelu,
    gradients,
    head,
    layer_norm,
    linear,
)
from minibert_kernels.philox import drop_threshold

ARCHITECTURES = (80, 90)
TYPES = {  # of kernel arguments by name; every other pointer is to the data type
    **dict.fromkeys(["mean_ptr", "rstd_ptr", "partials_ptr", "lse_ptr", "softmax_ptr", "delta_ptr", "lr_ptr"], "*fp32"),
    **dict.fromkeys(["param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "group_table_ptr", "control_ptr"], "*fp32"),
    **dict.fromkeys(
        ["loss_scale_ptr", "weight_partials_ptr", "bias_partials_ptr", "linear_bias_partials_ptr"], "*fp32"
    ),
    **dict.fromkeys(["pooler_bias_partials_ptr", "class_weights_ptr", "keep_ptr", "denominator_ptr"], "*fp32"),
    **dict.fromkeys(["logits_ptr", "losses_ptr", "grad_logits_ptr", "grad_loss_ptr"], "*fp32"),
    **dict.fromkeys(["targets_ptr", "table_ptr"], "*i64"),
    **dict.fromkeys(["rng_ptr", "step_ptr", "input_ids_ptr", "position_ids_ptr", "token_type_ids_ptr"], "*i64"),
    **dict.fromkeys(["ids_ptr", "order_ptr", "ends_ptr"], "*i64"),
    **dict.fromkeys(["cu_seqlens_ptr", "block_groups_ptr"], "*i32"),
    **dict.fromkeys(["site", "num_rows", "num_tokens", "num_partials", "total", "stride", "first_block"], "i32"),
    "scale": "fp32",
}


@dataclass
class Configuration:
    """One compilation of a kernel."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    types: dict[str, str] = field(default_factory=dict)  # where they differ from TYPES


@dataclass
class Usage:
    name: str
    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread, spills included
    shared: int  # bytes a program


def configurations() -> list[Configuration]:
    """What training BERT base and large and MiniLM in bf16 with dropout 0.1 launches, and attention of each kind."""
    dropped = drop_threshold(0.1)
    adam = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "BLOCK_SIZE": adamw.BLOCK, "ZERO_GRAD": True}
    logs = {"log2_beta1": math.log2(0.9), "log2_beta2": math.log2(0.999), "MAX_NORM": 1.0, "loss_scale_ptr": None}
    found = [
        Configuration("adamw", adamw.adamw_kernel, adam),
        Configuration("adamw fp32 grad", adamw.adamw_kernel, adam, types={"grad_ptr": "*fp32"}),
        Configuration("adamw norm", adamw.sum_of_squares_kernel, {"BLOCK_SIZE": adamw.NORM_BLOCK}, 8),
        Configuration("adamw control", adamw.control_kernel, {**logs, "BLOCK_SIZE": adamw.MOST_PARTIALS}),
    ]
    sums, none = dict(zip(("ROWS", "COLS"), backend.PARTIALS, strict=True)), {"second_ptr": None, "third_ptr": None}
    found += [
        Configuration("add_partials 3", backend.add_partials_kernel, {"SIZE": 768, **sums}, 8),
        Configuration("add_partials 1", backend.add_partials_kernel, {"SIZE": 3072, **none, **sums}, 8),
        Configuration("add_partials all", gradients.add_all_partials_kernel, sums, 8),
        Configuration("column sums 2304", linear.column_sums_kernel, {"SIZE": 2304, **blocks(linear.TILE)}),
    ]
    tile: dict[str, Any]
    for size in (384, 768, 1024):
        columns = backend.next_power_of_2(size)
        rows = max(1, layer_norm.TILE // columns)
        segments = {"SIZE": size, **blocks(embedding.SEGMENTS)}
        tile = {"SIZE": size, "DROPPED": dropped, **blocks((rows, columns))}
        eps = {"EPS": 1e-12}
        found += [
            Configuration(f"layer_norm forward {size}", layer_norm.forward_kernel, {**tile, **eps}),
            Configuration(f"layer_norm backward {size}", layer_norm.backward_kernel, tile),
            Configuration(f"embedding forward {size}", embedding.forward_kernel, {**tile, **eps}),
            Configuration(f"embedding backward {size}", embedding.backward_kernel, tile),
            Configuration(f"embedding scatter {size}", embedding.scatter_kernel, segments),
        ]
    for size in (1536, 3072, 4096):
        tile = {"SIZE": size, **blocks(gelu.TILE)}
        found += [
            Configuration(f"gelu forward {size}", gelu.forward_kernel, tile),
            Configuration(f"gelu backward {size}", gelu.backward_kernel, tile),
        ]
    for labels in (2, head.MOST_LABELS):
        block = dict(zip(("BLOCK_LABELS", "BLOCK_COLS"), head.column_block(768, labels), strict=True))
        tile = {"SIZE": 768, "LABELS": labels, "DROPPED": dropped, **block}
        loss = {"KIND": 0, "SMOOTHING": 0.1, "UNIT": 1.0}
        found += [
            Configuration(f"head forward {labels}", head.forward_kernel, {**tile, **loss}, head.WARPS),
            Configuration(f"head backward {labels}", head.backward_kernel, {**tile, "more_ptr": None}, head.WARPS),
        ]
    for head_size in (32, 64):
        heads: dict[str, Any] = {"HEADS": 12, "HEAD_SIZE": head_size, "DROPPED": dropped, "UPCAST": False}
        for longest in (32, 64, 128):
            name = f"{longest} x {head_size}"
            rows, columns, warps = attention.short_blocks(longest)
            tile = {"BLOCK_Q": rows, "BLOCK_K": columns, "lse_ptr": None, **heads}
            kernel = attention.forward_kernel
            found.append(Configuration(f"attention forward {name}", kernel, tile, warps, attention.STAGES))
            rows, columns, warps = attention.short_backward_blocks(longest, head_size)
            tile, kernel = {"BLOCK_Q": rows, "BLOCK": columns, **heads}, attention.short_backward_kernel
            found.append(Configuration(f"attention backward {name}", kernel, tile, warps, attention.STAGES))
        tile = {"BLOCK_K": first_token.BLOCK, **{k: v for k, v in heads.items() if k != "UPCAST"}}
        found += [
            Configuration(
                f"attention first token forward {head_size}", first_token.forward_kernel, tile, first_token.WARPS
            ),
            Configuration(
                f"attention first token backward {head_size}", first_token.backward_kernel, tile, first_token.WARPS
            ),
        ]
        rows, columns, warps = attention.LONG_BLOCKS
        tile = {"BLOCK_Q": rows, "BLOCK_K": columns, **heads}
        found += [
            Configuration(f"attention long forward {head_size}", attention.forward_kernel, tile, warps),
            Configuration(f"attention long dq {head_size}", attention.query_backward_kernel, tile, warps),
            Configuration(
                f"attention long dk dv {head_size}", attention.key_backward_kernel, tile, warps, attention.STAGES
            ),
        ]
    return found


def blocks(tile: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("BLOCK_ROWS", "BLOCK_COLS"), tile, strict=True))


def compile_kernel(configuration: Configuration, arch: int, dtype: str = "bf16") -> Usage:
    """Compile for sm_<arch>, with the alignment that torch's tensors have."""
    names = list(inspect.signature(configuration.kernel.fn).parameters)
    constants = configuration.constants
    types = {**TYPES, **configuration.types}
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{dtype}") for n in names}
    pointers = [i for i, n in enumerate(names) if signature[n].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    values = {(names.index(n),): v for n, v in constants.items()}
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    return compile_source(configuration.name, configuration.kernel, signature, values, attributes, options, arch)


def compile_source(
    name: str,
    kernel: Any,
    signature: dict[str, str],  # type of each argument, `constexpr` for what `constants` holds
    constants: dict[tuple[int], Any],  # by the argument's position
    attributes: dict[tuple[int], list[list[Any]]],  # likewise
    options: dict[str, int],
    arch: int,
) -> Usage:
    """Compile one specialisation of a kernel for sm_<arch>."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Usage(name, arch, registers, stack, compiled.metadata.shared)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(part.split(":", 1) for part in text.split() if part.startswith(("REG:", "STACK:")))
    return int(fields["REG"]), int(fields["STACK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, such as 90; may be repeated")
    parser.add_argument("--only", default="", help="configurations whose name this pattern is found in")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    arguments = parser.parse_args()
    if backend.triton is None or backend.INTERPRET:
        sys.exit("compile: needs Triton, and TRITON_INTERPRET unset")
    print(f"{'kernel':34} {'arch':>5} {'registers':>9} {'stack':>6} {'shared':>7}")
    for arch in arguments.arch or ARCHITECTURES:
        for configuration in configurations():
            if re.search(arguments.only, configuration.name):
                usage = compile_kernel(configuration, arch, arguments.dtype)
                columns = f"{usage.registers:9} {usage.stack:6} {usage.shared:7}"
                print(f"{usage.name:34} sm_{usage.arch} {columns}", flush=True)


if __name__ == "__main__":
    main()
