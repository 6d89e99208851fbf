"""What a model is: the fields of config.json. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minibert.errors import UserError
from minibert.runtime.files import read_json

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "swish", "tanh")
MOST_LAYERS, MOST_LABELS = 512, 1 << 16  # more is a broken or hostile config.json


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The architecture, under the names config.json uses; `source` keeps every other field for the way back."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
                raise UserError(f"{name} must be a positive whole number, not {value!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"{name} must be a number from 0 to 1, not {value!r}")
        if self.num_hidden_layers > MOST_LAYERS:
            raise UserError(f"num_hidden_layers {self.num_hidden_layers}: at most {MOST_LAYERS}")
        dropout = self.classifier_dropout
        if dropout is not None and (not isinstance(dropout, int | float) or not 0 <= dropout < 1):
            raise UserError(f"classifier_dropout must be a number from 0 to 1, not {dropout!r}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")

    @property
    def head_dropout_prob(self) -> float:
        """Dropout before the classifier, as transformers chooses it."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> BertConfig:
        """Check that `source` (a parsed config.json) describes a BERT, and keep the fields that we compute with."""
        refuse_other_architectures(source)
        names = [f.name for f in dataclasses.fields(cls) if f.name != "source"]
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name != "source"]
        missing = [name for name in required if name not in source]
        if missing:
            raise UserError(f"no {', '.join(missing)} given")
        return cls(**{name: source[name] for name in names if name in source}, source=dict(source))

    @classmethod
    def from_file(cls, path: Path) -> BertConfig:
        source = read_json(path)
        if not isinstance(source, dict):
            raise UserError(f"{path}: expected a JSON object")
        try:
            return cls.from_dict(source)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def refuse_other_architectures(source: Mapping[str, Any]) -> None:
    """Only what computes as BERT does may load: a half-fitting architecture would train, badly."""
    model_type = source.get("model_type", "bert")
    if model_type != "bert":
        raise UserError(
            f"model_type {model_type!r} is not supported: minibert trains BERT checkpoints only "
            "(model_type 'bert': BERT, MiniLM, TinyBERT, BGE, E5, multilingual BERT)"
        )
    positions = source.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UserError(f"position_embedding_type {positions!r} is not supported: only 'absolute' is")
    for flag in ("is_decoder", "add_cross_attention"):
        if source.get(flag):
            raise UserError(f"{flag} is set: minibert trains BERT encoders only")
