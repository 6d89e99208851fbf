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


def on_gpu(tensor: Tensor) -> bool:
    """Whether a kernel on this tensor is laid out for a GPU; `meta` stands for one whose launches are only recorded."""
    return tensor.is_cuda or tensor.is_meta


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels."""
    return triton is not None and (on_gpu(tensor) or INTERPRET)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def reduction_programs(tensor: Tensor, tiles: int) -> int:
    """How many programs add up tiles on their own before their sums are added.

    Two for each multiprocessor fill the device and leave few sums. With many tiles it is up to eight: while one waits
    for memory, the others compute.
    """
    if not on_gpu(tensor):
        return min(tiles, 3)
    processors = multiprocessors(tensor)
    return min(tiles, max(2 * processors, min(8 * processors, tiles // 16)))


def column_programs(tensor: Tensor, tiles: int, column_blocks: int) -> int:
    """Likewise where a program's tile is a part of the columns only: fewer for each, with more rows."""
    return min(tiles, cdiv(4 * reduction_programs(tensor, tiles), column_blocks))


def multiprocessors(tensor: Tensor) -> int:
    """Of the GPU that a tensor lies on; for `meta` those of an H100."""
    if tensor.is_meta:
        return 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@jit()
def add_up(partials_ptr, out_ptr, num_partials, stride, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out += sum of num_partials rows, for one block of columns of which `width` are real."""
    cols = tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < num_partials)[:, None] & (cols < width)[None, :]
        total += tl.load(partials_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    before = tl.load(out_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    total = before + tl.sum(total, axis=0)
    tl.debug_barrier()  # no thread may store what another has yet to load
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < width)


PARTIALS = (128, 32)  # rows and columns of a program on a GPU: many rows at once, few waits


@jit(do_not_specialize=("num_partials",))
def add_partials_kernel(
    partials_ptr,  # [V, num_partials, SIZE] fp32
    first_ptr,  # [SIZE], and so on for V vectors of at most three
    second_ptr,
    third_ptr,
    num_partials,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Program (i, v): column block i of vector v."""
    vector = tl.program_id(1)
    column = tl.program_id(0) * COLS
    partials_ptr += vector.to(tl.int64) * num_partials * SIZE + column
    if vector == 0:
        add_up(partials_ptr, first_ptr + column, num_partials, SIZE, SIZE - column, ROWS, COLS)
    if second_ptr is not None:  # noqa: SIM102 (known when compiled, unlike the vector)
        if vector == 1:
            add_up(partials_ptr, second_ptr + column, num_partials, SIZE, SIZE - column, ROWS, COLS)
    if third_ptr is not None:  # noqa: SIM102
        if vector == 2:
            add_up(partials_ptr, third_ptr + column, num_partials, SIZE, SIZE - column, ROWS, COLS)


def add_partials(partials: Tensor, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> None:
    """Add the sum of [V, programs, SIZE] to V vectors, always in the same order, so equal bits from run to run."""
    vectors, programs, size = partials.shape
    rows, cols = PARTIALS if on_gpu(partials) else (4, next_power_of_2(size))
    add_partials_kernel[(cdiv(size, cols), vectors)](
        *(partials, first, second, third, programs, size, rows, cols), num_warps=8
    )
