"""Batches of real texts, and the models that train on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens, offsets_of
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import save_model
from minibert.model.config import BertConfig

from .texts import TOKENIZER_FILES, VOCABULARY_SIZE, Corpus, load_corpus

SIZES = {"base": (768, 12), "large": (1024, 24)}  # hidden size, layers
SMOKE_SIZES = {"base": (64, 1), "large": (64, 2)}
LONGEST = 512  # tokens


@dataclass(frozen=True)
class Setting:
    """What all rows of a call share."""

    scratch: Path
    packed: Path | None = None
    smoke: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def corpus(self) -> Corpus:
        return load_corpus(self.packed, self.scratch)


@dataclass(frozen=True)
class Workload:
    """Texts in random batches; after `steps` steps each has been seen once, where batches are by number of texts."""

    texts: int  # in a batch
    steps: int
    length: int | None = None  # tokens of every text, which is cut from joined sentences; None: the sentences
    mixed: bool = False  # lengths from 8 to `length`, most of them short
    batch_tokens: int | None = None  # in place of `texts`
    buckets: bool = False  # batches of texts of like length

    def tiny(self) -> Workload:
        length = None if self.length is None else max(8, self.length // 8)
        return replace(self, texts=4, steps=2, length=length, batch_tokens=self.batch_tokens and 64)


SENTENCES = Workload(32, 50)
SENTENCES_SORTED = Workload(32, 50, buckets=True)
TEXTS_128 = Workload(32, 50, 128)
TEXTS_128_LARGE_BATCH = Workload(128, 10, 128)
TEXTS_512 = Workload(32, 10, 512)
MANY_SENTENCES = Workload(1024, 6)
MIXED = Workload(200, 10, LONGEST, mixed=True, batch_tokens=1 << 14, buckets=True)


@dataclass(frozen=True)
class Encoded:
    """The texts of a workload."""

    tokens: Tokens
    labels: np.ndarray  # [texts] int64, random: speed does not depend on them
    occurring: np.ndarray  # ids that the whole corpus holds


def encode(setting: Setting, workload: Workload) -> Encoded:
    corpus = setting.corpus()
    sentences = Tokenizer.from_folder(corpus.tokenizer).encode(corpus.texts(), None, LONGEST)
    count = workload.texts * workload.steps
    rng = np.random.default_rng(0)
    if workload.length is None:
        tokens = sentences.take(np.resize(rng.permutation(len(sentences)), count))
    else:
        tokens = cut_joined(sentences, lengths_of(workload, count, rng))
    return Encoded(tokens, rng.integers(0, 2, count), np.unique(sentences.ids))


def lengths_of(workload: Workload, count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each text, [CLS] and [SEP] included: all equal, or log-normal as real mixtures are."""
    assert workload.length is not None
    if not workload.mixed:
        return np.full(count, workload.length)
    return rng.lognormal(np.log(workload.length / 5), 0.9, count).astype(np.int64).clip(8, workload.length)


def cut_joined(sentences: Tokens, lengths: np.ndarray) -> Tokens:
    """Texts of exactly these lengths: sentences one behind another, repeated where they end, cut anywhere."""
    cls, sep = sentences.ids[0], sentences.ids[-1]
    stream = sentences.ids[(sentences.ids != cls) & (sentences.ids != sep)]
    offsets = offsets_of(lengths)
    ids = np.resize(stream, offsets[-1])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = cls, sep
    return Tokens(ids, offsets, None, np.zeros(len(lengths), np.int32))


def bert_config(setting: Setting, size: str) -> BertConfig:
    hidden, layers = (SMOKE_SIZES if setting.smoke else SIZES)[size]
    source = {
        "model_type": "bert",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    return BertConfig.from_dict(source)


def random_model(setting: Setting, size: str) -> BertForSequenceClassification:
    """Random weights, on the CPU: a GPU's speed does not depend on them. They are drawn on the GPU, which is faster."""
    with setting.device:
        model = BertForSequenceClassification(bert_config(setting, size), 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
    model = model.cpu()
    if setting.device.type == "cuda":  # what training will take is measured from here
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def random_model_folder(setting: Setting, size: str) -> Path:
    """The same as a folder, with the corpus's tokenizer, for commands."""
    folder, corpus = setting.scratch / size, setting.corpus()
    save_model(folder, random_model(setting, size), ["0", "1"])
    for name in TOKENIZER_FILES:
        if (corpus.tokenizer / name).exists():
            (folder / name).write_bytes((corpus.tokenizer / name).read_bytes())
    return folder


def tflops(setting: Setting, size: str, encoded: Encoded, tokens_per_second: float) -> float:
    """Rate of the layers' matrix products of real tokens, forward and backward, for texts of these lengths."""
    config, lengths = bert_config(setting, size), encoded.tokens.lengths
    layers, hidden = config.num_hidden_layers, config.hidden_size
    flop = 72 * layers * hidden**2 * lengths.sum() + 12 * layers * hidden * (lengths**2).sum()
    return round(float(flop / lengths.sum()) * tokens_per_second / 1e12, 2)
