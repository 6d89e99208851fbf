"""A further encoder layer that averages: its [CLS] row is the mean of all tokens, as plain BERT for every reader.

Pretrained [CLS] rows say little about a text until they are trained; the mean of its tokens says much. Attention with
queries of 0 is uniform, values and output are the identity, and the feed-forward network adds nothing, so the layer is
an ordinary BERT layer with weights of its own, which training may change like any other.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from minibert.model.bert import BertForSequenceClassification, Layer
from minibert.model.config import BertConfig

VALUE_SCALE = 10.0  # the mean counts ten times as much as the [CLS] row that the residual connection adds


def add_averaging_layer(model: BertForSequenceClassification, seed: int) -> None:
    """Append the layer to the encoder. What it leaves at 0 now can be learned: keys and expansion are random."""
    hidden = model.config.hidden_size
    layer, generator = Layer(model.config), torch.Generator().manual_seed(seed)
    deviation = model.config.initializer_range or 0.02
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, deviation, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        layer.qkv.weight[:hidden] = 0.0
        layer.qkv.weight[2 * hidden :] = VALUE_SCALE * torch.eye(hidden)
        layer.attention_output.weight.copy_(torch.eye(hidden))
        layer.output.weight.zero_()
    model.encoder.layers.append(layer.eval())
    model.config = replace(model.config, num_hidden_layers=len(model.encoder.layers))
    model.averages = True


def saved_averages(config: BertConfig) -> bool:
    """Whether the last layer of a saved model began as an averaging one: it needs no second."""
    ours = config.source.get("minibert")
    return isinstance(ours, dict) and ours.get("averaging_layer") is True
