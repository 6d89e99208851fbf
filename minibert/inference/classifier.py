"""A trained model as people use it: texts in, labels with probabilities out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from minibert.batching.dataset import Dataset, collate
from minibert.batching.plans import plan_evaluation
from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens
from minibert.config import PROBLEM_TYPES, TRUNCATIONS, RunConfig
from minibert.data.examples import as_texts, examples_from_lists
from minibert.errors import UserError
from minibert.filenames import METRICS
from minibert.inference.hub import push
from minibert.inference.logits import check_finite, compute_logits
from minibert.inference.stream import check_labels_known, with_known_labels
from minibert.messages import messages_in_python
from minibert.model.bert import BertForSequenceClassification, BertModel
from minibert.model.checkpoint import OWN_HEAD, load_model, model_folder, save_model
from minibert.model.config import BertConfig
from minibert.model.packing import PackedInput
from minibert.problem.problem import LABEL_TYPES, REGRESSION, SINGLE, Calibration, Problem
from minibert.runtime.ambient import allow_fork, default_torch_state, no_autocast, one_thread
from minibert.runtime.device import Hardware, choose, fit_attention
from minibert.runtime.files import read_json
from minibert.runtime.memory import split_on_oom

POOLINGS = ("mean", "cls", "pooler")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text: the label (a list of labels if multi-label, a number if regression)."""

    label: Any
    score: float  # probability of the label; the value itself if regression
    probabilities: dict[Any, float]  # by label


@dataclass(repr=False)
class TextEncoder:
    """A BERT with its tokenizer: sentence embeddings, with or without a classification head."""

    model: BertModel | BertForSequenceClassification
    tokenizer: Tokenizer
    max_length: int
    truncation: str
    hardware: Hardware
    window_stride: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        allow_fork()

    def __repr__(self) -> str:
        size, device = self.model.config.hidden_size, self.hardware.device
        return f"TextEncoder({size} dimensions, texts up to {self.max_length} tokens, on {device})"

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tokens:
        if pairs is not None:
            check_pairs(self.model.config)
        return self.tokenizer.encode(texts, pairs, self.max_length, self.truncation, self.window_stride)

    def embed(self, texts: Iterable[Any], pairs: Sequence[str] | None = None, pooling: str = "mean") -> np.ndarray:
        """[n, hidden_size] float32: the mean of a text's token rows, its [CLS] row, or BERT's pooler output."""
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r}: give one of {', '.join(POOLINGS)}")
        tokens = self.encode(*as_texts(texts, pairs))
        vectors = np.empty((len(tokens), self.model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode(), self.hardware.computing(), no_autocast(), self.hardware.autocast():

            def computed(rows: np.ndarray) -> np.ndarray:
                x = self.hardware.place(collate(tokens, rows))
                return pooled(self.model, x, pooling).float().cpu().numpy()

            plan = plan_evaluation(tokens.lengths, batch_tokens=self.hardware.evaluation_tokens)
            for rows, found in split_on_oom(plan, computed):
                vectors[rows] = found
        return tokens.mean_of_windows(vectors)


def pooled(model: BertModel | BertForSequenceClassification, x: PackedInput, pooling: str) -> Tensor:
    """Packed input -> [B, H]"""
    if pooling == "mean":
        hidden = model.encoder(x, None).float()  # [T, H]
        lengths = x.packing.cu_seqlens.diff().long()
        owner = torch.repeat_interleave(lengths)  # [T] the text of each token
        return hidden.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, owner, hidden) / lengths[:, None]
    first = model.encoder.first_tokens(x, None)
    return model.pooler(first) if pooling == "pooler" else first


@dataclass(repr=False)
class Classifier(TextEncoder):
    """A trained classifier: model, tokenizer and what the labels are, with the metrics of its run where there was one.

    Labels have the type in which they were given for training. Messages of `UserError` name keywords, not flags.
    """

    model: BertForSequenceClassification
    problem: Problem
    folder: Path | None = field(default=None, kw_only=True)  # where it was written or loaded
    metrics: dict[str, Any] = field(default_factory=dict, kw_only=True)  # as in metrics.json

    @property
    def labels(self) -> list[Any]:
        """In the order of the columns of logits and probabilities."""
        return [self.problem.as_given(name) for name in self.problem.labels]

    def __repr__(self) -> str:
        labels = ", ".join(self.problem.labels[:6]) + (", ..." if len(self.problem.labels) > 6 else "")
        scores = [f"{split} {name} {value:.4f}" for split, name, value in self._scores()[:1]]
        where = [] if self.folder is None else [str(self.folder)]
        length = f"texts up to {self.max_length} tokens"
        return f"Classifier({'; '.join([f'{self.problem.kind}: {labels}', *scores, length, *where])})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the same, with all scores in a table."""
        rows = "".join(
            f"<tr><td>{split}</td><td>{name}</td><td>{value:.4f}</td></tr>" for split, name, value in self._scores()
        )
        table = f"<table><tr><th>rows</th><th>metric</th><th>value</th></tr>{rows}</table>" if rows else ""
        return f"<div>{escape(repr(self))}{table}</div>"

    def _scores(self) -> list[tuple[str, str, float]]:
        """(split, metric, value), the test rows and the metric that chooses weights first."""
        found = []
        for split in ("test", "validation"):
            values = {name: value for name, value in self.metrics.get(split, {}).items() if isinstance(value, float)}
            order = sorted(values, key=lambda name: name != self.problem.default_metric)
            found += [(split, name, values[name]) for name in order]
        return found

    def logits(self, texts: Iterable[Any], pairs: Sequence[str] | None = None) -> np.ndarray:
        """[n, num_labels] float32, in the order of `texts`; a text may be a (first, second) tuple."""
        with messages_in_python(), no_autocast():
            tokens = self.encode(*as_texts(texts, pairs))
            return check_finite(compute_logits(self.model, Dataset(tokens, np.zeros(tokens.texts)), self.hardware))

    def predict_proba(
        self, texts: Iterable[Any], pairs: Sequence[str] | None = None, temperature: bool = True
    ) -> np.ndarray:
        """[n, num_labels] probabilities, columns in the order of `labels`; of regression, the values themselves."""
        return self._problem(temperature).probabilities(self.logits(texts, pairs))

    def _problem(self, temperature: bool) -> Problem:
        return self.problem if temperature else self.problem.without_temperature()

    @overload
    def predict(self, texts: str, pairs: str | None = None, temperature: bool = True) -> Prediction: ...

    @overload
    def predict(
        self, texts: Iterable[Any], pairs: Sequence[str] | None = None, temperature: bool = True
    ) -> list[Prediction]: ...

    def predict(
        self, texts: str | Iterable[Any], pairs: str | Sequence[str] | None = None, temperature: bool = True
    ) -> Prediction | list[Prediction]:
        """A `Prediction` for each text, or for the one; `temperature=False`: probabilities as trained, same labels."""
        if isinstance(texts, str):
            return self.predict([texts], None if pairs is None else [str(pairs)], temperature)[0]
        problem = self._problem(temperature)
        probabilities = problem.probabilities(self.logits(texts, pairs))
        decisions = map(problem.as_given, problem.decisions(probabilities))
        scores = probabilities[np.arange(len(probabilities)), problem.top_label(probabilities)]
        labels = self.labels
        return [
            Prediction(decision, float(score), dict(zip(labels, map(float, row), strict=True)))
            for decision, score, row in zip(decisions, scores, probabilities, strict=True)
        ]

    def evaluate(self, texts: Iterable[Any], labels: Iterable[Any]) -> dict[str, Any]:
        """The metrics of the predictions for `texts`, as metrics.json has them for a test file."""
        with messages_in_python():
            splits, columns = examples_from_lists({"test": (texts, labels)})
            examples = with_known_labels(splits["test"], columns, self.problem, RunConfig())
            check_labels_known(examples, self.problem)
        targets = self.problem.targets(examples.labels or [])
        return self.problem.metrics(self.logits(examples.texts, examples.pairs), targets)

    def push_to_hub(self, name: str, private: bool | None = None) -> str:
        """Upload model, card and metrics of its folder, but no texts, to the Hugging Face Hub; returns the address."""
        with messages_in_python():
            if self.folder is None:
                raise UserError("push_to_hub: this model has no folder; save it, and load it from there")
            return push(self.folder, name, private)

    def save(self, folder: str | Path) -> None:
        """Write a model folder that transformers and `minibert.load` read; a warning where transformers cannot."""
        self.write(folder)
        if self.model.mlp_size:
            warnings.warn(OWN_HEAD, stacklevel=2)

    def write(self, folder: str | Path) -> None:
        """What `save` writes."""
        folder = Path(os.path.expanduser(folder))
        save_model(
            folder,
            self.model,
            self.problem.labels,
            problem_type=self.problem.kind,
            max_length=self.max_length,
            truncation=self.truncation,
            window_stride=self.window_stride,
            thresholds=list(self.problem.thresholds),
            temperature=self.problem.temperature,
            label_type=self.problem.label_type,
        )
        self.tokenizer.save(folder, self.max_length)


@one_thread()
@default_torch_state()
def load(folder: str | Path, device: str = "auto", temperature: bool = True) -> Classifier:
    """Load a folder that `finetune` or `Classifier.save` wrote, or any BERT classifier in transformers' form.

    `temperature=False` leaves out the saved temperature: probabilities as trained, same labels.
    """
    path = model_folder(folder)
    model, report = load_model(path, BertForSequenceClassification)
    if any(name.startswith("classifier.") for name in report.new):
        raise UserError(f"{folder}: this model has no classification head; train one with python -m minibert.finetune")
    if report.new:
        raise UserError(f"{folder}: lacks {report.new[0]}; give a classifier of texts, or train one on this model")
    hardware = _hardware(device, model.config)
    tokenizer = fitting_tokenizer(path, path, model.config)
    ours = _saved_settings(model.config)
    problem = _saved_problem(model.config, model.num_labels, ours, path)
    problem = problem if temperature else problem.without_temperature()
    length, truncation, stride = _saved_length(model.config)
    model.to(hardware.device)
    metrics = read_json(path / METRICS) if (path / METRICS).is_file() else {}
    return Classifier(
        *(model, tokenizer, length, truncation, hardware, problem),
        window_stride=stride,
        folder=path,
        metrics=metrics if isinstance(metrics, dict) else {},
    )


@one_thread()
@default_torch_state()
def load_encoder(folder: str | Path, device: str = "auto", max_length: int | None = None) -> TextEncoder:
    """Load any BERT for embeddings; `max_length` in tokens, default as trained, or 512 or the model's limit."""
    path = model_folder(folder)
    model, _ = load_model(path, BertModel)
    hardware = _hardware(device, model.config)
    length, truncation, stride = _saved_length(model.config)
    if max_length is not None and not 8 <= max_length <= model.config.max_position_embeddings:
        raise UserError(f"--max-length {max_length}: give 8 to {model.config.max_position_embeddings}")
    tokenizer = fitting_tokenizer(path, path, model.config)
    model.to(hardware.device)
    return TextEncoder(model, tokenizer, max_length or length, truncation, hardware, window_stride=stride)


def _hardware(device: str, config: BertConfig) -> Hardware:
    """Where and how a model that is not trained computes."""
    flags, longest = RunConfig(device=device, engine="eager"), config.max_position_embeddings
    return fit_attention(choose(flags), flags, config.hidden_size // config.num_attention_heads, longest, longest)


def fitting_tokenizer(folder: Path, model: Path, config: BertConfig) -> Tokenizer:
    """The tokenizer of a folder, all of whose ids the model knows."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            f"use the tokenizer of {model}"
        )
    return tokenizer


def check_pairs(config: BertConfig) -> None:
    """UserError for a model that cannot tell the texts of a pair apart."""
    if config.type_vocab_size < 2:
        raise UserError("this model reads single texts (its type_vocab_size is 1); join the two, or take another model")


def _saved_settings(config: BertConfig) -> dict[str, Any]:
    """What minibert put into config.json, or nothing for another's model."""
    ours = config.source.get("minibert")
    return ours if isinstance(ours, dict) else {}


def _saved_length(config: BertConfig) -> tuple[int, str, int | None]:
    """max_length, truncation and window_stride as trained."""
    ours = _saved_settings(config)
    length, limit = ours.get("max_length"), config.max_position_embeddings
    truncation = ours.get("truncation")
    if not (isinstance(length, int) and 8 <= length <= limit):
        length = min(512, limit)
    stride = ours.get("window_stride")
    stride = stride if isinstance(stride, int) and stride > 0 else None
    return length, truncation if truncation in TRUNCATIONS else "head", stride


def _saved_problem(config: BertConfig, num_labels: int, ours: dict[str, Any], folder: Path) -> Problem:
    kind = config.source.get("problem_type") or (REGRESSION if num_labels == 1 else SINGLE)
    if kind not in PROBLEM_TYPES:
        raise UserError(f"{folder}/config.json: problem_type {kind!r} is not one of {', '.join(PROBLEM_TYPES)}")
    labels = saved_labels(config, num_labels)
    if len(set(labels)) < len(labels):
        raise UserError(f"{folder}/config.json: id2label gives two labels the same name")
    thresholds, temperature = ours.get("thresholds", []), ours.get("temperature", 1.0)
    if not isinstance(thresholds, list) or len(thresholds) not in (0, num_labels) or not all(map(_number, thresholds)):
        raise UserError(f"{folder}/config.json: thresholds are not a number for each label")
    if not _number(temperature) or temperature <= 0:
        raise UserError(f"{folder}/config.json: temperature {str(temperature)[:40]} is not a positive number")
    return Problem(kind, labels, Calibration(float(temperature), tuple(thresholds)), _saved_label_type(ours, labels))


def _saved_label_type(ours: dict[str, Any], labels: list[str]) -> str:
    """What labels were before they became names; text where the names are not of that type."""
    kind = str(ours.get("label_type", "str"))
    try:
        for label in labels:
            LABEL_TYPES[kind](label)
    except (KeyError, ValueError):
        return "str"
    return kind


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


def saved_labels(config: BertConfig, num_labels: int) -> list[str]:
    """The label names of config.json by number, LABEL_0, LABEL_1, ... where it has none."""
    names = config.source.get("id2label")
    names = names if isinstance(names, dict) else {}
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(num_labels)]
