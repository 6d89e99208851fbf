"""Long texts in overlapping windows: which tokens, one mean in training and prediction, for pairs and labels too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minibert
from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.inference.logits import compute_logits
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.model.dropout import DropoutMasks
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime.device import choose
from minibert.training.loop import Training

TEXTS = ["a b c", "", " ".join("abcdefghijklmnopqrstuvwxyz"), "z " * 70, "good film"]


@pytest.fixture
def model(tiny: Callable[..., Path]) -> tuple[BertForSequenceClassification, Tokenizer]:
    folder = tiny()
    loaded, _ = load_model(folder, BertForSequenceClassification, num_labels=2, seed=1)
    with torch.no_grad():
        loaded.classifier.out.weight.normal_(0, 0.5)
    return loaded.eval(), Tokenizer.from_folder(folder)


def rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def test_windows_cover_every_token_and_stay_within_the_limit(model: tuple[Any, Tokenizer]) -> None:
    tokenizer = model[1]
    whole = rows(tokenizer.encode(TEXTS, None, 512))
    tokens = tokenizer.encode(TEXTS, None, 12, "window", 4)
    assert tokens.windows is not None and tokens.windows.tolist() == [0, 1, 2, 7, 23, 24]
    assert tokens.lengths.max() == 12 and tokens.texts == 5 and (tokens.truncated == 0).all()
    assert tokens.full_lengths.tolist() == [len(ids) for ids in whole]
    letters = whole[2][1:-1]
    assert [ids[1:-1] for ids in rows(tokens)[2:7]] == [letters[start : start + 10] for start in (0, 4, 8, 12, 16)]
    for text, ids in enumerate(whole):
        windows = rows(tokens)[tokens.windows[text] : tokens.windows[text + 1]]
        assert all(w[0] == ids[0] and w[-1] == ids[-1] for w in windows)
        assert windows[-1][1:-1] == ids[1:-1][-10:] and windows[0][1:-1] == ids[1:-1][:10]


def test_texts_that_fit_are_encoded_as_ever(model: tuple[Any, Tokenizer]) -> None:
    for pairs in (None, ["x y", "a", "", "b", "c"]):
        head, window = (model[1].encode(TEXTS, pairs, 100, how) for how in ("head", "window"))
        assert np.array_equal(head.ids, window.ids) and np.array_equal(head.offsets, window.offsets)
        assert np.array_equal(head.lengths, window.text_lengths)
        assert pairs is None or np.array_equal(head.type_ids, window.type_ids)


def test_of_a_pair_the_longer_text_is_windowed_and_the_other_stands_in_each(model: tuple[Any, Tokenizer]) -> None:
    long, short = "a b c d e f g h i j k l", "x y"
    for texts, pairs, first in (([long], [short], False), ([short], [long], True)):
        tokens = model[1].encode(texts, pairs, 10, "window", 3)
        assert tokens.type_ids is not None and tokens.lengths.max() == 10
        decoded = [model[1].backend.decode(ids, skip_special_tokens=False) for ids in rows(tokens)]
        kept = [text.split("[SEP]")[0 if first else 1].replace("[CLS]", "").strip() for text in decoded]
        assert set(kept) == {"x y"} and len(kept) == 4
        assert tokens.full_lengths.tolist() == [17] and tokens.truncated.tolist() == [0]
    both = model[1].encode(["a " * 50], ["b " * 40], 23, "window", 5)
    assert both.truncated.tolist() == [30] and both.full_lengths.tolist() == [93] and both.lengths.max() == 23


def test_evaluation_is_the_mean_over_windows_computed_one_by_one(model: tuple[Any, Tokenizer]) -> None:
    bert, tokenizer = model
    tokens = tokenizer.encode(TEXTS, None, 12, "window", 5)
    dataset = Dataset(tokens, np.zeros(len(TEXTS), dtype=np.int64))
    hardware = choose(RunConfig(device="cpu"))
    assert tokens.windows is not None
    with torch.no_grad():
        each = [bert(torch.tensor([ids])).logits[0].numpy() for ids in rows(tokens)]
        whole_batch = bert.logits(dataset.batch(np.array([3, 0, 2]))).numpy()
    bounds = list(zip(tokens.windows, tokens.windows[1:], strict=False))
    expected = np.stack([np.mean(each[a:b], axis=0) for a, b in bounds])
    assert np.abs(compute_logits(bert, dataset, hardware) - expected).max() < 1e-5
    assert np.abs(whole_batch - expected[[3, 0, 2]]).max() < 1e-5
    taken = dataset.take(np.array([2, 4]))
    assert np.abs(compute_logits(bert, taken, hardware) - expected[[2, 4]]).max() < 1e-5


def test_training_learns_from_the_loss_of_the_mean_in_parts_that_fit(model: tuple[Any, Tokenizer]) -> None:
    bert, tokenizer = model
    tokens = tokenizer.encode(TEXTS, None, 12, "window", 5)
    targets = np.array([0, 1, 0, 1, 1])
    config = RunConfig(batch_size=5, epochs=1, max_length=12, truncation="window", device="cpu", validation_split=0)
    problem = Problem(SINGLE, ["a", "b"])
    training = Training(bert, problem, {"train": Dataset(tokens, targets)}, config, choose(config))
    (step,) = training.steps_of_epoch(0)
    assert len(step.batches) > 1 and step.denominator == 5  # 60 tokens a batch, and the long text alone has more
    gradients = []
    for batches in (step.batches, [np.arange(5)]):
        bert.zero_grad()
        for batch in batches:
            x = training.data["train"].batch(batch)
            loss = problem.loss_sum(bert.logits(x), torch.from_numpy(targets[batch]), None, 0.0) / 5
            loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in bert.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6) and gradients[0].abs().max() > 1e-3
    x = training.data["train"].batch(np.arange(5))
    assert bert.logits(x, DropoutMasks(0, 0)).shape == (5, 2)


@pytest.mark.parametrize("freeze", ["none", "1", "all"])
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_run_with_windows_predicts_the_same_from_its_folder(
    tiny: Callable[..., Path], tmp_path: Path, freeze: str, kind: str
) -> None:
    filler = "the of and very not is was " * 6
    texts: list[Any] = [f"{filler if i % 3 else ''} {'win prize' if i % 2 else 'see you'} {i}" for i in range(48)]
    labels: list[Any] = ["spam" if i % 2 else "ham" for i in range(48)]
    if kind == "pairs":
        texts = [(f"call {i}", text) for i, text in enumerate(texts)]
    else:
        labels = [[label, "long"] if i % 3 else [label] for i, label in enumerate(labels)]
    output = tmp_path / "run"
    flags: dict[str, Any] = {"model": str(tiny()), "epochs": 1, "batch_size": 8, "quiet": True, "freeze": freeze}
    clf = minibert.finetune(
        texts, labels, truncation="window", max_length=16, window_stride=5, output=str(output), **flags
    )
    saved = json.loads((output / "config.json").read_text())["minibert"]
    assert (saved["truncation"], saved["window_stride"], saved["max_length"]) == ("window", 5, 16)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["reload_max_difference"] < 1e-5
    again = minibert.load(output)
    assert np.abs(again.logits(texts) - clf.logits(texts)).max() < 1e-5
    assert again.embed(texts[:5]).shape == (5, 32) and np.isfinite(again.embed(texts[:5])).all()
    head = replace(again, truncation="head")
    assert np.abs(head.logits(texts) - again.logits(texts)).max() > 1e-4  # what lies beyond 16 tokens is read


def test_strides_that_make_no_sense_are_errors(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="only with --truncation window"):
        RunConfig(window_stride=4)
    with pytest.raises(UserError, match="window_stride=31: windows hold 30 tokens"):
        texts, labels = [f"a {i}" for i in range(40)], ["x", "y"] * 20
        minibert.finetune(
            texts, labels, model=str(tiny()), truncation="window", max_length=32, window_stride=31, quiet=True
        )
