"""A new head starts as the linear probe of the encoder's features, in plain BERT's own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import minibert
from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.config import RunConfig
from minibert.inference.logits import compute_logits
from minibert.model.averaging_layer import add_averaging_layer
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime.device import choose
from minibert.training.head_start import STRAIGHT, HeadStart, sampled_rows
from minibert.training.linear_probe import Rows, fit_linear_probe

WORDS = "film book money win prize good bad spam free call see you".split()
CPU = choose(RunConfig(device="cpu"))


def texts(n: int = 60, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 14))) for _ in range(n)]


def targets(kind: str, given: list[str]) -> np.ndarray:
    counts = np.array([[text.split().count(word) for word in ("good", "bad", "film")] for text in given])
    if kind == SINGLE:
        return counts.argmax(1)
    return (counts > 0).astype(np.float32) if kind == MULTI else (3 * counts[:, 0] + 40).astype(np.float32)


def started(
    folder: Path, kind: str = SINGLE, mlp_size: int = 0, truncation: str = "head", pairs: bool = False
) -> tuple[BertForSequenceClassification, Dataset, Problem]:
    """A model whose head was started on some texts."""
    problem = Problem(kind, ["value"] if kind == REGRESSION else list("abc"))
    labels = len(problem.labels)
    model, _ = load_model(
        folder, BertForSequenceClassification, num_labels=labels, mlp_size=mlp_size, new_head=True, seed=1
    )
    add_averaging_layer(model, seed=1)
    given = texts()
    tokens = Tokenizer.from_folder(folder).encode(given, texts(seed=5) if pairs else None, 16, truncation)
    data = Dataset(tokens, targets(kind, given))
    start = HeadStart(model, data, problem, CPU, quiet=True)
    start.standardise()
    start.fit(None)
    return model, data, problem


@pytest.mark.parametrize("truncation", ["head", "window"])
@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_the_models_logits_are_those_of_the_probe(tiny: Callable[..., Path], kind: str, truncation: str) -> None:
    model, data, problem = started(tiny(), kind, truncation=truncation)
    with torch.no_grad():
        pooled = [
            model.pooler(model.encoder.first_tokens(data.rows(np.array([row])), None))
            for row in range(len(data.tokens))
        ]
    of_texts = data.tokens.mean_of_windows(torch.cat(pooled).numpy())
    assert truncation == "head" or data.tokens.windows is not None
    probe = fit_linear_probe(Rows(problem, torch.from_numpy(of_texts) * STRAIGHT, torch.from_numpy(data.targets), None))
    expected = (torch.from_numpy(of_texts) * STRAIGHT) @ probe.weight.T + probe.bias
    assert np.allclose(compute_logits(model, data, CPU), expected.numpy(), atol=2e-2, rtol=2e-3)


def test_the_added_layer_gives_the_mean_of_the_tokens(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=2, new_head=True)
    tokens = Tokenizer.from_folder(folder).encode(["good film"], None, 16)
    x = Dataset(tokens, np.zeros(1, np.int64)).batch(np.array([0]))
    with torch.no_grad():
        hidden = model.encoder(x, None)
        add_averaging_layer(model, seed=0)
        averaged = model.encoder.first_tokens(x, None)
    mixed = hidden[0] + 10 * hidden.mean(0)
    once = torch.nn.functional.layer_norm(mixed, mixed.shape)
    assert torch.allclose(averaged[0], torch.nn.functional.layer_norm(once, once.shape), atol=1e-4)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.slow
def test_a_started_head_beats_the_best_constant(tiny: Callable[..., Path], kind: str) -> None:
    for mlp_size, pairs in ((0, False), (16, False), (0, True)):
        model, data, problem = started(tiny(), kind, mlp_size, pairs=pairs)
        loss = problem.example_losses(compute_logits(model, data, CPU), data.targets).mean()
        y = data.targets
        if kind == REGRESSION:
            constant = y.var()
        elif kind == MULTI:
            fraction = y.mean(0)
            constant = -(fraction * np.log(fraction) + (1 - fraction) * np.log(1 - fraction)).mean()
        else:
            fraction = np.bincount(y) / len(y)
            constant = -(fraction * np.log(fraction)).sum()
        assert loss < constant


def test_pooled_rows_have_no_mean_and_one_deviation(tiny: Callable[..., Path]) -> None:
    """In units of STRAIGHT: so dropout before the head takes away nothing that all rows share."""
    model, data, _ = started(tiny())
    with torch.no_grad():
        rows = model.encoder.first_tokens(data.batch(np.arange(len(data))), None)
        pooled = STRAIGHT * model.pooler(rows)
    assert pooled.mean(0).abs().max() < 0.1 and (pooled.std(0) - 1).abs().max() < 0.1


def test_features_that_never_vary_get_no_weight(tiny: Callable[..., Path]) -> None:
    model, data, problem = started(tiny())
    start = HeadStart(model, data, problem, CPU, quiet=True)
    start.features = start.features.clone()
    start.features[:, 3] = 1.7
    start.standardise()
    start.fit(None)
    assert torch.equal(model.pooler.dense.weight[3], torch.zeros(model.config.hidden_size))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_sample_takes_the_same_fraction_of_each_class_and_one_row_of_the_rarest() -> None:
    y = np.array([0] * 900 + [1] * 99 + [2])
    rows = sampled_rows(np.random.default_rng(0).permutation(y), Problem(SINGLE, list("abc")), 100)
    assert 100 <= len(rows) <= 103 and len(np.unique(rows)) == len(rows)
    counts = np.bincount(np.random.default_rng(0).permutation(y)[rows], minlength=3)
    assert counts[2] == 1 and abs(counts[0] - 90) <= 2
    assert len(sampled_rows(np.zeros(500, np.float32), Problem(REGRESSION, ["x"]), 100)) == 100


def finetune(folder: Path, output: Path, kind: str = SINGLE, **flags: Any) -> minibert.Classifier:
    given = texts(120)
    y = targets(kind, given)
    labels: list[Any] = y.tolist()
    if kind == MULTI:
        labels = [[name for name, on in zip("abc", row, strict=True) if on] for row in y]
    settings = {"learning_rate": 1e-3, "epochs": 2, "quiet": True, "max_length": 16, "problem_type": kind} | flags
    return minibert.finetune(given, labels, model=str(folder), output=str(output), **settings)


@pytest.mark.parametrize("flags", [{}, {"freeze": "all"}, {"head": "mlp:8"}, {"truncation": "window", "max_length": 8}])
@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_no_run_ends_below_its_probe_on_validation(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, flags: dict[str, Any]
) -> None:
    """A rate that destroys the model: the probe is what is left."""
    finetune(tiny(), tmp_path / "run", kind, **{"learning_rate": 0.5, **flags})
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    name = {SINGLE: "macro_f1", MULTI: "micro_f1", REGRESSION: "spearman"}[kind]
    assert metrics["validation"][name] >= metrics["linear_probe"]["validation"][name] - 1e-6


def test_the_probe_is_a_baseline_on_the_screen_and_step_0_may_be_the_best(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tiny(), tmp_path / "run", learning_rate=1.0, quiet=False)
    out = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"linear probe alone: validation macro_f1 {metrics['linear_probe']['validation']['macro_f1']:.4f}" in out
    assert metrics["train"]["best_step"] == 0
    assert metrics["validation"]["accuracy"] == metrics["linear_probe"]["validation"]["accuracy"]


def test_a_saved_folder_is_plain_bert_with_a_further_layer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    classifier = finetune(tiny(), tmp_path / "run")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    assert theirs.config.num_hidden_layers == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    given = texts(8, seed=9)
    with torch.no_grad():
        expected = theirs(**tokenizer(given, padding=True, truncation=True, max_length=16, return_tensors="pt")).logits
    assert np.allclose(classifier.logits(given), expected.numpy(), atol=1e-4)


def test_a_saved_model_gets_no_second_layer_and_keeps_a_head_that_fits(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    first = finetune(tiny(), tmp_path / "first")
    again = finetune(tmp_path / "first", tmp_path / "same", learning_rate=1e-9, max_steps=1)
    assert np.allclose(first.logits(["good film"]), again.logits(["good film"]), atol=1e-4)
    assert "linear_probe" not in json.loads((tmp_path / "same" / "metrics.json").read_text())
    finetune(tmp_path / "first", tmp_path / "other", REGRESSION)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["num_hidden_layers"] == 4
    assert "linear_probe" in json.loads((tmp_path / "other" / "metrics.json").read_text())


def test_head_init_random_is_as_in_transformers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    classifier = finetune(tiny(), tmp_path / "run", head_init="random", learning_rate=1e-9, max_steps=1)
    assert len(classifier.model.encoder.layers) == 3
    assert "linear_probe" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    out = classifier.model.classifier.out
    assert out.weight.std() < 0.03 and out.bias.abs().max() < 1e-6


def test_class_weights_count_in_the_probe(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shares = []
    for name, weights in (("plain", "none"), ("weighted", '{"0": 100, "1": 1, "2": 1}')):
        flags = {"learning_rate": 1e-9, "max_steps": 1, "class_weights": weights, "validation_split": 0}
        shares.append(finetune(tiny(), tmp_path / name, **flags).predict(texts(120)))
    plain, weighted = (sum(each.label == 0 for each in predictions) for predictions in shares)
    assert weighted > plain
