"""Linear layers and what stands around them, in torch or by the kernels.

Shapes: T tokens in the batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from minibert.model.dropout import DropoutMasks, dropout_add
from minibert.model.linear import Linear

if TYPE_CHECKING:
    from minibert_kernels.gradients import SharedGradient


def shared_gradient(masks: DropoutMasks | None) -> SharedGradient | None:
    """For the kernels, of a tensor that a linear layer reads and that is the residual behind it, too."""
    if masks is None or not masks.kernels:
        return None
    from minibert_kernels.gradients import SharedGradient

    return SharedGradient()


def linear(
    x: Tensor,
    layer: Linear,
    masks: DropoutMasks | None,
    rows: slice | None = None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """layer(x), or some of its outputs; for the kernels in a form that adds weight gradients up in place."""
    if masks is not None and masks.kernels:
        from minibert_kernels.linear import linear as in_place

        return in_place(x, layer.weight, layer.bias, rows, shared)
    return layer(x) if rows is None else layer.rows(x, rows)


def linear_dropout_add_norm(
    x: Tensor,
    layer: Linear,
    residual: Tensor,
    norm: nn.LayerNorm,
    p: float,
    masks: DropoutMasks | None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """LayerNorm(dropout(layer(x)) + residual): what stands behind attention and behind the feed-forward network.

    The kernel adds the layer's bias in its own pass, and its gradient to that of the norm.
    """
    if masks is not None and masks.kernels:
        from minibert_kernels.layer_norm import dropout_add_layer_norm
        from minibert_kernels.linear import linear as in_place

        product, site = in_place(x, layer.weight), masks.next_site()
        return dropout_add_layer_norm(
            product,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            linear_bias=layer.bias,
            p=p,
            rng=masks.rng,
            site=site,
            shared=shared,
        )
    return norm(dropout_add(layer(x), residual, p, masks))


def linear_activation(
    x: Tensor,
    layer: Linear,
    activation: Callable[[Tensor], Tensor],
    masks: DropoutMasks | None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """activation(layer(x)); the kernel adds the bias to erf-GELU's own pass, and its gradient to the backward's."""
    if masks is not None and masks.kernels and activation is F.gelu:
        from minibert_kernels.gelu import bias_gelu
        from minibert_kernels.linear import linear as in_place

        return bias_gelu(in_place(x, layer.weight, shared=shared), layer.bias)
    return activation(linear(x, layer, masks, shared=shared))
