"""Temperature scaling: the best temperature there is, no decision changed, used by all that predicts."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import sklearn.metrics
import torch
import transformers
from conftest import save_tiny

import minibert
import minibert.predict
from minibert.errors import UserError
from minibert.problem.calibration import LIMIT, calibration_metrics, confidences, fit_temperature
from minibert.problem.metrics import calibration_gap, roc_points
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Calibration, Problem


def sampled(kind: str, scale: float, rows: int = 4000, labels: int = 5) -> tuple[Problem, np.ndarray, np.ndarray]:
    """Logits whose targets were drawn from their probabilities, then multiplied by `scale`."""
    rng = np.random.default_rng(1)
    problem = Problem(kind, [f"l{i}" for i in range(labels)])
    logits = rng.normal(scale=2, size=(rows, labels)).astype(np.float32)
    p = problem.probabilities(logits)
    if kind == MULTI:
        return problem, logits * np.float32(scale), (rng.random(p.shape) < p).astype(np.float32)
    return problem, logits * np.float32(scale), np.array([rng.choice(labels, p=row) for row in p])


def loss_at(problem: Problem, logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    """The negative log-likelihood from the definition."""
    p = Problem(problem.kind, problem.labels, Calibration(temperature)).probabilities(logits)
    if problem.kind == MULTI:
        return float(-np.log(np.where(targets > 0, p, 1 - p)).mean())
    return float(-np.log(p[np.arange(len(p)), targets]).mean())


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_temperature_is_that_of_the_lowest_loss(kind: str, scale: float) -> None:
    problem, logits, targets = sampled(kind, scale)
    temperature = fit_temperature(problem, logits, targets)
    assert temperature == pytest.approx(scale, rel=0.1)  # what the logits were made with
    best = scipy.optimize.minimize_scalar(
        lambda t: loss_at(problem, logits, targets, t), bounds=(scale / 3, scale * 3), method="bounded"
    )
    assert temperature == pytest.approx(best.x, rel=1e-3)
    scaled = Problem(kind, problem.labels, Calibration(temperature))
    assert scaled.decisions(scaled.probabilities(logits)) == problem.decisions(problem.probabilities(logits))
    error = calibration_metrics(scaled, {"validation": logits}, {"validation": targets})["validation"]
    if scale != 1:
        assert error["expected_calibration_error"]["after"] < 0.03 < error["expected_calibration_error"]["before"]
        assert error["loss"]["after"] < error["loss"]["before"]


def test_temperature_where_the_rows_cannot_tell() -> None:
    problem = Problem(SINGLE, ["a", "b"])
    right = np.array([[3, -1], [-2, 2]], dtype=np.float32)
    assert fit_temperature(problem, right, np.array([0, 1])) == 1  # all right: no lowest loss
    assert fit_temperature(problem, right, np.array([1, 0])) == LIMIT  # all wrong: the less it says, the better
    assert fit_temperature(problem, right[:0], np.zeros(0, np.int64)) == 1
    assert calibration_gap(*confidences(problem, right[:0], np.zeros(0, np.int64), 1.0)) is None
    assert fit_temperature(Problem(REGRESSION, ["x"]), right[:, :1], np.array([0.5, 1])) == 1


def test_thresholds_follow_the_probabilities_when_the_temperature_is_left_out() -> None:
    _, logits, _ = sampled(MULTI, 1.0)
    scaled = Problem(MULTI, [f"l{i}" for i in range(5)], Calibration(2.5, (0.1, 0.3, 0.5, 0.7, 0.95)))
    plain = scaled.without_temperature()
    assert plain.temperature == 1 and plain.thresholds[2] == pytest.approx(0.5) and plain.thresholds[0] < 0.1
    assert plain.decisions(plain.probabilities(logits)) == scaled.decisions(scaled.probabilities(logits))


def test_calibration_error_and_confidences_are_those_of_the_definition() -> None:
    problem, logits, targets = sampled(SINGLE, 3.0)
    stated, right = confidences(problem, logits, targets, 1.0)
    p = problem.probabilities(logits)
    assert np.allclose(stated, p.max(1), atol=1e-6) and np.array_equal(right > 0, p.argmax(1) == targets)
    total = 0.0
    for b in range(15):
        inside = (stated >= b / 15) & ((stated < (b + 1) / 15) | (b == 14))
        if inside.any():
            total += inside.sum() * abs(stated[inside].mean() - right[inside].mean())
    assert calibration_gap(stated, right) == pytest.approx(total / len(stated), abs=1e-6)


def test_roc_points_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 300), rng.random(300).round(2)  # with ties
    false, true, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    ours = roc_points(labels, scores)
    assert np.allclose(ours[0], false[1:]) and np.allclose(ours[1], true[1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on labels with noise, so that its validation rows ask for a temperature."""
    folder = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice("good bad film very the money win".split(), 12)) for _ in range(200)]
    labels = ["yes" if ("money win" in text) != (rng.random() < 0.2) else "no" for text in texts]
    model = str(save_tiny(folder / "tiny"))
    minibert.finetune(texts, labels, model=model, output=str(folder / "run"), epochs=4, lr=3e-3, quiet=True)
    return folder / "run"


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def test_a_run_saves_its_temperature_and_all_that_predicts_uses_it(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    temperature = config["minibert"]["temperature"]
    assert temperature == metrics["calibration"]["temperature"] != 1
    loss = metrics["calibration"]["validation"]["loss"]
    assert loss["after"] <= loss["before"] and loss["after"] == pytest.approx(metrics["validation"]["loss"])

    classifier = minibert.load(trained)
    texts = ["money win good", "the film very bad", "win money"]
    logits = classifier.logits(texts).astype(np.float64)
    hot = np.array([list(p.probabilities.values()) for p in classifier.predict(texts)])
    assert np.allclose(hot, softmax(logits / temperature), atol=1e-6)
    cold = classifier.predict(texts, temperature=False)
    assert np.allclose([list(p.probabilities.values()) for p in cold], softmax(logits), atol=1e-6)
    assert [p.label for p in cold] == [p.label for p in classifier.predict(texts)]
    assert minibert.load(trained, temperature=False).predict(texts) == cold

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(trained).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(trained)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert np.allclose(theirs(**encoded).logits, logits, atol=1e-5)  # the saved logits are unscaled

    with open(trained / "predictions-validation.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = softmax(classifier.logits([row["text"] for row in rows]).astype(np.float64) / temperature)
    assert np.allclose(
        [[float(row["probability_no"]), float(row["probability_yes"])] for row in rows], wanted, atol=1e-5
    )


def test_predict_without_temperature_from_the_command_line(trained: Path, tmp_path: Path) -> None:
    def probabilities(*flags: str) -> tuple[list[str], np.ndarray]:
        path = tmp_path / "out.csv"
        texts = ["--text", "money win good", "the film", "--output", str(path)]
        command = [sys.executable, "-m", "minibert.predict", str(trained), *texts, *flags]
        if flags:
            subprocess.run(command, check=True, capture_output=True)
        else:  # the same, without another start of torch
            minibert.predict.main(command[3:])
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        return [row["predicted"] for row in rows], np.array([float(row["probability_yes"]) for row in rows])

    labels, with_temperature = probabilities()
    same_labels, without = probabilities("--no-temperature")
    assert labels == same_labels
    odds = np.log(with_temperature / (1 - with_temperature)), np.log(without / (1 - without))
    temperature = json.loads((trained / "config.json").read_text())["minibert"]["temperature"]
    assert np.allclose(odds[0] * temperature, odds[1], atol=1e-3)


def test_no_temperature_is_fitted_where_none_is_wanted(tmp_path: Path) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} film {i}" for i in range(40)]
    flags = {"model": str(save_tiny(tmp_path / "tiny")), "quiet": True, "max_steps": 2, "temperature": False}
    classifier = minibert.finetune(texts, ["b", "a"] * 20, output=str(tmp_path / "run"), **flags)
    assert classifier.problem.temperature == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["minibert"]["temperature"] == 1
    assert "--no-temperature" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("value", [0, -1, "warm", None, 1e999])
def test_a_broken_temperature_is_refused_in_one_line(trained: Path, tmp_path: Path, value: object) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["minibert"]["temperature"] = value
    for path in trained.iterdir():
        if path.is_file() and path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="temperature"):
        minibert.load(tmp_path)
