"""Thresholds of several labels per row, and weights of classes."""

from __future__ import annotations

import numpy as np
import pytest

from minibert.cli import checked_values
from minibert.errors import UserError
from minibert.problem.metrics import tune_thresholds
from minibert.problem.problem import MULTI, SINGLE, Problem, class_weights


def logit(probabilities: np.ndarray) -> np.ndarray:
    return np.log(probabilities / (1 - probabilities))


def test_thresholds_are_tuned_and_few_rows_share_the_common_one() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 3)) < [0.3, 0.1, 0.005]).astype(np.float32)
    assert targets[:, 2].sum() < 5 < targets[:, 1].sum()
    probabilities = np.clip(0.3 * targets + rng.random((400, 3)) * [0.5, 0.35, 0.2], 0.001, 0.999)
    problem = Problem(MULTI, ["a", "b", "c"])
    problem = problem.tuned(logit(probabilities), targets)
    own = tune_thresholds(targets, probabilities)
    common = tune_thresholds(targets.reshape(-1, 1), probabilities.reshape(-1, 1))[0]
    assert np.allclose(problem.thresholds, [own[0], own[1], common])
    assert abs(own[0] - own[1]) > 0.01 and not np.isclose(own[2], common)
    tuned = problem.metrics(logit(probabilities), targets)
    assert tuned["macro_f1"] > Problem(MULTI, ["a", "b", "c"]).metrics(logit(probabilities), targets)["macro_f1"]


def test_other_problems_have_no_thresholds() -> None:
    problem = Problem(SINGLE, ["a", "b"])
    assert problem.tuned(np.zeros((2, 2)), np.array([0, 1])).thresholds == ()


def test_a_label_of_every_row_has_a_positive_balanced_weight() -> None:
    problem, targets = Problem(MULTI, ["a", "b"]), np.array([[1, 0], [1, 1], [1, 0]], dtype=np.float32)
    assert (class_weights(problem, "balanced", targets) > 0).all()


def test_class_weights_may_be_keyed_as_the_labels_are() -> None:
    given = checked_values({"class_weights": {True: 5, 0.0: 1}}, "finetune")["class_weights"]
    weights = class_weights(Problem(SINGLE, ["0", "1"]), given, np.array([0, 1]))
    assert weights is not None and weights.tolist() == [1, 5]
    with pytest.raises(UserError, match=r"class_weights is list; expected \{label: weight\}"):
        checked_values({"class_weights": [1, 5]}, "finetune")
