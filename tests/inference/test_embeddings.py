"""Sentence embeddings of each pooling against transformers, also of long texts in windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minibert.inference.classifier import POOLINGS, load_encoder

TEXTS = ["a b c", " ".join("abcdefghijklmnopqrstuvwxyz"), "z " * 40, "good film"]


def theirs(model: transformers.BertModel, ids: list[int], pooling: str) -> np.ndarray:
    """[H] of one row of tokens."""
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    hidden = output.last_hidden_state[0]  # [S, H]
    return {"mean": hidden.mean(0), "cls": hidden[0], "pooler": output.pooler_output[0]}[pooling].numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("windows", [False, True], ids=["head", "windows"])
def test_embeddings_equal_transformers(tiny: Callable[..., Path], pooling: str, windows: bool) -> None:
    """A text in windows has the mean of their embeddings."""
    folder = tiny()
    encoder = replace(load_encoder(folder, "cpu"), max_length=12)
    if windows:
        encoder = replace(encoder, truncation="window", window_stride=5)
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens = encoder.encode(TEXTS)
    rows = [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.offsets)]
    each = [theirs(model, row, pooling) for row in rows]
    bounds = range(len(TEXTS) + 1) if tokens.windows is None else tokens.windows.tolist()
    assert len(each) > 10 if windows else len(each) == 4
    expected = np.stack([np.mean(each[a:b], axis=0) for a, b in itertools.pairwise(bounds)])
    assert np.abs(encoder.embed(TEXTS, pooling=pooling) - expected).max() < 1e-5
