"""`BertClassifier` in scikit-learn's own tools, and what `sample_weight` does."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needed
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import minibert
from minibert.errors import UserError
from minibert.sklearn import BertClassifier


@pytest.fixture(scope="module")
def reviews(films: Path) -> tuple[np.ndarray, np.ndarray]:
    """Texts, and 1 for good and 0 for bad."""
    with open(films, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([row["text"] for row in rows]), np.array([int(row["label"] == "good") for row in rows])


@pytest.fixture(scope="module")
def estimator(film_model: Path) -> BertClassifier:
    return BertClassifier(str(film_model), epochs=3, learning_rate=2e-3, device="cpu")


def test_labels_come_back_as_they_were_given(estimator: BertClassifier, reviews: Any) -> None:
    texts, labels = reviews
    for given in (labels, labels == 1, np.where(labels == 1, "9", "10"), (labels + 0.0).tolist()):
        fitted = clone(estimator).fit(list(texts), given)
        assert np.array_equal(fitted.classes_, np.unique(given))
        predicted = fitted.predict(list(texts))
        assert predicted.dtype == np.asarray(given).dtype and (predicted == given).mean() > 0.9
        probabilities = fitted.predict_proba(list(texts))
        assert probabilities.shape == (160, 2) and np.allclose(probabilities.sum(1), 1)
        assert np.array_equal(fitted.classes_[probabilities.argmax(1)], predicted)
        assert fitted.score(list(texts), given) == (predicted == given).mean()


def test_a_fit_leaves_no_files(
    estimator: BertClassifier, reviews: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = clone(estimator).fit(*reviews)
    assert not list(tmp_path.iterdir())
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(reviews[0]), fitted.predict_proba(reviews[0]))
    fitted.classifier_.save(tmp_path / "saved")
    assert minibert.load(tmp_path / "saved").problem.labels == ["0", "1"]


def test_cross_validation(estimator: BertClassifier, reviews: Any) -> None:
    texts, labels = reviews
    assert cross_val_score(estimator, texts, labels, cv=2).mean() > 0.9
    held_out = cross_val_predict(estimator, texts, labels, cv=2, method="predict_proba")
    assert held_out.shape == (160, 2) and (held_out.argmax(1) == labels).mean() > 0.9


def test_a_grid_over_a_pipeline(estimator: BertClassifier, reviews: Any) -> None:
    steps = make_pipeline(FunctionTransformer(np.char.lower), clone(estimator))
    grid = GridSearchCV(steps, {"bertclassifier__epochs": [1, 3]}, cv=2).fit(*reviews)
    assert set(grid.best_params_) == {"bertclassifier__epochs"} and grid.score(*reviews) > 0.9


def test_calibration_on_top(estimator: BertClassifier, reviews: Any) -> None:
    calibrated = CalibratedClassifierCV(estimator, cv=2).fit(*reviews)
    assert (calibrated.predict(reviews[0]) == reviews[1]).mean() > 0.9


def test_cleanlab_finds_wrong_labels(estimator: BertClassifier, reviews: Any) -> None:
    CleanLearning = needed("cleanlab.classification").CleanLearning
    texts, labels = reviews
    wrong = [3, 40, 77, 120]
    given = labels.copy()
    given[wrong] = 1 - given[wrong]
    issues = CleanLearning(estimator, cv_n_folds=2, seed=0).find_label_issues(texts, given)
    found = set(np.flatnonzero(issues["is_label_issue"]))
    assert len(found & set(wrong)) >= 3 and len(found) < 8


def test_tables_of_one_column_and_pairs(estimator: BertClassifier, reviews: Any) -> None:
    pandas = pytest.importorskip("pandas")
    texts, labels = reviews
    frame = pandas.DataFrame({"text": texts})
    column = pandas.Series(labels, index=range(500, 660)).astype("category")
    fitted = clone(estimator).fit(frame, column)
    assert (fitted.predict(frame) == labels).mean() > 0.9
    frame["second"] = "a film"
    assert (clone(estimator).fit(frame, labels).predict(frame) == labels).mean() > 0.9


def test_the_estimators_settings_are_those_of_finetune(estimator: BertClassifier, reviews: Any) -> None:
    weighted = clone(estimator).set_params(class_weight={0: 1.0, 1: 2.0}, settings={"metric": "accuracy"})
    assert (weighted.fit(*reviews).predict(reviews[0]) == reviews[1]).mean() > 0.9
    with pytest.raises(UserError, match="scheduel"):
        clone(estimator).set_params(settings={"scheduel": "cosine"}).fit(*reviews)
    with pytest.raises(UserError, match="differ only"):
        clone(estimator).fit(reviews[0], np.where(reviews[1] == 1, "good", "good "))


def test_rows_of_weight_0_teach_nothing(estimator: BertClassifier, reviews: Any) -> None:
    """Every text is there twice, its wrong label at weight 0."""
    texts, labels = np.tile(reviews[0], 2), np.concatenate([reviews[1], 1 - reviews[1]])
    weights = np.repeat([1.0, 0.0], 160)
    fitted = clone(estimator).set_params(validation_split=0)
    fitted.fit(texts, labels, sample_weight=weights)
    assert (fitted.predict(reviews[0]) == reviews[1]).mean() > 0.9
    assert (fitted.fit(texts, labels, sample_weight=1 - weights).predict(reviews[0]) == reviews[1]).mean() < 0.1


def test_equal_weights_change_nothing(estimator: BertClassifier, reviews: Any) -> None:
    plain = clone(estimator).fit(*reviews).predict_proba(reviews[0])
    of_two = clone(estimator).fit(*reviews, sample_weight=[2.0] * 160).predict_proba(reviews[0])
    assert np.abs(plain - of_two).max() < 1e-3


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0] * 159, "160 texts, but weights of shape"),
        ([-1.0] * 160, "at least 0"),
        ([0.0] * 160, "not all of them 0"),
        ([float("nan")] * 160, "finite"),
        (["x"] * 160, "a number for each text"),
    ],
)
def test_weights_that_are_none(estimator: BertClassifier, reviews: Any, weights: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clone(estimator).fit(*reviews, sample_weight=weights)
