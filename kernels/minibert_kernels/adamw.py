"""AdamW over flat buffers: clipping, loss scaling, the skipped step and the low-precision copy, all in one pass.

Parameters, both moments and gradients are one fp32 buffer each (gradients may be bf16 or fp16), so that a step is three
launches however many parameters there are: two for the norm, one for the update. Each parameter starts at a multiple of
BLOCK elements, and every block names its group, which holds weight decay and a factor of the learning rate.

Nothing is read back: learning rate, step number and what follows from the norm stay on the device, so a CUDA graph can
hold the whole step. The update is torch.optim.AdamW's, bias correction included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert_kernels.backend import cdiv, jit, on_gpu, reduction_programs, tl, use_triton

BLOCK = 1024  # elements of a block, which all belong to one group
NORM_BLOCK = 4096  # elements of which a program takes the sum of squares at once
MOST_PARTIALS = 1024  # sums of squares, which one program adds up
NORM, DIVISOR, FOUND_INF, CORRECTION_1, CORRECTION_2 = range(5)  # places in `control`


@dataclass
class FlatLayout:
    """Where each parameter lies in the flat buffers."""

    shapes: list[torch.Size]
    offsets: list[int]  # in elements, multiples of BLOCK
    total: int
    block_groups: Tensor  # [blocks] int32, the group of each block
    group_table: Tensor  # [groups, 3] fp32: factor of the learning rate, weight decay, 1 if gradients are to be cleared

    @classmethod
    def of(
        cls,
        shapes: Sequence[torch.Size],
        groups: Sequence[int],
        group_table: Sequence[tuple[float, float]],
        device: torch.device | str = "cpu",
        written_over: Sequence[bool] | None = None,
    ) -> FlatLayout:
        """One after another in the given order; parameter i is of group `groups[i]`.

        group_table: factor of the learning rate and weight decay of each group. `written_over` names the parameters
        whose gradients the next step does not add to, and which nobody has to clear.
        """
        over = [False] * len(shapes) if written_over is None else written_over
        numbers = [2 * group + kept for group, kept in zip(groups, over, strict=True)]
        blocks = [cdiv(math.prod(shape), BLOCK) for shape in shapes]
        offsets = [BLOCK * sum(blocks[:i]) for i in range(len(blocks))]
        of_block = torch.repeat_interleave(torch.tensor(numbers, dtype=torch.int32), torch.tensor(blocks))
        table = torch.tensor([(*group, clear) for group in group_table for clear in (1.0, 0.0)], dtype=torch.float32)
        return cls(list(shapes), offsets, BLOCK * sum(blocks), of_block.to(device), table.to(device))

    def buffer(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A flat buffer of zeros, as the gaps between parameters must be."""
        return torch.zeros(self.total, dtype=dtype, device=self.block_groups.device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat buffer, each in its shape."""
        parts = zip(self.shapes, self.offsets, strict=True)
        return [buffer[start : start + math.prod(shape)].view(shape) for shape, start in parts]


@jit()
def sum_of_squares_kernel(grad_ptr, partials_ptr, total, BLOCK_SIZE: tl.constexpr):
    """Program i adds up blocks i, i + programs, ..."""
    squares = tl.zeros([BLOCK_SIZE], tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_SIZE
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    for offset in range(start, total, stride):
        places = offset + tl.arange(0, BLOCK_SIZE)
        grad = tl.load(grad_ptr + places, mask=places < total, other=0.0).to(tl.float32)
        squares += grad * grad
    tl.store(partials_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@jit()
def control_kernel(
    partials_ptr,
    num_partials,
    step_ptr,
    loss_scale_ptr,
    control_ptr,
    log2_beta1: tl.constexpr,
    log2_beta2: tl.constexpr,
    MAX_NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One program: the norm, and all that the update needs to know of it."""
    places = tl.arange(0, BLOCK_SIZE)
    norm = tl.sqrt_rn(tl.sum(tl.load(partials_ptr + places, mask=places < num_partials, other=0.0), axis=0))
    divisor = tl.full([], 1.0, tl.float32)
    if loss_scale_ptr is not None:
        divisor = tl.load(loss_scale_ptr)
        norm = tl.div_rn(norm, divisor)
    found_inf = 1.0 - (tl.abs(norm) < float("inf")).to(tl.float32)  # a NaN is not below anything
    if MAX_NORM > 0:
        divisor = divisor * tl.maximum(tl.div_rn(norm + 1e-6, tl.full([], MAX_NORM, tl.float32)), 1.0)
    step = tl.load(step_ptr).to(tl.float32) + (1.0 - found_inf)  # a skipped step does not count
    tl.store(step_ptr, step.to(step_ptr.dtype.element_ty))
    exact = step.to(tl.float64)  # 1 - 0.999 has three digits less in fp32
    correction1 = 1.0 - tl.exp2(exact * log2_beta1)
    correction2 = 1.0 - tl.exp2(exact * log2_beta2)
    tl.store(control_ptr + 0, norm)
    tl.store(control_ptr + 1, divisor)
    tl.store(control_ptr + 2, found_inf)
    tl.store(control_ptr + 3, correction1.to(tl.float32))
    tl.store(control_ptr + 4, correction2.to(tl.float32))


@jit()
def adamw_kernel(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    half_copy_ptr,  # or None
    block_groups_ptr,
    group_table_ptr,
    lr_ptr,
    control_ptr,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    """One program a block."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    group = group_table_ptr + 3 * tl.load(block_groups_ptr + block)
    if tl.load(control_ptr + 2) == 0.0:  # a skipped step touches nothing
        lr = tl.load(lr_ptr).to(tl.float32) * tl.load(group)
        decay = tl.load(group + 1)
        step_size = tl.div_rn(lr, tl.load(control_ptr + 3))
        correction2_sqrt = tl.sqrt_rn(tl.load(control_ptr + 4))
        param = tl.load(param_ptr + places)
        exp_avg = tl.load(exp_avg_ptr + places)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + places)
        grad = tl.load(grad_ptr + places).to(tl.float32)
        grad = tl.div_rn(grad, tl.zeros_like(grad) + tl.load(control_ptr + 1))
        param = param - lr * decay * param
        exp_avg = exp_avg + (1.0 - beta1) * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
        root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.zeros_like(grad) + correction2_sqrt)
        param = param - step_size * tl.div_rn(exp_avg, root + eps)
        tl.store(param_ptr + places, param)
        tl.store(exp_avg_ptr + places, exp_avg)
        tl.store(exp_avg_sq_ptr + places, exp_avg_sq)
        if half_copy_ptr is not None:
            tl.store(half_copy_ptr + places, param.to(half_copy_ptr.dtype.element_ty))
    if ZERO_GRAD:  # noqa: SIM102 (known when compiled, unlike the group)
        if tl.load(group + 2) > 0.0:
            tl.debug_barrier()  # other threads of the program may load what this one clears
            tl.store(grad_ptr + places, tl.zeros([BLOCK_SIZE], grad_ptr.dtype.element_ty))


def prepare_update_(
    grad: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    max_norm: float = 0.0,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Count the step (a device scalar) and return `control` [5] for `adamw_`; control[NORM] is the gradient's norm.

    The norm is that of the gradient divided by `loss_scale`. DIVISOR undoes the scale and clips the norm to `max_norm`
    (0: no clipping). A norm that is not finite sets FOUND_INF and leaves `step` as it was.
    """
    if not use_triton(grad):
        return prepare_update_reference_(grad, step, betas=betas, max_norm=max_norm, loss_scale=loss_scale)
    block = NORM_BLOCK if on_gpu(grad) else 1 << 14
    programs = min(reduction_programs(grad, cdiv(grad.numel(), block)), MOST_PARTIALS)
    partials = torch.empty(programs, dtype=torch.float32, device=grad.device)
    control = torch.empty(5, dtype=torch.float32, device=grad.device)
    sum_of_squares_kernel[(programs,)](grad, partials, grad.numel(), BLOCK_SIZE=block, num_warps=8)
    log2_beta1, log2_beta2 = math.log2(betas[0]), math.log2(betas[1])
    control_kernel[(1,)](
        partials, programs, step, loss_scale, control, log2_beta1, log2_beta2, float(max_norm), BLOCK_SIZE=MOST_PARTIALS
    )
    return control


def adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    half_copy: Tensor | None,
    layout: FlatLayout,
    lr: Tensor,
    control: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    zero_grad: bool = False,
) -> None:
    """Update the flat buffers in place, and write the parameters to `half_copy` in its dtype.

    lr: a device scalar, multiplied by each group's factor. `zero_grad` clears the gradients behind the update, also
    those of a skipped step, except where the layout says that they are written over.
    """
    if not use_triton(param):
        buffers = (param, exp_avg, exp_avg_sq, grad, half_copy)
        adamw_reference_(*buffers, layout, lr, control, betas=betas, eps=eps, zero_grad=zero_grad)
        return
    adamw_kernel[(param.numel() // BLOCK,)](
        *(param, exp_avg, exp_avg_sq, grad, half_copy, layout.block_groups, layout.group_table, lr, control),
        *(betas[0], betas[1], eps, BLOCK, zero_grad),
        num_warps=4,
    )


def prepare_update_reference_(
    grad: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    max_norm: float = 0.0,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """`prepare_update_` in plain torch."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
    divisor = torch.ones_like(norm)
    if loss_scale is not None:
        norm, divisor = norm / loss_scale, loss_scale.float()
    if max_norm > 0:
        divisor = divisor * ((norm + 1e-6) / max_norm).clamp(min=1.0)
    finite = norm.isfinite()
    step += finite.to(step.dtype)
    corrections = [1 - beta ** step.double() for beta in betas]
    return torch.stack([norm, divisor, (~finite).float(), *(c.float() for c in corrections)])


def adamw_reference_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    half_copy: Tensor | None,
    layout: FlatLayout,
    lr: Tensor,
    control: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    zero_grad: bool = False,
) -> None:
    """`adamw_` in plain torch, likewise without asking the device."""
    per_block = layout.group_table[layout.block_groups.long()]  # [blocks, 3]
    lr_of = (lr * per_block[:, 0]).repeat_interleave(BLOCK)
    decay = per_block[:, 1].repeat_interleave(BLOCK)
    scaled = grad.to(param.dtype) / control[DIVISOR]
    new_avg = exp_avg.lerp(scaled, 1 - betas[0])
    new_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * scaled * scaled
    denominator = new_avg_sq.sqrt() / control[CORRECTION_2].sqrt() + eps
    new_param = param * (1 - lr_of * decay) - lr_of / control[CORRECTION_1] * new_avg / denominator
    skip = control[FOUND_INF] > 0
    for old, new in ((param, new_param), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        old.copy_(torch.where(skip, old, new))
    if half_copy is not None:
        half_copy.copy_(torch.where(skip, half_copy, param.to(half_copy.dtype)))
    if zero_grad:
        cleared = per_block[:, 2].repeat_interleave(BLOCK) > 0
        grad.masked_fill_(cleared, 0)
