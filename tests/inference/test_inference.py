"""What a loaded classifier answers, against transformers' logits and the definitions: in this process, in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import expit, logit, softmax

import minibert
from minibert.inference.explain import explain
from minibert.problem.problem import MULTI, REGRESSION, SINGLE

TEXTS = ["a good film", "very bad", "call now and win a prize", ""]
LABELS = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}


@pytest.fixture
def saved(tiny: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny classifier of a problem type, with what minibert keeps in config.json."""

    def make(kind: str, **ours: Any) -> Path:
        labels = {"num_labels": 1} if kind == REGRESSION else LABELS
        folder = tiny("BertForSequenceClassification", problem_type=kind, **labels)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"minibert": ours}))
        return folder

    return make


def theirs(folder: Path, texts: list[str]) -> np.ndarray:
    """[n, L] logits of transformers."""
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.double().numpy()


def test_one_label_of_several(saved: Callable[..., Path]) -> None:
    folder = saved(SINGLE, temperature=2.5)
    expected = softmax(theirs(folder, TEXTS) / 2.5, axis=1)
    found = minibert.load(folder, "cpu").predict(TEXTS)
    for prediction, row in zip(found, expected, strict=True):
        assert prediction.label == "xyz"[row.argmax()] and prediction.score == pytest.approx(row.max(), abs=1e-5)
        assert prediction.probabilities == pytest.approx(dict(zip("xyz", row, strict=True)), abs=1e-5)
    plain = minibert.load(folder, "cpu").predict(TEXTS, temperature=False)
    assert [p.score for p in plain] == pytest.approx(softmax(theirs(folder, TEXTS), axis=1).max(1), abs=1e-5)


def test_several_labels_and_the_score_of_the_one_that_was_given(saved: Callable[..., Path]) -> None:
    """Given is what reaches its threshold, not what is most probable; without the temperature, the same."""
    probabilities = expit(theirs(saved(MULTI), TEXTS) / 0.5)
    low, *_ = probabilities.mean(0).argsort()
    thresholds = [0.0 if i == low else 1.0 for i in range(3)]
    folder = saved(MULTI, temperature=0.5, thresholds=thresholds)
    for options in ({}, {"temperature": False}):
        found = minibert.load(folder, "cpu").predict(TEXTS, **options)
        assert [p.label for p in found] == [["xyz"[low]]] * len(TEXTS)
        scale = 0.5 if options else 1.0
        expected = expit(logit(probabilities[:, low]) * scale)
        assert [p.score for p in found] == pytest.approx(expected, abs=1e-5)


def test_labels_given_stay_the_same_without_the_temperature(saved: Callable[..., Path]) -> None:
    """Thresholds move along with the probabilities."""
    middle = np.median(expit(theirs(saved(MULTI), TEXTS) / 3), axis=0)
    classifier = minibert.load(saved(MULTI, temperature=3.0, thresholds=middle.tolist()), "cpu")
    given, plain = (classifier.predict(TEXTS, temperature=wanted) for wanted in (True, False))
    assert [p.label for p in given] == [p.label for p in plain] and 0 < sum(len(p.label) for p in given) < 12


def test_a_number(saved: Callable[..., Path]) -> None:
    folder = saved(REGRESSION)
    found = minibert.load(folder, "cpu").predict(TEXTS)
    assert [p.label for p in found] == pytest.approx(theirs(folder, TEXTS)[:, 0].tolist(), abs=1e-5)
    assert [p.score for p in found] == [p.label for p in found]


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_an_effect_is_the_change_of_the_log_odds(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind, temperature=2.0)
    classifier = minibert.load(folder, "cpu")
    (words,) = explain(classifier, ["good bad film"], None, classifier.logits(["good bad film"]))
    logits = theirs(folder, ["good bad film", " bad film", "good  film", "good bad "])
    scores = {SINGLE: logit(softmax(logits / 2, axis=1)), MULTI: logits / 2, REGRESSION: logits}[kind]
    chosen = scores[0].argmax()
    assert [word.text for word in words] == ["good", "bad", "film"]
    assert [word.effect for word in words] == pytest.approx((scores[0] - scores[1:])[:, chosen], abs=1e-4)
