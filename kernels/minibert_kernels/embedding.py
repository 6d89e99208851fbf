"""dropout(LayerNorm(word + position + token type embedding)), gathered, normed and dropped in one pass.

The backward pass gathers the rows and draws the mask again. It gives the gradient of the summed rows [T, H] and of the
norm's weight and bias; `scatter_rows_` adds the rows' gradients up by id, sorted first, without atomics.

Shapes: T tokens, H columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels.backend import cdiv, jit, next_power_of_2, on_gpu, reduction_programs, tl, use_triton
from minibert_kernels.gradients import PartialSums, grad_buffer
from minibert_kernels.layer_norm import row_blocks
from minibert_kernels.philox import drop_threshold, dropout_reference, keep_mask_kernel

SEGMENTS = (8, 128)  # rows and columns of a program that adds gradients up on a GPU


@jit()
def _gather_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    rows,
    cols,
    num_rows,
    mask,
    SIZE: tl.constexpr,
):
    """The sum of the three embeddings of some tokens, in fp32, 0 outside the mask."""
    word = tl.load(input_ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    position = tl.load(position_ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    total = tl.load(word_ptr + word[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    total += tl.load(position_ptr + position[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    token_type = tl.zeros_like(word)
    if token_type_ids_ptr is not None:
        token_type = tl.load(token_type_ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    total += tl.load(token_type_ptr + token_type[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return total


@jit(do_not_specialize=("site", "num_rows"))
def forward_kernel(
    input_ids_ptr,  # [T] int64
    position_ids_ptr,  # [T] int64
    token_type_ids_ptr,  # [T] int64, or None for all 0
    word_ptr,  # [vocabulary, H]
    position_ptr,  # [positions, H]
    token_type_ptr,  # [types, H]
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
    total = _gather_kernel(
        input_ids_ptr,
        position_ids_ptr,
        token_type_ids_ptr,
        word_ptr,
        position_ptr,
        token_type_ptr,
        rows,
        cols,
        num_rows,
        mask,
        SIZE,
    )
    mean = tl.sum(total, axis=1) / SIZE
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / SIZE + EPS)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if DROPPED > 0:
        keep = keep_mask_kernel(rng_ptr, site, rows, 0, BLOCK_COLS, DROPPED)
        out = tl.where(keep, out * (65536.0 / (65536 - DROPPED)), 0.0)
    places = rows.to(tl.int64)[:, None] * SIZE + cols[None, :]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@jit(do_not_specialize=("site", "num_rows"))
def backward_kernel(
    grad_out_ptr,  # [T, H]
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    grad_sum_ptr,  # [T, H]
    weight_partials_ptr,  # [programs, H] fp32
    bias_partials_ptr,
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
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & in_row[None, :]
        total = _gather_kernel(
            input_ids_ptr,
            position_ids_ptr,
            token_type_ids_ptr,
            word_ptr,
            position_ptr,
            token_type_ptr,
            rows,
            cols,
            num_rows,
            mask,
            SIZE,
        )
        places = rows.to(tl.int64)[:, None] * SIZE + cols[None, :]
        grad_out = tl.load(grad_out_ptr + places, mask=mask, other=0.0).to(tl.float32)
        if DROPPED > 0:
            keep = keep_mask_kernel(rng_ptr, site, rows, 0, BLOCK_COLS, DROPPED)
            grad_out = tl.where(keep, grad_out * (65536.0 / (65536 - DROPPED)), 0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        grad_weight += grad_out * normed
        grad_bias += grad_out
        grad = grad_out * weight[None, :]
        along = tl.sum(grad * normed, axis=1) / SIZE
        grad = (grad - tl.sum(grad, axis=1)[:, None] / SIZE - normed * along[:, None]) * rstd[:, None]
        tl.store(grad_sum_ptr + places, grad.to(grad_sum_ptr.dtype.element_ty), mask=mask)
    own = tl.program_id(0) * SIZE + cols
    tl.store(weight_partials_ptr + own, tl.sum(grad_weight, axis=0), mask=in_row)
    tl.store(bias_partials_ptr + own, tl.sum(grad_bias, axis=0), mask=in_row)


@jit()
def scatter_kernel(
    grad_ptr,  # [T, H]
    ids_ptr,  # [T] int64, sorted
    order_ptr,  # [T] int64, the row of `grad` of each sorted id
    ends_ptr,  # [T] int64, where the run of equal ids ends
    out_ptr,  # [table rows, H], which the sums are added to
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program where a run of equal ids begins adds up the run's rows, in order; the others have nothing to do."""
    first = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row = tl.load(ids_ptr + first)
    if (first == 0) | (row != tl.load(ids_ptr + tl.maximum(first - 1, 0))):
        end = tl.load(ends_ptr + first).to(tl.int32)
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for start in range(first, end, BLOCK_ROWS):
            sorted_rows = start + tl.arange(0, BLOCK_ROWS)
            rows = tl.load(order_ptr + sorted_rows, mask=sorted_rows < end, other=0)
            mask = (sorted_rows < end)[:, None] & (cols < SIZE)[None, :]
            total += tl.load(grad_ptr + rows[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        places = out_ptr + row * SIZE + cols
        before = tl.load(places, mask=cols < SIZE, other=0.0).to(tl.float32)
        sums = before + tl.sum(total, axis=0)
        tl.debug_barrier()  # no thread may store what another has yet to load
        tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=cols < SIZE)


def scatter_rows_(out: Tensor, grad: Tensor, ids: Tensor | None) -> None:
    """Add the gradient of a table whose rows `ids` (None: all 0) were gathered: equal bits from run to run."""
    if ids is None:
        out[0] += grad.sum(0, dtype=torch.float32)
        return
    if len(out) <= 16:  # few long runs: a matrix product adds up faster
        chosen = ids[None, :] == torch.arange(len(out), device=ids.device)[:, None]
        out.addmm_(chosen.to(grad.dtype), grad)
        return
    ids, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(ids, ids, right=True)
    size = grad.shape[1]
    block_rows, block_cols = SEGMENTS if on_gpu(grad) else (8, max(16, next_power_of_2(size)))
    scatter_kernel[(len(ids), cdiv(size, block_cols))](
        grad, ids, order, ends, out, size, block_rows, block_cols, num_warps=4
    )


class EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        eps,
        p,
        rng,
        site,
    ):
        num_rows, size = len(input_ids), word.shape[1]
        dropped = drop_threshold(p) if rng is not None else 0
        block_rows, block_cols = row_blocks(word, size)
        out = torch.empty(num_rows, size, dtype=word.dtype, device=word.device)
        mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=word.device) for _ in range(2))  # both aligned
        ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
        assert all(tensor is None or tensor.is_contiguous() for tensor in (*ids, *tables))
        forward_kernel[(cdiv(num_rows, block_rows),)](
            *(*ids, *tables, weight, bias, out, mean, rstd, rng, site, num_rows),
            *(eps, size, dropped, block_rows, block_cols),
            num_warps=4,
        )
        ctx.save_for_backward(*ids, mean, rstd, rng)
        ctx.parameters = (*tables, weight, bias)
        ctx.dropped, ctx.site = dropped, site
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *ids, mean, rstd, rng = ctx.saved_tensors
        word, position, token_type, weight, bias = ctx.parameters
        num_rows, size = grad_out.shape
        block_rows, block_cols = row_blocks(word, size)
        grad_sum = torch.empty(num_rows, size, dtype=word.dtype, device=word.device)
        sums = PartialSums([weight, bias], reduction_programs(word, cdiv(num_rows, block_rows)))
        backward_kernel[(sums.programs,)](
            *(grad_out.contiguous(), *ids, word, position, token_type, weight, mean, rstd, rng, grad_sum, *sums.parts),
            *(ctx.site, num_rows, size, ctx.dropped, block_rows, block_cols),
            num_warps=4,
        )
        buffers, grads = zip(*map(grad_buffer, (word, position, token_type)), strict=True)
        for of_table, buffer in zip(ids, buffers, strict=True):
            scatter_rows_(buffer, grad_sum, of_table)
        return None, None, None, *grads, *sums.add(), None, None, None, None


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """ids [T] and tables [.., H] -> [T, H]; token_type_ids None is all 0; no dropout without `rng`."""
    tensors = (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias)
    if use_triton(word):
        return EmbeddingLayerNorm.apply(*tensors, eps, p, rng, site)
    return embedding_layer_norm_reference(*tensors, eps, p=p, rng=rng, site=site)


def embedding_layer_norm_reference(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """`embedding_layer_norm` in plain torch."""
    total = F.embedding(input_ids, word) + F.embedding(position_ids, position)
    total = total + (token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type))
    return dropout_reference(F.layer_norm(total, weight.shape, weight, bias, eps), rng, site, p)
