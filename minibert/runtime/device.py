"""Where and how a run computes: device, precision, attention and engine, each chosen once with a reason."""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol, TypeVar

import torch

from minibert.config import HardwareSettings, RunConfig
from minibert.errors import UserError
from minibert.runtime import distributed
from minibert.runtime.processor import has_bf16, onednn_is_faster, products_by_onednn

Result = TypeVar("Result")
# Of a gradient, relative to its norm: how far an engine may be from plain torch. MiniLM: 0.015, 0.002, -, 1e-6
TOLERANCE = {"bf16": 0.05, "fp16": 0.02, "tf32": 0.02, "fp32": 1e-3}
# What `--engine auto` takes on a GPU. Graphs and their kernels have never run on one: until a committed file under
# benchmarks/results shows them right and faster there, they are asked for by name. Then this becomes "graph".
GPU_ENGINE = "eager"
SHORT = 128  # tokens of the longest text up to which `auto` takes our attention for flash: two launches against five
CUDA_ERROR_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
OUT_OF_MEMORY = (
    "CUDA out of memory",  # torch's allocator
    "CUDA error: out of memory",  # a call of the CUDA runtime
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # cuDNN 9
    "Triton Error [CUDA]: out of memory",
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "Cannot allocate memory",  # the system's ENOMEM
    "std::bad_alloc",
    "could not create a memory object",  # oneDNN
)


class _Placeable(Protocol):
    def to(self: Batch, device: torch.device, attention: str) -> Batch: ...


Batch = TypeVar("Batch", bound=_Placeable)


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    precision: str
    attention: str
    engine: str
    kernels: bool = False  # those of minibert_kernels, in the engine `graph`
    onednn: bool = False  # computes the fp32 products on a CPU, not MKL
    deterministic: bool = False  # equal bits from run to run on a GPU, too

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bf16 or fp16; LayerNorm, softmax and loss stay in fp32."""
        if self.precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
            return torch.autocast(self.device.type, dtype)
        return nullcontext()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around training steps and embeddings. On a CPU oneDNN computes the products of linear layers or nothing.

        What else torch would give it (GELU, LayerNorm, small products) it is no faster at in fp32, and it keeps
        buffers for every shape it has seen: 200 MB of MiniLM's.
        """
        plain = self.device.type == "cpu" and self.engine in ("eager", "compile") and self.precision == "fp32"
        mkldnn = torch.backends.mkldnn
        without = mkldnn.flags(enabled=False, allow_tf32=mkldnn.allow_tf32) if plain else nullcontext()
        with without, products_by_onednn(self.onednn), self._switches():
            yield

    @contextmanager
    def _switches(self) -> Iterator[None]:
        """torch's global switches as this hardware wants them, and afterwards as they were."""
        if self.device.type == "cpu" and not self.deterministic:
            yield
            return
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        before = cuda.matmul.allow_tf32, cuda.cudnn_sdp_enabled(), cudnn.benchmark
        strict, warns = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        try:
            cuda.matmul.allow_tf32 = self.precision == "tf32"
            cuda.enable_cudnn_sdp(False)  # with a mask, its gradients may be NaN since torch 2.11 (issue 196678 there)
            if self.deterministic:  # only kernels that give the same bits each time; the CPU's do anyway
                if self.device.type == "cuda":  # read at the first product there
                    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
                cudnn.benchmark = False
            yield
        finally:
            cuda.matmul.allow_tf32, cudnn.benchmark = before[0], before[2]
            cuda.enable_cudnn_sdp(before[1])
            torch.use_deterministic_algorithms(strict, warn_only=warns)

    def place(self, x: Batch) -> Batch:
        """A batch on the device, laid out for the attention kernel."""
        return x.to(self.device, self.attention)

    @property
    def evaluation_tokens(self) -> int:
        """Tokens of a batch outside training: on a CPU as many as the cache holds, on a GPU enough to fill it."""
        return 2048 if self.device.type == "cpu" else 1 << 16

    def __str__(self) -> str:
        products = " · oneDNN products" if self.onednn else ""
        return f"{self.device.type} · {self.precision} · {self.attention} attention · {self.engine} engine{products}"


def choose(config: RunConfig) -> Hardware:
    """Resolve the `auto` flags, and change nothing in this process.

    What was asked for by name and cannot run here is a UserError that says why.

    The engine `auto` is eager on a CPU and GPU_ENGINE on a GPU. Any other engine tries itself before the first step
    (see `FixedSteps.self_check`); where it fails, training is eager if it was not asked for by name.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("--device cuda: torch finds no usable GPU here; use --device cpu, or fix the driver")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    precision = _precision(config, device)
    engine = _engine(config, device)
    kernels = engine == "graph" and config.kernels and find_spec("triton") is not None
    onednn = device.type == "cpu" and precision == "fp32" and engine == "eager" and config.onednn and onednn_is_faster()
    attention = _attention(config, device, precision)
    return Hardware(device, precision, attention, engine, kernels, onednn, config.deterministic)


def _attention(config: HardwareSettings, device: torch.device, precision: str) -> str:
    able = (
        device.type == "cuda" and precision in ("bf16", "fp16") and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if config.attention == "auto":
        return "flash" if able else "sdpa"
    if config.attention == "flash" and not able:
        raise UserError(
            "--attention flash: needs a GPU of compute capability 8.0 or more (A100, H100, RTX 30 and later) "
            "and --precision bf16 or fp16; use sdpa"
        )
    if config.attention == "triton" and (device.type != "cuda" or find_spec("triton") is None):
        raise UserError("--attention triton: needs an NVIDIA GPU and Triton (pip install triton); use sdpa")
    if config.attention == "triton" and precision not in ("bf16", "fp16"):
        raise UserError(f"--attention triton: made for --precision bf16 or fp16, not {precision}; use sdpa")
    return config.attention


def _engine(config: RunConfig, device: torch.device) -> str:
    if config.engine == "auto":
        able = device.type == "cuda" and config.kernels and find_spec("triton") is not None
        return GPU_ENGINE if able and _cannot(config, device, GPU_ENGINE) is None else "eager"
    reason = _cannot(config, device, config.engine)
    if reason is not None:
        raise UserError(f"--engine {config.engine}: {reason}; use eager")
    return config.engine


def _cannot(config: RunConfig, device: torch.device, engine: str) -> str | None:
    """Why an engine cannot run here, or None."""
    if engine == "eager":
        return None
    if engine == "graph" and device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    if engine == "compile" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on the CPU; install g++"
    if engine == "compile" and device.type == "cuda" and find_spec("triton") is None:
        return "needs Triton (pip install triton)"
    if distributed.world_size() > 1:
        return "for one process, not under torchrun"
    if engine == "compile":
        return None
    if config.freeze not in ("none", "embeddings", "0") and config.cache_frozen:
        return "frozen layers are computed once, outside a step"
    if config.truncation == "window":
        return "windows are pooled in steps of changing shape"
    return None


def fit_attention(
    hardware: Hardware, config: HardwareSettings, head_size: int, max_length: int, longest: int
) -> Hardware:
    """The same hardware for one model and its texts; UserError where a kernel asked for by name does not fit."""
    triton_fits = head_size in (32, 64) and max_length <= 512
    if hardware.attention == "triton" and not triton_fits:
        raise UserError(
            f"--attention triton: made for heads of 32 or 64 and texts up to 512 tokens, not {head_size} and "
            f"{max_length}; use flash or sdpa"
        )
    in_half = hardware.precision in ("bf16", "fp16")  # in fp32 our kernel does without tensor cores
    if config.attention == "auto" and hardware.kernels and in_half and triton_fits and longest <= SHORT:
        return replace(hardware, attention="triton")
    if hardware.attention == "flash" and (head_size % 8 or head_size > 256):
        if config.attention == "flash":
            raise UserError(f"--attention flash: heads must be a multiple of 8 up to 256, not {head_size}; use sdpa")
        return replace(hardware, attention="sdpa")
    return hardware


def eager(hardware: Hardware, config: HardwareSettings) -> Hardware:
    """What is left where an engine of fixed shapes does not work: torch's own operations alone."""
    attention = "sdpa" if config.attention == "auto" else hardware.attention
    return replace(hardware, engine="eager", kernels=False, attention=attention)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU.

    By its type or code, else by its words, for most libraries throw a plain RuntimeError. A Triton kernel that needs
    more shared memory than a GPU has (OutOfResources) is another matter: smaller batches do not help.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if getattr(error, "error_code", None) == CUDA_ERROR_MEMORY_ALLOCATION:  # of torch.AcceleratorError
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU's memory, or by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def duration(seconds: float) -> str:
    """Rounded to what a person plans with."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def none_if_oom(compute: Callable[[], Result]) -> Result | None:
    """What `compute` gives, or None where memory runs out; what it left behind is given back."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    gc.collect()  # only now: the exception held on to every tensor of the computation
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _precision(config: HardwareSettings, device: torch.device) -> str:
    if device.type == "cpu":
        if config.precision == "bf16" and not has_bf16():
            raise UserError("--precision bf16: this processor has no bf16 arithmetic; leave the flag out")
        if config.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"--precision {config.precision}: a CPU computes in fp32 or bf16; leave the flag out")
        return "bf16" if config.precision == "bf16" else "fp32"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return precision
