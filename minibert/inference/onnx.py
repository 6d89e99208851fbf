"""A classifier as an ONNX file: exported by torch from a module on padded input, compared with the original, quantized.

Opset 18, which onnxruntime reads since 2023. Needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from minibert.batching.tokens import Tokens
from minibert.errors import UserError
from minibert.inference.classifier import Classifier
from minibert.model.bert import BertForSequenceClassification, Layer
from minibert.version import __version__

OPSET = 18
TOLERANCE = 1e-4  # of logits up to 1, or of their largest; fp32 against fp32
MAX_FILE_SIZE = 2_000_000_000  # bytes of a protobuf, and so of an ONNX file
BATCH_SIZE = 32
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class PaddedClassifier(nn.Module):
    """`BertForSequenceClassification` in evaluation on [B, S] input; of the last layer only the [CLS] row."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.attention = nn.ModuleList(PaddedAttention(layer) for layer in model.encoder.layers)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Three int64 [B, S], padded on the right -> logits [B, L]"""
        embeddings, layers = self.model.encoder.embeddings, self.model.encoder.layers
        words, types = embeddings.word_embeddings(input_ids), embeddings.token_type_embeddings(token_type_ids)
        hidden = embeddings.norm(words + embeddings.position_embeddings.weight[: input_ids.shape[1]] + types)
        bias = (1 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min  # [B, 1, 1, S]
        for number, (layer, attention) in enumerate(zip(layers, self.attention, strict=True), start=1):
            queries = hidden if number < len(layers) else hidden[:, :1]
            hidden = layer.after_attention(attention(queries, hidden, bias), queries, None)  # type: ignore[operator]
        return self.model.head(hidden[:, 0], None)


class PaddedAttention(nn.Module):
    """A layer's attention on padded rows. The qkv projection is split: int8 is for whole weights, not for slices."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.heads, self.qkv = layer.heads, nn.ModuleList()
        for weight, bias in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True):
            linear = nn.Linear(len(weight), len(weight), device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.qkv.append(linear)

    def forward(self, queries: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
        """[B, Q, H] rows that ask, [B, S, H] rows that answer, [B, 1, 1, S] -> [B, Q, H]"""
        projected = (linear(x) for linear, x in zip(self.qkv, (queries, hidden, hidden), strict=True))
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)  # [B, N, S, D]
        weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5 + bias, -1)
        return (weights @ value).transpose(1, 2).flatten(2)


def export(classifier: Classifier, path: Path) -> str:
    """Write the fp32 graph, run it in onnxruntime on several shapes, and say how far it is from our logits."""
    size = sum(p.numel() * 4 for p in classifier.model.parameters())
    if size > MAX_FILE_SIZE:
        raise UserError(f"{path}: the model has {size / 1e9:.1f} GB, more than one ONNX file can hold")
    problem = classifier.problem
    metadata = {
        "labels": problem.labels,
        "problem_type": problem.kind,
        "thresholds": problem.thresholds,
        "temperature": problem.temperature,
        "max_length": classifier.max_length,
        "minibert": __version__,
    }
    limit = classifier.model.config.max_position_embeddings
    example = tuple(torch.zeros(2, 3, dtype=torch.int64) for _ in INPUTS)
    shape, same = {0: Dim("batch"), 1: Dim("sequence", max=limit)}, {0: Dim.AUTO, 1: Dim.AUTO}
    with _quiet():
        program = torch.onnx.export(
            PaddedClassifier(classifier.model).eval(),
            example,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes=(shape, same, same),
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        program.save(path)
    shapes, largest, difference = verify(classifier.model, path)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(f"{path}: onnxruntime's logits differ from ours by {difference:.2g}; nothing was written")
    named = ", ".join(f"{batch}x{length}" for batch, length in shapes)
    return (
        f"checked in onnxruntime {onnxruntime.__version__} on {named} tokens: logits differ by {difference:.1g} at most"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about what torch and onnxruntime do inside, which no user can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def verify(model: BertForSequenceClassification, path: Path) -> tuple[list[tuple[int, int]], float, float]:
    """(batch sizes and lengths tried, our largest logit, the largest difference), on random ids, padded and not."""
    limit, types = model.config.max_position_embeddings, model.config.type_vocab_size
    shapes = [(1, 1), (1, limit), (2, 7), (3, min(33, limit)), (5, min(128, limit))]
    session, rng = open_session(path), np.random.default_rng(0)
    largest = difference = 0.0
    for batch, length in shapes:
        lengths = rng.integers(1, length + 1, batch)
        lengths[0] = length
        inputs = {
            "input_ids": rng.integers(0, model.config.vocab_size, (batch, length)),
            "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
            "token_type_ids": rng.integers(0, types, (batch, length)),
        }
        theirs = session.run(["logits"], inputs)[0]
        with torch.inference_mode():
            ours = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
        largest = max(largest, float(np.abs(ours).max()))
        difference = float(np.maximum(difference, np.abs(ours - theirs).max()))  # NaN stays
    return shapes, largest, difference


def quantize(source: Path, target: Path) -> None:
    """Weights of matrix products as int8, a scale for each column; activations are rounded at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # 7 bits of range: sums of full 8-bit products overflow on CPUs without VNNI, silently
        quantize_dynamic(source, target, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU that logs errors only."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def session_logits(session: onnxruntime.InferenceSession, tokens: Tokens, *, by_length: bool = True) -> np.ndarray:
    """[texts, L], in batches of texts of similar length or as they come; of windows their mean."""
    order = np.argsort(-tokens.lengths, kind="stable") if by_length else np.arange(len(tokens))
    batches = (order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE))
    logits = np.concatenate([session.run(["logits"], padded(tokens, rows))[0] for rows in batches])
    result = np.empty_like(logits)
    result[order] = logits
    return tokens.mean_of_windows(result)


def padded(tokens: Tokens, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some texts as the [B, S] arrays that the exported graph takes."""
    lengths = tokens.lengths[rows]
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B, S]
    inputs: dict[str, Any] = {"attention_mask": mask.astype(np.int64)}
    for name, flat in (("input_ids", tokens.ids), ("token_type_ids", tokens.type_ids)):
        inputs[name] = np.zeros(mask.shape, np.int64)
        if flat is not None:
            inputs[name][mask] = np.concatenate([flat[tokens.offsets[i] : tokens.offsets[i + 1]] for i in rows])
    return inputs
