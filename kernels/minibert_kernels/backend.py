"""Whether Triton runs here, and what the kernels share.

Kernels run on CUDA tensors, and on CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is
first imported; slow, for tests). Everything else takes the plain-torch reference that lies beside each kernel. Without
Triton the modules import and the reference is all there is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default so far; Triton 3.9 warns unless told

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for this platform
    triton = tl = None

INTERPRET = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit; integers in `do_not_specialize` may change from call to call without a new compilation."""
    if triton is None:
        return lambda function: function
    return lambda function: triton.jit(function, do_not_specialize=list(do_not_specialize))


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels."""
    return triton is not None and (tensor.is_cuda or INTERPRET)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def reduction_programs(tensor: Tensor, tiles: int) -> int:
    """How many programs add up tiles on their own before their sums are added.

    Two for each multiprocessor fill the device and leave few sums. With many tiles it is up to eight: while one waits
    for memory, the others compute.
    """
    if not tensor.is_cuda:
        return min(tiles, 3)
    processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return min(tiles, max(2 * processors, min(8 * processors, tiles // 16)))


@jit(do_not_specialize=("num_partials",))
def sum_partials_kernel(
    partials_ptr,  # [num_partials, SIZE] fp32
    out_ptr,  # [SIZE]
    num_partials,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in range(0, num_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_partials)[:, None] & (cols < SIZE)[None, :]
        total += tl.load(partials_ptr + rows[:, None] * SIZE + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=cols < SIZE)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """[programs, ...] fp32 -> [...] in `dtype`, always in the same order, so equal bits from run to run."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    size = out.numel()
    rows, columns = (128, 32) if partials.is_cuda else (4, next_power_of_2(size))  # many rows at once: few waits
    sum_partials_kernel[(cdiv(size, columns),)](
        partials, out, len(partials), SIZE=size, BLOCK_ROWS=rows, BLOCK_COLS=columns, num_warps=8
    )
    return out
