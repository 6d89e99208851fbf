"""All of BERT (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers") in one file.

The encoder computes on packed tokens: the texts of a batch one behind another, no padding. `BertModel` and
`BertForSequenceClassification` also take padded [B, S] input, which they pack first.

Shapes: T tokens in the batch, B texts, S padded length, H hidden size, L labels, N attention heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minibert.model import ops
from minibert.model.attention import first_token_attention, self_attention
from minibert.model.config import BertConfig
from minibert.model.dropout import DropoutMasks, dropout, training_masks
from minibert.model.linear import Linear
from minibert.model.packing import PackedInput, Packing, pack_padded

if TYPE_CHECKING:
    from minibert_kernels.gradients import SharedGradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = _table(config.vocab_size, config)
        self.position_embeddings = _table(config.max_position_embeddings, config)
        self.token_type_embeddings = _table(config.type_vocab_size, config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: PackedInput, masks: DropoutMasks | None) -> Tensor:
        if masks is not None and masks.kernels:
            return self._in_one_kernel(x, masks)
        hidden = self.word_embeddings(x.input_ids) + self.position_embeddings(x.position_ids)  # [T, H]
        if x.token_type_ids is None:
            hidden = hidden + self.token_type_embeddings.weight[0]
        else:
            hidden = hidden + self.token_type_embeddings(x.token_type_ids)
        return dropout(self.norm(hidden), self.dropout, masks)

    def _in_one_kernel(self, x: PackedInput, masks: DropoutMasks) -> Tensor:
        from minibert_kernels.embedding import embedding_layer_norm

        assert x.input_ids is not None and x.position_ids is not None
        return embedding_layer_norm(
            x.input_ids,
            x.position_ids,
            x.token_type_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            p=self.dropout,
            rng=masks.rng,
            site=masks.next_site(),
        )


def _table(rows: int, config: BertConfig) -> nn.Embedding:
    weight = torch.empty(rows, config.hidden_size)
    if not weight.is_meta:  # there, random numbers would be a second of imports for nothing
        nn.init.normal_(weight, std=config.initializer_range)
    return nn.Embedding(rows, config.hidden_size, _weight=weight)


class Layer(nn.Module):
    """Self-attention and feed-forward network, each with dropout, residual and LayerNorm behind it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention_dropout, self.dropout = config.attention_probs_dropout_prob, config.hidden_dropout_prob
        self.compiled_rest: Callable[[Layer, Tensor, Tensor, DropoutMasks], Tensor] | None = None  # for training
        self.qkv = Linear(hidden, 3 * hidden)
        self.attention_output = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=eps)
        self.intermediate = Linear(hidden, config.intermediate_size)
        self.output = Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, hidden: Tensor, packing: Packing, masks: DropoutMasks | None) -> Tensor:
        """[T, H] -> [T, H]"""
        shared = ops.shared_gradient(masks)
        qkv = ops.linear(hidden, self.qkv, masks, shared=shared)  # [T, 3H]
        context = self_attention(qkv, packing, self.heads, self.attention_dropout, masks)
        return self._rest(context, hidden, masks, shared)

    def forward_first_tokens(self, hidden: Tensor, packing: Packing, masks: DropoutMasks | None) -> Tensor:
        """[T, H] -> [B, H]: the [CLS] rows of `forward`. All tokens give keys and values; only [CLS] asks."""
        size = hidden.shape[1]
        first = hidden.index_select(0, packing.first_rows)  # [B, H]
        shared = ops.shared_gradient(masks)
        query = ops.linear(first, self.qkv, masks, slice(size), shared)
        key_value = ops.linear(hidden, self.qkv, masks, slice(size, None))  # [T, 2H]
        context = first_token_attention(query, key_value, packing, self.heads, self.attention_dropout, masks)
        return self._rest(context, first, masks, shared)

    def _rest(
        self, context: Tensor, residual: Tensor, masks: DropoutMasks | None, shared: SharedGradient | None
    ) -> Tensor:
        if self.compiled_rest is None or masks is None:
            return self.after_attention(context, residual, masks, shared)
        return self.compiled_rest(self, context, residual, masks)

    def after_attention(
        self,
        context: Tensor,
        residual: Tensor,
        masks: DropoutMasks | None,
        shared: SharedGradient | None = None,
    ) -> Tensor:
        """What attention found [T, H] and what it was given [T, H] -> the layer's output [T, H]

        shared: of `residual`, which the projections of attention read.
        """
        p, norms = self.dropout, (self.attention_norm, self.output_norm)
        attended = ops.linear_dropout_add_norm(context, self.attention_output, residual, norms[0], p, masks, shared)
        shared = ops.shared_gradient(masks)
        expanded = ops.linear_activation(attended, self.intermediate, self.activation, masks, shared)
        return ops.linear_dropout_add_norm(expanded, self.output, attended, norms[1], p, masks, shared)


class Encoder(nn.Module):
    """Embeddings and layers on packed input: the part that frozen or pretrained weights fill."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.frozen_layers = -1  # so many layers, and at 0 or more the embeddings, do without dropout
        self.before_layer: Callable[[int], None] | None = None  # told whose weights are read next (-1: the embeddings)

    def forward(self, x: PackedInput, masks: DropoutMasks | None, end: int | None = None) -> Tensor:
        """Return the activations [T, H] after layer `end` (default the last)."""
        self._reach(-1)
        hidden = self.embeddings(x, self._masks_of(-1, masks)) if x.hidden is None else x.hidden
        for number in range(len(self.layers))[x.start_layer : end]:
            hidden = self._layer(number, hidden, x.packing, masks)
        return hidden

    def _layer(self, number: int, hidden: Tensor, packing: Packing, masks: DropoutMasks | None) -> Tensor:
        self._reach(number)
        return self.layers[number](hidden, packing, self._masks_of(number, masks))

    def _reach(self, layer: int) -> None:
        if self.before_layer is not None:
            self.before_layer(layer)

    def _masks_of(self, layer: int, masks: DropoutMasks | None) -> DropoutMasks | None:
        return None if masks is None or layer < self.frozen_layers else masks.of_layer(layer)

    def first_tokens(self, x: PackedInput, masks: DropoutMasks | None, cls_only: bool = True) -> Tensor:
        """Return the last layer's [CLS] rows [B, H]; `cls_only` computes no other row of that layer (exact)."""
        if x.start_layer == len(self.layers):
            assert x.hidden is not None
            return x.hidden  # already the [CLS] rows
        if not cls_only:
            return self(x, masks).index_select(0, x.packing.first_rows)
        last = len(self.layers) - 1
        hidden = self(x, masks, end=last)
        self._reach(last)
        return self.layers[last].forward_first_tokens(hidden, x.packing, self._masks_of(last, masks))  # type: ignore[operator]


class Pooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: Tensor, masks: DropoutMasks | None = None) -> Tensor:
        return torch.tanh(ops.linear(first_tokens, self.dense, masks))  # [B, H]


class ClassificationHead(nn.Module):
    """The head: one linear layer as in BERT, or with one hidden ReLU layer before it (`mlp_size`)."""

    def __init__(self, config: BertConfig, num_labels: int, mlp_size: int = 0) -> None:
        super().__init__()
        self.dropout = config.head_dropout_prob
        self.dense = Linear(config.hidden_size, mlp_size) if mlp_size else None
        self.out = Linear(mlp_size or config.hidden_size, num_labels)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        hidden = dropout(pooled, self.dropout, masks)
        if self.dense is not None:
            hidden = dropout(F.relu(ops.linear(hidden, self.dense, masks)), self.dropout, masks)
        return ops.linear(hidden, self.out, masks)  # [B, L]


@dataclass
class ModelOutput:
    last_hidden_state: Tensor  # [B, S, H], 0 where the attention mask is 0
    pooler_output: Tensor  # [B, H]


@dataclass
class ClassifierOutput:
    logits: Tensor  # [B, L]


class BertModel(nn.Module):
    """BERT without a head; same numbers as transformers' `BertModel` on every position that the mask keeps."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BertModel:
        """Load a model folder or hub id; a missing pooler is initialised, any other missing tensor is an error."""
        from minibert.model.checkpoint import load_model

        return load_model(folder, cls)[0]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """input_ids, attention_mask and token_type_ids are [B, S]. ValueError for ids or lengths out of range."""
        x, rows = pack_padded(self.config, input_ids, attention_mask, token_type_ids)
        hidden = self.encoder(x, training_masks(self))
        padded = hidden.new_zeros(input_ids.numel(), hidden.shape[1]).index_copy(0, rows, hidden)
        pooled = self.pooler(hidden.index_select(0, x.packing.first_rows))
        return ModelOutput(padded.view(*input_ids.shape, -1), pooled)


class BertForSequenceClassification(nn.Module):
    """BERT with a classification head on the pooled [CLS] row."""

    def __init__(self, config: BertConfig, num_labels: int, mlp_size: int = 0) -> None:
        super().__init__()
        self.config, self.num_labels, self.mlp_size = config, num_labels, mlp_size
        self.cls_only = True
        self.averages = False  # the last layer began as one that averages (averaging_layer.py)
        self.compiled_head: Callable[[BertForSequenceClassification, Tensor, DropoutMasks], Tensor] | None = None
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)
        self.classifier = ClassificationHead(config, num_labels, mlp_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_labels: int | None = None) -> BertForSequenceClassification:
        """Load a model folder or hub id. Without `num_labels` it takes as many as the checkpoint's config names."""
        from minibert.model.checkpoint import load_model

        return load_model(folder, cls, num_labels=num_labels)[0]

    def logits(self, x: PackedInput, masks: DropoutMasks | None = None) -> Tensor:
        """Packed input -> [B, L]; of windows, the mean for each text."""
        first_tokens = self.encoder.first_tokens(x, masks, self.cls_only)
        masks = None if masks is None else masks.of_layer(len(self.encoder.layers))
        if self.compiled_head is None or masks is None:
            logits = self.head(first_tokens, masks)
        else:
            logits = self.compiled_head(self, first_tokens, masks)
        if x.window_weights is None:
            return logits
        return (x.window_weights[:, :, None] * logits.float()).sum(1)  # a sum in fp32, in the same order every time

    def head(self, first_tokens: Tensor, masks: DropoutMasks | None) -> Tensor:
        """[B, H] -> [B, L]"""
        return self.classifier(self.pooler(first_tokens, masks), masks)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ClassifierOutput:
        """input_ids, attention_mask and token_type_ids are [B, S]. ValueError for ids or lengths out of range."""
        x, _ = pack_padded(self.config, input_ids, attention_mask, token_type_ids)
        return ClassifierOutput(self.logits(x, training_masks(self)))
