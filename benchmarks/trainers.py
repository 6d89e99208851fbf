"""The trainers that the benchmarks compare: transformers as tutorials use it and at its best, minibert, and minibert
with each of its savings switched off. All start from the same weights and see the same examples.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.config import RunConfig
from minibert.model import packing
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.model.dropout import DropoutMasks
from minibert.problem.problem import SINGLE, Problem
from minibert.runs.setup import demo_weights
from minibert.runtime.device import choose
from minibert.training.compact_vocabulary import CompactVocabulary
from minibert.training.loop import Training
from minibert.training.plan import planned_batches

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 32
LEARNING_RATE = 5e-5
CONFIG = RunConfig(device="cpu", batch_size=BATCH, quiet=True)


@dataclass
class Texts:
    """The benchmark's data: real messages with 0/1 labels."""

    texts: list[str]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Texts:
        return Texts([self.texts[i] for i in rows], self.labels[rows])


def sms_spam() -> Texts:
    """5,572 short messages; read in place, never copied."""
    with open(SHARED / "sms_spam" / "spamdata_v2.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Texts([row["text"] for row in rows], np.array([int(row["label"]) for row in rows]))


Step = Callable[[], None]


def transformers_steps(data: Texts, kind: str, dropout: float | None = None, bf16: str = "") -> Iterator[Step]:
    """Steps of a plain torch loop over transformers' model; `kind` says how texts are padded and batched.

    "175" and "128" pad every text to that length, "dynamic" to the longest of a random batch, "grouped" to the
    longest of a batch of like length, with fused AdamW; "compiled" is "grouped" under torch.compile; "same" has the
    very batches that minibert trains on, with fused AdamW. bf16: "products" by torch's switch for oneDNN's fp32
    products, which are then in bf16, or "autocast".
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = AutoModelForSequenceClassification.from_pretrained(
        demo_weights(), num_labels=2, attn_implementation="sdpa", **options
    ).train()
    tokenizer = AutoTokenizer.from_pretrained(demo_weights())
    fixed = int(kind) if kind.isdecimal() else None
    if bf16 == "products":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    encoded = [
        tokenizer(text, truncation=True, max_length=fixed or 512, padding="max_length" if fixed else False)
        for text in data.texts
    ]
    grouped = kind in ("grouped", "compiled")
    if kind == "compiled":
        model = torch.compile(model, dynamic=True)
    optimizer = transformers_optimizer(model, fused=grouped or kind == "same")
    order = np.random.default_rng(0).permutation(len(data.texts))
    if grouped:
        order = order[np.argsort([len(encoded[i]["input_ids"]) for i in order], kind="stable")]
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    if kind == "same":
        lengths = np.array([len(row["input_ids"]) for row in encoded])
        batches = planned_batches(lengths, CONFIG)

    def step(rows: np.ndarray) -> None:
        inputs = tokenizer.pad([encoded[i] for i in rows], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 == "autocast"):
            loss = model(**inputs, labels=torch.from_numpy(data.labels[rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for i in np.random.default_rng(1).permutation(len(batches)):
        yield lambda rows=batches[i]: step(rows)  # type: ignore[misc]


def transformers_optimizer(model: torch.nn.Module, fused: bool, learning_rate: float = LEARNING_RATE) -> Any:
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def minibert_training(data: Texts, off: str = "", config: RunConfig = CONFIG) -> Training:
    """A `Training` as `python -m minibert.finetune` makes it, without the saving named by `off`."""
    model, _ = load_model(demo_weights(), BertForSequenceClassification, num_labels=2)
    model.cls_only = off != "CLS-only last layer"
    tokens = Tokenizer.from_folder(Path(demo_weights())).encode(data.texts, None, 512)
    if off != "compact vocabulary":
        CompactVocabulary(model, [tokens])
    if off == "dropout":
        for layer in model.encoder.layers:
            layer.dropout = layer.attention_dropout = 0.0
        model.encoder.embeddings.dropout = model.classifier.dropout = 0.0
    return Training(model, Problem(SINGLE, ["0", "1"]), {"train": Dataset(tokens, data.labels)}, config, choose(config))


def minibert_steps(data: Texts, off: str = "", config: RunConfig = CONFIG) -> Iterator[Step]:
    training = minibert_training(data, off, config)
    for step in training.steps_of_epoch(0):
        yield lambda step=step: plainly(off, lambda: training.step(step))  # type: ignore[misc]


def plainly(off: str, call: Callable[[], Any]) -> None:
    """Run with torch's own dropout or attention in the place of ours."""
    if off == "bulk dropout":
        draw = DropoutMasks.draw
        DropoutMasks.draw = bernoulli_draw  # type: ignore[method-assign]
        try:
            call()
        finally:
            DropoutMasks.draw = draw  # type: ignore[method-assign]
    elif off == "attention chunks":
        area, spread = packing.CHUNK_AREA, packing.CHUNK_SPREAD
        packing.CHUNK_AREA, packing.CHUNK_SPREAD = 1 << 40, 1e9
        try:
            call()
        finally:
            packing.CHUNK_AREA, packing.CHUNK_SPREAD = area, spread
    else:
        call()


def bernoulli_draw(self: DropoutMasks, shape: Any, p: float, like: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What torch's dropout does on a CPU: one number at a time."""
    return torch.empty(tuple(shape), dtype=like.dtype).bernoulli_(1 - p), 1 / (1 - p)


TRAINERS: dict[str, Callable[[Texts], Iterator[Step]]] = {
    "transformers, padded to 175": lambda data: transformers_steps(data, "175"),
    "transformers, padded to 128": lambda data: transformers_steps(data, "128"),
    "transformers, dynamic padding": lambda data: transformers_steps(data, "dynamic"),
    "transformers, best": lambda data: transformers_steps(data, "grouped"),
    "transformers, best, compiled": lambda data: transformers_steps(data, "compiled"),
    "transformers, our batches": lambda data: transformers_steps(data, "same"),
    "transformers, our batches, bf16 products": lambda data: transformers_steps(data, "same", bf16="products"),
    "transformers, our batches, bf16 autocast": lambda data: transformers_steps(data, "same", bf16="autocast"),
    "transformers, best, bf16 autocast": lambda data: transformers_steps(data, "grouped", bf16="autocast"),
    "minibert": lambda data: minibert_steps(data),
    "minibert, MKL products": lambda data: minibert_steps(data, config=replace(CONFIG, onednn=False)),
    "minibert, bf16": lambda data: minibert_steps(data, config=replace(CONFIG, precision="bf16")),
}
SAVINGS = (
    "CLS-only last layer",
    "compact vocabulary",
    "bulk dropout",
    "attention chunks",
    "dropout",
)
TRAINERS["minibert, batches of like length"] = lambda data: minibert_steps(
    data, config=replace(CONFIG, length_buckets=True)
)
TRAINERS["minibert, compiled"] = lambda data: minibert_steps(data, config=replace(CONFIG, engine="compile"))
TRAINERS |= {f"minibert without {off}": lambda data, off=off: minibert_steps(data, off) for off in SAVINGS}
