"""The classifier on BERT's pooled rows with its loss: tanh, dropout, linear layer and loss in one launch each way.

Everything behind the pooler's product is a few kilobytes of work that plain torch starts some 45 kernels for. A program
of the forward pass takes one row to its loss, and keeps the gradient of its logits; the backward pass draws the dropout
mask again. The gradient of the classifier's weight is a matrix product of torch's.

Shapes: B rows, H columns, L labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels.backend import jit, next_power_of_2, reduction_programs, tl, use_triton
from minibert_kernels.gradients import PartialSums, add_product
from minibert_kernels.linear import linear
from minibert_kernels.philox import drop_threshold, dropout_reference, keep_mask_kernel

KINDS = ("single_label_classification", "multi_label_classification", "regression")
MOST_LABELS = 128  # above, the products are large enough to be matrix products
TILE = 4096  # labels x columns that a program takes at once
WARPS = 8


def column_block(size: int, labels: int) -> tuple[int, int]:
    """(labels, columns) of a program's tile, powers of 2."""
    block_labels = next_power_of_2(labels)
    return block_labels, min(max(16, next_power_of_2(size)), TILE // max(16, block_labels))


@jit()
def _pooled(x_ptr, pooler_bias_ptr, row, cols, SIZE: tl.constexpr):
    """tanh(x + pooler bias) of some columns of a row."""
    x = tl.load(x_ptr + row * SIZE + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    x += tl.load(pooler_bias_ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)
    shrunk = tl.exp(-2.0 * tl.abs(x))
    tanh = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -tanh, tanh)


@jit()
def _keep(rng_ptr, site, row, first, BLOCK_COLS: tl.constexpr, DROPPED: tl.constexpr):
    rows = row + tl.arange(0, 1)
    return tl.reshape(keep_mask_kernel(rng_ptr, site, rows, first // 8, BLOCK_COLS, DROPPED), [BLOCK_COLS])


@jit()
def _weight(weight_ptr, labels, cols, SIZE: tl.constexpr, LABELS: tl.constexpr):
    """[labels, columns] of the classifier's weight, 0 outside."""
    mask = (labels < LABELS)[:, None] & (cols < SIZE)[None, :]
    return tl.load(weight_ptr + labels[:, None] * SIZE + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@jit()
def _single_label(logits, target, weights, labels, SMOOTHING: tl.constexpr, LABELS: tl.constexpr):
    """Cross-entropy of one row with class weights and label smoothing, as torch defines them, and its gradient."""
    real = labels < LABELS
    logits = tl.where(real, logits, float("-inf"))
    shifted = logits - tl.max(logits, axis=0)
    total = tl.sum(tl.exp(shifted), axis=0)
    surprise = tl.where(real, tl.log(total) - shifted, 0.0)  # -log of each label's probability
    given = tl.where(labels == target, weights * (1.0 - SMOOTHING), 0.0) + weights * (SMOOTHING / LABELS)
    loss = tl.sum(given * surprise, axis=0)
    return loss, tl.exp(shifted) / total * tl.sum(given, axis=0) - given


@jit()
def _multi_label(logits, targets, weights, labels, SMOOTHING: tl.constexpr, LABELS: tl.constexpr):
    """Mean binary cross-entropy of one row with weights of the positive, and its gradient."""
    targets = targets * (1.0 - SMOOTHING) + SMOOTHING / 2
    shrunk = tl.exp(-tl.abs(logits))
    softplus = tl.log(1.0 + shrunk) + tl.maximum(-logits, 0.0)  # -log of the probability
    negative = tl.where(logits < 0, 1.0, shrunk) / (1.0 + shrunk)  # probability of the opposite
    scale = 1.0 + (weights - 1.0) * targets
    losses = tl.where(labels < LABELS, (1.0 - targets) * logits + scale * softplus, 0.0)
    grad = tl.where(labels < LABELS, 1.0 - targets - scale * negative, 0.0)
    return tl.sum(losses, axis=0) / LABELS, grad / LABELS


@jit(do_not_specialize=("site",))
def forward_kernel(
    x_ptr,  # [B, H] the pooler's product, without its bias
    pooler_bias_ptr,  # [H]
    weight_ptr,  # [L, H]
    bias_ptr,  # [L]
    targets_ptr,  # [B] int64; multi-label: [B, L] fp32; regression: [B] fp32
    class_weights_ptr,  # [L] fp32, or None
    keep_ptr,  # [B] fp32, 0 for rows that only fill the batch up, or None
    denominator_ptr,  # fp32: what the sum of the losses is divided by
    dropped_ptr,  # [B, H] tanh with dropout
    logits_ptr,  # [B, L] fp32
    losses_ptr,  # [B] fp32, divided
    grad_logits_ptr,  # [B, L] fp32, of the sum of `losses`
    rng_ptr,  # [2] int64, or None without dropout
    site,
    KIND: tl.constexpr,
    SMOOTHING: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    LABELS: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A program: one row."""
    row = tl.program_id(0)
    labels = tl.arange(0, BLOCK_LABELS)
    real = labels < LABELS
    logits = tl.load(bias_ptr + labels, mask=real, other=0.0).to(tl.float32)
    for first in range(0, SIZE, BLOCK_COLS):
        cols = first + tl.arange(0, BLOCK_COLS)
        pooled = _pooled(x_ptr, pooler_bias_ptr, row, cols, SIZE)
        if DROPPED > 0:
            keep = _keep(rng_ptr, site, row, first, BLOCK_COLS, DROPPED)
            pooled = tl.where(keep, pooled * (65536.0 / (65536 - DROPPED)), 0.0)
        tl.store(dropped_ptr + row * SIZE + cols, pooled.to(dropped_ptr.dtype.element_ty), mask=cols < SIZE)
        logits += tl.sum(_weight(weight_ptr, labels, cols, SIZE, LABELS) * pooled[None, :], axis=1)
    weights = real.to(tl.float32)
    if class_weights_ptr is not None:
        weights = tl.load(class_weights_ptr + labels, mask=real, other=0.0)
    if KIND == 0:
        loss, grad = _single_label(logits, tl.load(targets_ptr + row), weights, labels, SMOOTHING, LABELS)
    elif KIND == 1:
        targets = tl.load(targets_ptr + row * LABELS + labels, mask=real, other=0.0)
        loss, grad = _multi_label(logits, targets, weights, labels, SMOOTHING, LABELS)
    else:
        distance = tl.where(real, (logits - tl.load(targets_ptr + row)) / UNIT, 0.0)
        loss, grad = tl.sum(distance * distance, axis=0), distance * (2.0 / UNIT)
    divisor = tl.load(denominator_ptr)
    loss, grad = loss / divisor, grad / divisor
    if keep_ptr is not None:
        counts = tl.load(keep_ptr + row) > 0
        loss, grad = tl.where(counts, loss, 0.0), tl.where(counts, grad, 0.0)
    tl.store(losses_ptr + row, loss)
    tl.store(logits_ptr + row * LABELS + labels, logits, mask=real)
    tl.store(grad_logits_ptr + row * LABELS + labels, grad, mask=real)


@jit()
def _upstream(grad_logits_ptr, grad_loss_ptr, more_ptr, row, labels, LABELS: tl.constexpr):
    """The gradient of a row's logits, through the loss and where asked for directly."""
    real = labels < LABELS
    total = tl.zeros_like(labels).to(tl.float32)
    if grad_loss_ptr is not None:
        total += tl.load(grad_logits_ptr + row * LABELS + labels, mask=real, other=0.0) * tl.load(grad_loss_ptr)
    if more_ptr is not None:
        total += tl.load(more_ptr + row * LABELS + labels, mask=real, other=0.0)
    return total


@jit(do_not_specialize=("site", "num_rows"))
def backward_kernel(
    x_ptr,
    pooler_bias_ptr,
    weight_ptr,
    grad_logits_ptr,  # [B, L] fp32, of the loss
    grad_loss_ptr,  # fp32 scalar, or None
    more_ptr,  # [B, L] fp32, a gradient of the logits themselves, or None
    grad_x_ptr,  # [B, H]
    low_ptr,  # [B, L] the gradient of the logits in the weights' dtype
    pooler_bias_partials_ptr,  # [programs, H] fp32
    bias_partials_ptr,  # [programs of its own slot, L] fp32
    rng_ptr,
    site,
    num_rows,
    SIZE: tl.constexpr,
    LABELS: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program i takes rows i, i + programs, ..."""
    labels = tl.arange(0, BLOCK_LABELS)
    for first in range(0, SIZE, BLOCK_COLS):
        cols = first + tl.arange(0, BLOCK_COLS)
        grad_bias = tl.zeros([BLOCK_COLS], tl.float32)
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            of_logits = _upstream(grad_logits_ptr, grad_loss_ptr, more_ptr, row, labels, LABELS)
            weight = _weight(weight_ptr, labels, cols, SIZE, LABELS)
            grad = tl.sum(weight * of_logits[:, None], axis=0)
            if DROPPED > 0:
                keep = _keep(rng_ptr, site, row, first, BLOCK_COLS, DROPPED)
                grad = tl.where(keep, grad * (65536.0 / (65536 - DROPPED)), 0.0)
            pooled = _pooled(x_ptr, pooler_bias_ptr, row, cols, SIZE)
            grad = grad * (1.0 - pooled * pooled)
            tl.store(grad_x_ptr + row * SIZE + cols, grad.to(grad_x_ptr.dtype.element_ty), mask=cols < SIZE)
            grad_bias += grad
        tl.store(pooler_bias_partials_ptr + tl.program_id(0) * SIZE + cols, grad_bias, mask=cols < SIZE)
    total = tl.zeros([BLOCK_LABELS], tl.float32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        of_logits = _upstream(grad_logits_ptr, grad_loss_ptr, more_ptr, row, labels, LABELS)
        tl.store(low_ptr + row * LABELS + labels, of_logits.to(low_ptr.dtype.element_ty), mask=labels < LABELS)
        total += of_logits
    tl.store(bias_partials_ptr + tl.program_id(0) * LABELS + labels, total, mask=labels < LABELS)


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pooler_bias, weight, bias, targets, class_weights, keep, denominator, rng, site, constants):
        x = x.contiguous()
        (rows, size), count = x.shape, len(bias)
        dropped = constants["DROPPED"]
        block_labels, block_cols = column_block(size, count)
        dropped_rows = torch.empty_like(x)
        logits, grad_logits = (torch.empty(rows, count, dtype=torch.float32, device=x.device) for _ in range(2))
        losses = torch.empty(rows, dtype=torch.float32, device=x.device)
        forward_kernel[(rows,)](
            *(x, pooler_bias, weight, bias, targets, class_weights, keep, denominator),
            *(dropped_rows, logits, losses, grad_logits, rng, site),
            **constants,
            SIZE=size,
            LABELS=count,
            BLOCK_LABELS=block_labels,
            BLOCK_COLS=block_cols,
            num_warps=WARPS,
        )
        ctx.save_for_backward(x, dropped_rows, grad_logits, rng)
        ctx.parameters, ctx.dropped, ctx.site = (pooler_bias, weight, bias), dropped, site
        ctx.set_materialize_grads(False)
        return losses.sum(), logits

    @staticmethod
    def backward(ctx, grad_loss, more):
        (x, dropped_rows, grad_logits, rng), (pooler_bias, weight, bias) = ctx.saved_tensors, ctx.parameters
        (rows, size), count = x.shape, len(bias)
        block_labels, block_cols = column_block(size, count)
        grad_x, low = torch.empty_like(x), torch.empty(rows, count, dtype=x.dtype, device=x.device)
        sums = PartialSums([pooler_bias, bias], reduction_programs(x, rows))
        backward_kernel[(sums.programs,)](
            *(x, pooler_bias, weight, grad_logits, grad_loss, None if more is None else more.contiguous()),
            *(grad_x, low, *sums.parts, rng, ctx.site, rows),
            *(size, count, ctx.dropped, block_labels, block_cols),
            num_warps=WARPS,
        )
        grad_weight = add_product(weight, low.t(), dropped_rows, slice(None))
        grad_pooler_bias, grad_bias = sums.add()
        return grad_x, grad_pooler_bias, grad_weight, grad_bias, *[None] * 7


def head_loss(
    x: Tensor,
    pooler_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    targets: Tensor,
    denominator: Tensor,
    kind: str,
    class_weights: Tensor | None = None,
    smoothing: float = 0.0,
    unit: float = 1.0,
    keep: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """[B, H] the pooler's products -> (sum of the rows' losses / denominator, logits [B, L]), both fp32.

    The logits are those of dropout(tanh(x + pooler_bias)). kind: of KINDS, as in transformers' configs; it may have
    MOST_LABELS labels. targets: [B] class numbers, [B, L] 0 or 1 in fp32, or [B] fp32 numbers, counted in `unit`.
    `class_weights` [L] are of the classes or, with several labels, of their positive rows. `keep` [B] is 0 for rows
    that only fill the batch up. No dropout without `rng` (see philox.py).
    """
    options: dict[str, Any] = {"class_weights": class_weights, "keep": keep, "rng": rng, "site": site}
    if not use_triton(x):
        options.update(kind=kind, smoothing=smoothing, unit=unit, p=p)
        return head_loss_reference(x, pooler_bias, weight, bias, targets=targets, denominator=denominator, **options)
    constants: dict[str, Any] = {"KIND": KINDS.index(kind), "SMOOTHING": smoothing, "UNIT": unit}
    constants["DROPPED"] = drop_threshold(p) if rng is not None else 0
    tensors = (x, pooler_bias, weight, bias, targets, class_weights, keep, denominator)
    return HeadLoss.apply(*tensors, rng, site, constants)


def head_loss_reference(
    x: Tensor,
    pooler_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    targets: Tensor,
    denominator: Tensor,
    kind: str,
    class_weights: Tensor | None = None,
    smoothing: float = 0.0,
    unit: float = 1.0,
    keep: Tensor | None = None,
    p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """`head_loss` in plain torch; the weight's gradient goes where that of every linear layer goes."""
    logits = linear(dropout_reference(torch.tanh(x + pooler_bias), rng, site, p), weight) + bias
    if logits.dtype != torch.float64:
        logits = logits.float()
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    if kind == KINDS[0]:
        losses = F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
    elif kind == KINDS[1]:
        wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none").mean(1)
    else:
        losses = ((logits.squeeze(1) - targets) / unit) ** 2
    return (losses if keep is None else torch.where(keep > 0, losses, 0)).sum() / denominator, logits
