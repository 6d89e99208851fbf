"""Every metric against scikit-learn or scipy."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as theirs
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight

from minibert.problem import metrics as ours

NAMES = [f"class {i}" for i in range(150)]


def cases(classes: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, max(2, classes // 2) if kind == "absent classes" else classes, 300)
    scores = rng.random((300, classes)) + (2 * np.eye(classes)[labels] if kind == "good" else 0)
    if kind == "ties":
        scores = np.round(scores * 4) + 0.25
    return labels, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 6, 150])
@pytest.mark.parametrize("kind", ["random", "good", "ties", "absent classes"])
def test_classification(classes: int, kind: str) -> None:
    labels, probabilities = cases(classes, kind)
    predicted = probabilities.argmax(1)
    result = ours.classification_metrics(labels, probabilities, NAMES[:classes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": theirs.accuracy_score(labels, predicted),
            "macro_f1": theirs.f1_score(labels, predicted, average="macro", zero_division=0),
            "weighted_f1": theirs.f1_score(labels, predicted, average="weighted", zero_division=0),
            "weighted_precision": theirs.precision_score(labels, predicted, average="weighted", zero_division=0),
            "weighted_recall": theirs.recall_score(labels, predicted, average="weighted", zero_division=0),
            "mcc": theirs.matthews_corrcoef(labels, predicted),
        }
        precision, recall, f1, support = theirs.precision_recall_fscore_support(
            labels, predicted, labels=range(classes), zero_division=0
        )
    if classes == 2:
        scores = probabilities[:, 1]
        points = theirs.precision_recall_curve(labels, scores)
        expected["f1"] = theirs.f1_score(labels, predicted)
        expected["roc_auc"] = theirs.roc_auc_score(labels, scores)
        expected["average_precision"] = theirs.average_precision_score(labels, scores)
        expected["precision_at_recall_50"] = max(points[0][:-1][points[1][:-1] >= 0.5])
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-12), name
    assert result["confusion_matrix"] == theirs.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    rows = [list(row.values()) for row in result["per_class"].values()]
    assert np.allclose(rows, np.stack([precision, recall, f1, support], axis=1), atol=1e-12)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_multi_label(threshold: float) -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = (rng.random((200, 9)) < 0.3).astype(int), rng.random((200, 9))
    result = ours.multi_label_metrics(labels, probabilities, NAMES[:9], np.full(9, threshold))
    given = probabilities >= threshold
    assert result["micro_f1"] == pytest.approx(theirs.f1_score(labels, given, average="micro"), abs=1e-12)
    assert result["macro_f1"] == pytest.approx(theirs.f1_score(labels, given, average="macro"), abs=1e-12)
    assert result["subset_accuracy"] == pytest.approx(theirs.accuracy_score(labels, given), abs=1e-12)


def test_regression() -> None:
    rng = np.random.default_rng(0)
    targets = np.round(rng.random(300) * 5, 1)
    predictions = targets + rng.normal(size=300)
    result = ours.regression_metrics(targets, predictions)
    assert result["pearson"] == pytest.approx(scipy.stats.pearsonr(targets, predictions).statistic, abs=1e-12)
    assert result["spearman"] == pytest.approx(scipy.stats.spearmanr(targets, predictions).statistic, abs=1e-12)
    assert result["mse"] == pytest.approx(theirs.mean_squared_error(targets, predictions), abs=1e-12)
    assert result["mae"] == pytest.approx(theirs.mean_absolute_error(targets, predictions), abs=1e-12)


def test_undefined_is_none_and_never_nan() -> None:
    one_class = ours.classification_metrics(np.zeros(4, int), np.tile([0.6, 0.4], (4, 1)), ["a", "b"])
    assert one_class["roc_auc"] is None and one_class["average_precision"] is None and one_class["mcc"] == 0
    empty = ours.classification_metrics(np.zeros(0, int), np.zeros((0, 2)), ["a", "b"])
    assert empty["accuracy"] is None and empty["confusion_matrix"] == [[0, 0], [0, 0]]
    constant = ours.regression_metrics(np.ones(3), np.arange(3.0))
    assert constant["pearson"] is None and constant["mse"] == pytest.approx(2 / 3)
    assert ours.multi_label_metrics(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"], np.full(2, 0.5))["micro_f1"] is None
    assert ours.multi_label_metrics(np.zeros((3, 2)), np.zeros((3, 2)), ["a", "b"], np.full(2, 0.5))["micro_f1"] == 0


def test_tuned_thresholds_are_the_best_there_are() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((80, 5)) < 0.3).astype(int)
    labels[:, 4] = 0
    probabilities = np.round(np.clip(rng.random((80, 5)) * 0.7 + labels * 0.2, 0, 1), 2)
    tuned = ours.tune_thresholds(labels, probabilities)
    assert tuned[4] == 0.5
    for c in range(4):
        best = max(theirs.f1_score(labels[:, c], probabilities[:, c] >= t) for t in np.arange(0, 1.005, 0.005))
        assert theirs.f1_score(labels[:, c], probabilities[:, c] >= tuned[c]) == pytest.approx(best, abs=1e-12)


def test_calibration_error() -> None:
    labels, probabilities = np.array([0, 1, 0, 0]), np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.95, 0.05]])
    assert ours.expected_calibration_error(labels, probabilities, bins=10) == pytest.approx((0.15 + 0.8 + 0.4) / 4)


def test_balanced_weights_equal_scikit_learn() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert np.allclose(ours.balanced_class_weights(labels, 5), expected)
    assert np.allclose(ours.balanced_class_weights(labels, 6), [*expected, 1])  # a class without rows changes nothing


def test_balanced_weights_of_the_spam_tutorial(shared_data: Path) -> None:
    with open(shared_data / "sms_spam" / "spamdata_v2.csv", encoding="utf-8", newline="") as file:
        labels = np.array([int(row["label"]) for row in csv.DictReader(file)])
    train, _ = train_test_split(labels, random_state=2018, test_size=0.3, stratify=labels)
    assert ours.balanced_class_weights(train, 2) == pytest.approx([0.57743559, 3.72848948], abs=1e-8)
