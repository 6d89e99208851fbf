"""nn.Linear whose products oneDNN may compute on a CPU, forward and backward.

torch sends fp32 products to MKL, which on AMD processors with AVX-512 reaches about half of what oneDNN does in the
same torch, at the same accuracy (3.5e-7 against fp64). `torch.backends.mkldnn` has no switch for that: its
`fp32_precision` would compute in bf16 where the processor has AMX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minibert.runtime import processor


class Linear(nn.Linear):
    """nn.Linear; its fp32 products on a CPU are oneDNN's where `Hardware.computing` asks for that."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return linear(x, self.weight, self.bias)

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """Some of the outputs: [T, in] -> [T, len(rows)]"""
        return linear(x, self.weight[rows], self.bias[rows])


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]"""
    if torch.compiler.is_compiling():  # which cannot read the switch
        return F.linear(x, weight, bias)
    if processor.onednn_computes() and x.dtype == torch.float32 and x.device.type == "cpu" and len(x):
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in] -> [T, out]"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """The three products of a linear layer. oneDNN reads the transposed views as they are."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = _product(grad, weight.t()) if wants_x else None
        grad_weight = _product(grad.t(), x.t()) if wants_weight else None
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None
