"""x @ weight' + bias, whose backward pass adds the gradients of weight and bias to the optimizer's own buffer.

Autograd would write the weight's gradient to a new tensor and add that to the buffer in a second launch, for every
weight and bias of the network. The product can add by itself; Megatron-LM calls this gradient accumulation fusion.
The products are cuBLAS's, on every device torch's own; a kernel adds up the bias's gradient.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels.backend import cdiv, column_programs, jit, next_power_of_2, on_gpu, tl, use_triton
from minibert_kernels.gradients import PartialSums, SharedGradient, add_product, grad_buffer

TILE = (8, 128)  # rows and columns that a program on a GPU adds up at once


@jit(do_not_specialize=("num_rows",))
def column_sums_kernel(
    x_ptr,  # [T, SIZE]
    partials_ptr,  # [programs, SIZE] fp32, its rows `stride` apart
    num_rows,
    stride,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program (i, j) takes the row blocks i, i + programs, ... of column block j."""
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
        total += tl.load(x_ptr + rows.to(tl.int64)[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partials_ptr + tl.program_id(0) * stride + cols, tl.sum(total, axis=0), mask=cols < SIZE)


def add_column_sums(grad_out: Tensor, bias: Tensor, rows: slice) -> Tensor | None:
    """Add the gradient of some of a bias's elements; returns what autograd is given of it."""
    if not use_triton(grad_out):
        buffer, grad = grad_buffer(bias)
        buffer[rows].add_(grad_out.sum(0))
        return grad
    num_rows, size = grad_out.shape
    block_rows, block_cols = TILE if on_gpu(grad_out) else (16, next_power_of_2(size))
    tiles, column_blocks = cdiv(num_rows, block_rows), cdiv(size, block_cols)
    sums = PartialSums([bias], column_programs(grad_out, tiles, column_blocks), rows)
    (partials,) = sums.parts
    column_sums_kernel[(sums.programs, column_blocks)](
        grad_out.contiguous(), partials, num_rows, partials.stride(0), size, block_rows, block_cols, num_warps=4
    )
    return sums.add()[0]


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, shared):
        ctx.save_for_backward(x)
        ctx.parameters, ctx.rows, ctx.shared = (weight, bias), rows, shared
        return F.linear(x, weight[rows], None if bias is None else bias[rows])

    @staticmethod
    def backward(ctx, grad_out):
        (x,), (weight, bias), rows = ctx.saved_tensors, ctx.parameters, ctx.rows
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ weight[rows] if ctx.shared is None else ctx.shared.with_product(grad_out, weight[rows])
        grad_weight = add_product(weight, grad_out.t(), x, rows)
        return grad_x, grad_weight, None if bias is None else add_column_sums(grad_out, bias, rows), None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: slice | None = None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """[T, I], weight [O, I] and bias [O] -> [T, O]; `rows` takes some of the outputs only.

    `shared`: where x is a residual as well, whose gradient is added to x's (see gradients.py).
    """
    return Linear.apply(x, weight, bias, slice(None) if rows is None else rows, shared)
