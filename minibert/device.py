"""Where and how a run computes: device, precision, attention and engine, each chosen once with a reason."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from minibert.config import RunConfig
from minibert.errors import UserError

Result = TypeVar("Result")
RESERVED_BLOCK, RESERVED_BLOCKS = 512 << 20, 8  # address space of the heap that is marked for huge pages


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    precision: str
    attention: str
    engine: str

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bf16 or fp16; LayerNorm, softmax and loss stay in fp32."""
        if self.precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
            return torch.autocast(self.device.type, dtype)
        return nullcontext()

    @property
    def evaluation_tokens(self) -> int:
        """Tokens of a batch outside training: on a CPU as many as the cache holds, on a GPU enough to fill it."""
        return 2048 if self.device.type == "cpu" else 1 << 16

    def __str__(self) -> str:
        return f"{self.device.type} · {self.precision} · {self.attention} attention · {self.engine} engine"


def choose(config: RunConfig) -> Hardware:
    """Resolve the `auto` flags; what was asked for by name and cannot run here is a UserError that says why."""
    cuda = torch.cuda.is_available()
    if config.deterministic:
        be_deterministic()
    if config.device == "cuda" and not cuda:
        raise UserError("--device cuda: torch finds no usable GPU here; use --device cpu, or mend the driver")
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    if config.attention not in ("auto", "sdpa"):
        raise UserError(f"--attention {config.attention}: not in this version; use sdpa")
    if config.engine not in ("auto", "eager"):
        raise UserError(f"--engine {config.engine}: not in this version; use eager")
    return Hardware(device, _precision(config, device), "sdpa", "eager")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def attempt(compute: Callable[[], Result]) -> Result | None:
    """What `compute` gives, or None where memory runs out; what it left behind is given back."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    gc.collect()  # only now: the exception held on to every tensor of the attempt
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def be_deterministic() -> None:
    """Only kernels that give the same bits each time; the CPU's do anyway, given the same number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product on the GPU
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _precision(config: RunConfig, device: torch.device) -> str:
    if device.type == "cpu":
        if config.precision not in ("auto", "fp32"):
            raise UserError(f"--precision {config.precision}: the CPU computes in fp32; leave the flag out")
        return "fp32"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return precision


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees for the next one, in huge pages, instead of giving it back.

    A step allocates the same buffers every time; without this a good part of it goes into page faults and look-ups of
    4 kB pages. Only with glibc on Linux; elsewhere this does nothing. No memory is taken before it is used.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):  # musl has none
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large allocation
    m_trim_threshold, m_mmap_threshold, madv_hugepage, page = -1, -3, 14, 4096
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Grow the heap, mark it, and give it back to the allocator: what is allocated later lies in the marked part.
    blocks = [address for address in (libc.malloc(RESERVED_BLOCK) for _ in range(RESERVED_BLOCKS)) if address]
    for address in blocks:
        libc.madvise(-(-address // page) * page, RESERVED_BLOCK - page, madv_hugepage)
    for address in blocks:
        libc.free(address)
