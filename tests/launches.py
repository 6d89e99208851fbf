"""What a training step launches on a GPU, recorded where there is none, and compiled ahead of time.

    python tests/launches.py            # counts, then registers, bytes of stack and of shared memory of each kernel

The step runs on torch's `meta` device, which has shapes and no numbers, with Triton's launcher replaced by a list. So
grids, block sizes and argument types are those of a GPU, and so is the choice between kernels.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minibert.batching.dataset import collate
from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.model.bert import BertForSequenceClassification
from minibert.model.config import BertConfig
from minibert.problem.problem import MULTI, SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training.graph_step import FixedSteps
from minibert_kernels import backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))  # where this runs as a program
from compile_kernels import Usage, compile_source

MODELS = {  # layers, hidden size, heads, intermediate size
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
    "minilm": (6, 384, 12, 1536),
}
SHAPES = [("base", 32, 25), ("base", 32, 128), ("large", 32, 25), ("minilm", 32, 25)]  # texts x tokens
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, with all that decides what is compiled for it."""

    kernel: Any
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]  # (argument, type); `constexpr` where its value is compiled in
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # warps and stages

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def compiled(self, arch: int) -> Usage:
        positions = {name: i for i, (name, _) in enumerate(self.signature)}
        constants = {(positions[name],): value for name, value in self.constants}
        attributes = {(positions[name],): [["tt.divisibility", 16]] for name in self.aligned}
        return compile_source(
            self.name, self.kernel, dict(self.signature), constants, attributes, dict(self.options), arch
        )


def launch_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As Triton specialises a call: None and annotated arguments compiled in, integers and pointers by alignment."""
    options = tuple((name, kwargs.pop(name)) for name in ("num_warps", "num_stages") if name in kwargs)
    parameters = inspect.signature(kernel.fn).parameters
    given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    unspecialised = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get(
        "do_not_specialize", []
    )
    signature, constants, aligned = [], [], []
    for name, value in given.items():
        kind = "constexpr" if "constexpr" in str(parameters[name].annotation) else type_of(value)
        if kind == "i32" and value == 1 and name not in unspecialised:
            kind = "constexpr"
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        elif name not in unspecialised and multiple_of_16(value):
            aligned.append(name)
    return Launch(kernel, tuple(grid), tuple(signature), tuple(constants), tuple(aligned), options)


def type_of(value: Any) -> str:
    """Of a kernel's argument, in Triton's words."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if value is None:
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def multiple_of_16(value: Any) -> bool:
    """Whether an argument is a multiple of 16; torch's allocations are, so of a tensor its place in one decides."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


class TorchLaunches(TorchDispatchMode):
    """Names of torch's operations that compute on the device: no views, allocations or copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns, name = func._schema.returns, func.overloadpacket.__name__
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        on_device = bool(tensors) and all(tensor.is_meta for tensor in tensors)
        if on_device and not view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.names.append(name)
        return result


@dataclass
class Recording:
    kernels: list[Launch]
    torch_ops: list[str]

    @property
    def total(self) -> int:
        return len(self.kernels) + len(self.torch_ops)

    def names(self) -> list[str]:
        return [launch.name for launch in self.kernels] + self.torch_ops


@contextmanager
def recording() -> Iterator[Recording]:
    """Collect launches instead of doing them; outputs keep what they were allocated with."""
    kernel_type = type(backend.add_partials_kernel)
    record, ops = Recording([], []), TorchLaunches()

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        record.kernels.append(launch_of(self, grid, args, kwargs))

    with mock.patch.object(kernel_type, "run", run), ops:
        yield record
    record.torch_ops = ops.names


def made_steps(model: str, kind: str = SINGLE, labels: int = 2, **changes: Any) -> FixedSteps:
    """Training of a model without weights, on the meta device, with all kernels."""
    layers, hidden, heads, intermediate = MODELS[model]
    config = BertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )
    with torch.device("meta"):
        network = BertForSequenceClassification(config, labels, changes.pop("mlp_size", 0))
    hardware = Hardware(torch.device("meta"), changes.pop("precision", "bf16"), "triton", "fixed", kernels=True)
    weights = changes.pop("class_weights", None)
    problem = Problem(kind, [str(i) for i in range(labels)])
    return FixedSteps(network, problem, RunConfig(**changes), hardware, 100, weights)


def batch_of(texts: int, tokens: int, kind: str = SINGLE, labels: int = 2) -> tuple[Any, torch.Tensor]:
    """(input, targets) of equal lengths on the host."""
    offsets = np.arange(texts + 1) * tokens
    made = Tokens(np.full(offsets[-1], 7, dtype=np.int32), offsets, None, np.zeros(texts, dtype=np.int32))
    shape = (texts, labels) if kind == MULTI else (texts,)
    return collate(made, np.arange(texts)), torch.zeros(shape, dtype=torch.int64 if kind == SINGLE else torch.float32)


def step_of(model: str, texts: int, tokens: int, micro_batches: int = 1, **changes: Any) -> Recording:
    """The launches of a training step, after one that has made the places of its batches."""
    steps = made_steps(model, **changes)
    shape = {name: changes[name] for name in ("kind", "labels") if name in changes}
    batches = [batch_of(texts, tokens, **shape)] * micro_batches
    for step in range(2):
        with recording() as record:
            steps.step(batches, step, texts)
    return record


def distinct(shapes: list[tuple[str, int, int]]) -> list[Launch]:
    """The launches of the shapes' steps, one of each that are compiled alike."""
    launches = [launch for shape in shapes for launch in step_of(*shape).kernels]
    return list({replace(launch, grid=()): launch for launch in launches}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="compute capability, such as 90; may be repeated")
    parser.add_argument("--shape", type=int, action="append", help="number in SHAPES; may be repeated")
    arguments = parser.parse_args()
    if backend.triton is None or backend.INTERPRET:
        parser.error("needs Triton, and TRITON_INTERPRET unset")
    shapes = [SHAPES[number] for number in arguments.shape or range(len(SHAPES))]
    for shape in shapes:
        record = step_of(*shape)
        print("#", *shape, f"{len(record.kernels)} Triton and {len(record.torch_ops)} torch launches")
    for arch in arguments.arch or SHARED_MEMORY:
        for launch in distinct(shapes):
            usage = launch.compiled(arch)
            print(launch.name, usage.arch, usage.registers, usage.stack, usage.shared, flush=True)


if __name__ == "__main__":
    main()
