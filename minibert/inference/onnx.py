"""The classifier as an ONNX graph on padded input, node by node from the weights: no tracing, no surprises.

It computes what `BertForSequenceClassification` does in evaluation, of the last layer only the [CLS] row. Operators of
opset 17, so that runtimes since 2022 can read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from minibert.model.bert import BertForSequenceClassification, Embeddings, Layer

OPSET, IR_VERSION = 17, 8
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Graph:
    """Nodes and weights so far. Values go by their names, as in ONNX."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return the name of its output, or the names of several."""
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weight(self, tensor: Tensor) -> str:
        return self.constant(np.ascontiguousarray(tensor.detach().float().cpu().numpy()))

    def linear(self, x: str, weight: Tensor, bias: Tensor) -> str:
        return self.node("Add", self.node("MatMul", x, self.weight(weight.T)), self.weight(bias))

    def norm(self, x: str, norm: nn.LayerNorm) -> str:
        scale, bias = self.weight(norm.weight), self.weight(norm.bias)
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.eps)


def _gelu(g: Graph, x: str) -> str:
    erf = g.node("Erf", g.node("Div", x, g.constant(math.sqrt(2))))
    return g.node("Mul", g.node("Mul", x, g.node("Add", erf, g.constant(1))), g.constant(0.5))


def _gelu_tanh(g: Graph, x: str) -> str:
    cube = g.node("Mul", g.node("Mul", x, g.node("Mul", x, x)), g.constant(0.044715))
    tanh = g.node("Tanh", g.node("Mul", g.node("Add", x, cube), g.constant(math.sqrt(2 / math.pi))))
    return g.node("Mul", g.node("Mul", x, g.node("Add", tanh, g.constant(1))), g.constant(0.5))


def _quick_gelu(g: Graph, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", g.node("Mul", x, g.constant(1.702))))


def _silu(g: Graph, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", x))


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": lambda g, x: g.node("Relu", x),
    "silu": _silu,
    "swish": _silu,
    "tanh": lambda g, x: g.node("Tanh", x),
}


def build(model: BertForSequenceClassification, metadata: dict[str, Any]) -> onnx.ModelProto:
    """int64 input_ids, attention_mask and token_type_ids [batch, sequence], padded on the right -> logits [batch, L]"""
    g = Graph()
    hidden = _embeddings(g, model.encoder.embeddings)
    masked = g.node("Sub", g.constant(1), g.node("Cast", "attention_mask", to=TensorProto.FLOAT))
    masked = g.node("Unsqueeze", masked, g.constant([1, 2], np.int64))
    mask = g.node("Mul", masked, g.constant(np.finfo(np.float32).min))  # [batch, 1, 1, sequence]
    layers = list(model.encoder.layers)
    for layer in layers:
        hidden = _layer(g, layer, hidden, mask, model.config.hidden_act, first_only=layer is layers[-1])  # type: ignore[arg-type]
    first = g.node("Squeeze", hidden, g.constant([1], np.int64))  # [batch, H]
    pooled = g.node("Tanh", g.linear(first, model.pooler.dense.weight, model.pooler.dense.bias))
    head = model.classifier
    if head.dense is not None:
        pooled = g.node("Relu", g.linear(pooled, head.dense.weight, head.dense.bias))
    g.nodes.append(helper.make_node("Identity", [g.linear(pooled, head.out.weight, head.out.bias)], ["logits"]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", model.num_labels])
    graph = helper.make_graph(g.nodes, "minibert", inputs, [output], g.weights)
    opset = helper.make_opsetid("", OPSET)
    result = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="minibert")
    helper.set_model_props(result, {key: json.dumps(value) for key, value in metadata.items()})
    return result


def _embeddings(g: Graph, embeddings: Embeddings) -> str:
    length = g.node("Shape", "input_ids", start=1, end=2)
    table = g.weight(embeddings.position_embeddings.weight)
    positions = g.node("Slice", table, g.constant([0], np.int64), length, g.constant([0], np.int64))  # [sequence, H]
    words = g.node("Gather", g.weight(embeddings.word_embeddings.weight), "input_ids")
    types = g.node("Gather", g.weight(embeddings.token_type_embeddings.weight), "token_type_ids")
    return g.norm(g.node("Add", g.node("Add", words, positions), types), embeddings.norm)


def _layer(g: Graph, layer: Layer, hidden: str, mask: str, activation: str, first_only: bool) -> str:
    """[batch, sequence, H] -> the same, or [batch, 1, H] with `first_only`: then only the first token asks."""
    asking = hidden
    if first_only:
        asking = g.node("Slice", hidden, *(g.constant([i], np.int64) for i in (0, 1, 1)))
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    query, key, value = (g.linear(x, w, b) for x, w, b in zip((asking, hidden, hidden), weights, biases, strict=True))
    size = layer.qkv.in_features // layer.heads

    def heads(x: str, order: tuple[int, ...]) -> str:
        return g.node("Transpose", g.node("Reshape", x, g.constant([0, 0, layer.heads, size], np.int64)), perm=order)

    scores = g.node("MatMul", heads(query, (0, 2, 1, 3)), heads(key, (0, 2, 3, 1)))
    scores = g.node("Add", g.node("Div", scores, g.constant(math.sqrt(size))), mask)
    context = g.node("MatMul", g.node("Softmax", scores, axis=-1), heads(value, (0, 2, 1, 3)))
    merged = g.node("Transpose", context, perm=(0, 2, 1, 3))
    context = g.node("Reshape", merged, g.constant([0, 0, layer.heads * size], np.int64))
    projected = g.linear(context, layer.attention_output.weight, layer.attention_output.bias)
    attended = g.norm(g.node("Add", projected, asking), layer.attention_norm)
    expanded = ACTIVATIONS[activation](g, g.linear(attended, layer.intermediate.weight, layer.intermediate.bias))
    return g.norm(
        g.node("Add", g.linear(expanded, layer.output.weight, layer.output.bias), attended), layer.output_norm
    )
