"""The linear probe has the optimum that scikit-learn finds, with class weights, for every problem type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.training import linear_probe
from minibert.training.linear_probe import Rows, fit_linear_probe

N, F, L = 400, 12, 4


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, F)).astype(np.float32)


def classes(x: np.ndarray, noise: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (x @ rng.standard_normal((F, L)) + noise * rng.gumbel(size=(len(x), L))).argmax(1)


def rows(kind: str, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> Rows:
    labels = ["score"] if kind == REGRESSION else [str(number) for number in range(L)]
    given = None if weights is None else torch.from_numpy(weights)
    return Rows(Problem(kind, labels), torch.from_numpy(x), torch.from_numpy(y), given)


@pytest.mark.parametrize("weights", [None, np.array([1, 2, 0.5, 3], dtype=np.float32)])
def test_classes_have_the_optimum_of_scikit_learn(weights: np.ndarray | None) -> None:
    x = features()
    y = classes(x)
    ours = fit_linear_probe(rows(SINGLE, x, y, weights))
    total = N if weights is None else weights[y].sum()  # scikit-learn sums the losses; ours is their weighted mean
    theirs = LogisticRegression(
        C=N / (ours.penalty * total),
        class_weight=None if weights is None else dict(enumerate(weights.tolist())),
        tol=1e-8,
        max_iter=10_000,
    ).fit(x, y)
    found = torch.softmax(torch.from_numpy(x) @ ours.weight.T + ours.bias, 1).numpy()
    assert np.abs(found - theirs.predict_proba(x)).max() < 5e-3


def test_several_labels_have_the_optimum_of_one_regression_a_label() -> None:
    x = features()
    y = np.eye(L, dtype=np.float32)[classes(x)] + np.eye(L, dtype=np.float32)[classes(x, 3.0)]
    y = y.clip(0, 1)
    ours = fit_linear_probe(rows(MULTI, x, y))
    found = torch.sigmoid(torch.from_numpy(x) @ ours.weight.T + ours.bias).numpy()
    for label in range(L):
        theirs = LogisticRegression(C=1 / ours.penalty, tol=1e-8, max_iter=10_000).fit(x, y[:, label])
        assert np.abs(found[:, label] - theirs.predict_proba(x)[:, 1]).max() < 5e-3


def test_numbers_have_the_optimum_of_ridge_regression() -> None:
    x = features()
    y = (x @ np.arange(F) + 50 + np.random.default_rng(2).standard_normal(N)).astype(np.float32)
    ours = fit_linear_probe(rows(REGRESSION, x, y))
    theirs = Ridge(alpha=ours.penalty).fit(x, y)
    assert np.allclose(ours.weight[0], theirs.coef_, atol=1e-3) and abs(ours.bias.item() - theirs.intercept_) < 1e-3


def test_the_penalty_is_chosen_on_rows_that_were_held_out() -> None:
    """Noise wants the strongest penalty, clear classes a weak one."""
    x = features()
    noise = np.random.default_rng(3).integers(0, L, N)
    assert fit_linear_probe(rows(SINGLE, x, noise)).penalty == max(linear_probe.PENALTIES)
    assert fit_linear_probe(rows(SINGLE, x, classes(x, 0.0))).penalty == min(linear_probe.PENALTIES)


@pytest.mark.slow
def test_more_cells_than_fit_at_once_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features()
    y = classes(x)
    whole = fit_linear_probe(rows(SINGLE, x, y))
    monkeypatch.setattr(linear_probe, "CELLS_AT_ONCE", 7 * L)
    chunked = fit_linear_probe(rows(SINGLE, x, y))
    assert chunked.penalty == whole.penalty and torch.allclose(chunked.weight, whole.weight, atol=2e-3)


def test_a_fit_repeats_to_the_bit_and_works_where_gradients_are_off() -> None:
    x = features()
    first = fit_linear_probe(rows(SINGLE, x, classes(x)))
    with torch.no_grad():
        second = fit_linear_probe(rows(SINGLE, x, classes(x)))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_few_rows_and_labels_without_rows_give_a_finite_head(kind: str, n: int) -> None:
    x = features()[:n]
    y = {
        SINGLE: np.zeros(n, dtype=np.int64),
        MULTI: np.zeros((n, L), dtype=np.float32),
        REGRESSION: np.full(n, 3.5, dtype=np.float32),
    }[kind]
    for given in (x, np.zeros_like(x)):
        probe = fit_linear_probe(rows(kind, given, y))
        assert torch.isfinite(probe.weight).all() and torch.isfinite(probe.bias).all()
