"""LayerNorm(dropout(x + linear bias) + residual), forward and backward, each in one pass over the rows.

The dropout mask is drawn again in the backward pass and the sum before the norm is computed again from x and residual,
which are kept anyway; only mean and 1 / standard deviation of each row are saved. All arithmetic is fp32. Gradients of
vectors (weight, bias, linear bias) are sums over rows: some programs add up their own rows, then the partial sums are
added in order, so results have equal bits from run to run.

Shapes: T rows, H columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels.backend import cdiv, jit, next_power_of_2, on_gpu, reduction_programs, tl, use_triton
from minibert_kernels.gradients import PartialSums, SharedGradient
from minibert_kernels.philox import drop_threshold, dropout_reference, keep_mask_kernel

TILE = 1024  # elements that a program on a GPU takes at once


def row_blocks(tensor: Tensor, size: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile: whole rows, several of them where they are short."""
    columns = max(16, next_power_of_2(size))
    return (max(1, TILE // columns) if on_gpu(tensor) else 8), columns


@jit()
def _sum_kernel(
    x_ptr,
    residual_ptr,
    linear_bias_ptr,
    rng_ptr,
    site,
    rows,
    cols,
    mask,
    SIZE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """dropout(x + linear bias) + residual of a tile, in fp32, and the dropout mask (1 where there is no dropout)."""
    places = rows.to(tl.int64)[:, None] * SIZE + cols[None, :]
    total = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if linear_bias_ptr is not None:
        total += tl.load(linear_bias_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)[None, :]
    keep = mask
    if DROPPED > 0:
        keep = keep_mask_kernel(rng_ptr, site, rows, 0, BLOCK_COLS, DROPPED)
        total = tl.where(keep, total * (65536.0 / (65536 - DROPPED)), 0.0)
    total += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    return total, keep


@jit(do_not_specialize=("site", "num_rows"))
def forward_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    linear_bias_ptr,  # [H] or None
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    out_ptr,  # [T, H]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    rng_ptr,  # [2] int64, or None without dropout
    site,
    num_rows,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
    total, _ = _sum_kernel(
        x_ptr, residual_ptr, linear_bias_ptr, rng_ptr, site, rows, cols, mask, SIZE, BLOCK_COLS, DROPPED
    )
    total = tl.where(mask, total, 0.0)
    mean = tl.sum(total, axis=1) / SIZE
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / SIZE + EPS)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    places = rows.to(tl.int64)[:, None] * SIZE + cols[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@jit(do_not_specialize=("site", "num_rows"))
def backward_kernel(
    grad_out_ptr,  # [T, H]
    x_ptr,
    residual_ptr,
    linear_bias_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    grad_x_ptr,  # [T, H], or None where it equals grad_residual
    grad_residual_ptr,  # [T, H]
    weight_partials_ptr,  # [programs, H] fp32
    bias_partials_ptr,
    linear_bias_partials_ptr,  # None without linear bias
    site,
    num_rows,
    SIZE: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program i takes tiles i, i + programs, ..."""
    cols = tl.arange(0, BLOCK_COLS)
    in_row = cols < SIZE
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    grad_linear_bias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & in_row[None, :]
        places = rows.to(tl.int64)[:, None] * SIZE + cols[None, :]
        total, keep = _sum_kernel(
            x_ptr, residual_ptr, linear_bias_ptr, rng_ptr, site, rows, cols, mask, SIZE, BLOCK_COLS, DROPPED
        )
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        grad_out = tl.load(grad_out_ptr + places, mask=mask, other=0.0).to(tl.float32)
        grad_weight += grad_out * normed
        grad_bias += grad_out
        grad = grad_out * weight[None, :]
        along = tl.sum(grad * normed, axis=1) / SIZE
        grad = (grad - tl.sum(grad, axis=1)[:, None] / SIZE - normed * along[:, None]) * rstd[:, None]
        tl.store(grad_residual_ptr + places, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if DROPPED > 0:
            grad = tl.where(keep, grad * (65536.0 / (65536 - DROPPED)), 0.0)
        if linear_bias_ptr is not None:
            grad_linear_bias += tl.where(mask, grad, 0.0)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + places, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    own = tl.program_id(0) * SIZE + cols
    tl.store(weight_partials_ptr + own, tl.sum(grad_weight, axis=0), mask=in_row)
    tl.store(bias_partials_ptr + own, tl.sum(grad_bias, axis=0), mask=in_row)
    if linear_bias_ptr is not None:
        tl.store(linear_bias_partials_ptr + own, tl.sum(grad_linear_bias, axis=0), mask=in_row)


class DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, linear_bias, weight, bias, eps, p, rng, site, shared):
        num_rows, size = x.shape
        x, residual = x.contiguous(), residual.contiguous()
        dropped = drop_threshold(p) if rng is not None else 0
        block_rows, block_cols = row_blocks(x, size)
        out = torch.empty_like(x)
        mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))  # both aligned
        forward_kernel[(cdiv(num_rows, block_rows),)](
            *(x, residual, linear_bias, weight, bias, out, mean, rstd, rng, site, num_rows),
            *(eps, size, dropped, block_rows, block_cols),
            num_warps=4,
        )
        ctx.save_for_backward(x, residual, mean, rstd, rng)
        ctx.parameters = (weight, bias, linear_bias)
        ctx.dropped, ctx.site, ctx.shared = dropped, site, shared
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, residual, mean, rstd, rng = ctx.saved_tensors
        weight, bias, linear_bias = ctx.parameters
        num_rows, size = x.shape
        block_rows, block_cols = row_blocks(x, size)
        grad_residual = torch.empty_like(residual)
        grad_x = torch.empty_like(x) if ctx.dropped else None
        vectors = [weight, bias] if linear_bias is None else [weight, bias, linear_bias]
        sums = PartialSums(vectors, reduction_programs(x, cdiv(num_rows, block_rows)))
        backward_kernel[(sums.programs,)](
            *(grad_out.contiguous(), x, residual, linear_bias, weight, mean, rstd, rng, grad_x, grad_residual),
            *(*sums.parts, None)[:3],
            *(ctx.site, num_rows, size, ctx.dropped, block_rows, block_cols),
            num_warps=4,
        )
        grad_weight, grad_bias, grad_linear_bias = (*sums.add(), None)[:3]
        grad_x = grad_residual if grad_x is None else grad_x
        if ctx.shared is not None:
            ctx.shared.of_residual = grad_residual
        returned = grad_residual if ctx.shared is None else None
        return grad_x, returned, grad_linear_bias, grad_weight, grad_bias, None, None, None, None, None


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    linear_bias: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    shared: SharedGradient | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + linear_bias) + residual) of [T, H]; no dropout without `rng` (see philox.py).

    `shared`: of a residual that a linear layer reads too, and gives the gradient of both (see gradients.py).
    """
    if use_triton(x):
        return DropoutAddLayerNorm.apply(x, residual, linear_bias, weight, bias, eps, p, rng, site, shared)
    return dropout_add_layer_norm_reference(
        x, residual, weight, bias, eps, linear_bias=linear_bias, p=p, rng=rng, site=site
    )


def dropout_add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    linear_bias: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """`dropout_add_layer_norm` in plain torch."""
    x = x if linear_bias is None else x + linear_bias
    return F.layer_norm(dropout_reference(x, rng, site, p) + residual, weight.shape, weight, bias, eps)
