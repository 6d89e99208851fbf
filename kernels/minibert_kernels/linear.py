"""x @ weight' + bias, whose backward pass adds the gradients of weight and bias to the optimizer's own buffer.

Autograd would write the weight's gradient to a new tensor and add that to the buffer in a second launch, for every
weight and bias of the network. The product can add by itself; Megatron-LM calls this gradient accumulation fusion.
Plain torch on every device: the products are cuBLAS's.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert_kernels.backend import grad_buffer


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows):
        ctx.save_for_backward(x)
        ctx.parameters, ctx.rows = (weight, bias), rows
        return F.linear(x, weight[rows], None if bias is None else bias[rows])

    @staticmethod
    def backward(ctx, grad_out):
        (x,), (weight, bias), rows = ctx.saved_tensors, ctx.parameters, ctx.rows
        grad_x = grad_out @ weight[rows] if ctx.needs_input_grad[0] else None
        buffer, grad_weight = grad_buffer(weight)
        buffer[rows].addmm_(grad_out.t(), x)
        if bias is None:
            return grad_x, grad_weight, None, None
        buffer, grad_bias = grad_buffer(bias)
        buffer[rows] += grad_out.sum(0)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """[T, I], weight [O, I] and bias [O] -> [T, O]; `rows` takes some of the outputs only."""
    return Linear.apply(x, weight, bias, slice(None) if rows is None else rows)
