"""Which evaluation is the best, when training stops early, and when bad steps end it: with scripted evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import dataset, training

from minibert.errors import UserError
from minibert.training import loop as train
from minibert.training.loop import BAD_STEPS, Training


def scripted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, certainties: list[float], right: list[float], **flags: Any
) -> Training:
    """A training of two steps an evaluation, whose evaluations give a share of right answers with a certainty."""
    data = {"train": dataset(count=80), "validation": dataset(count=10, seed=1)}
    script = iter(zip(certainties, right, strict=True))

    def evaluated(*_: Any, **__: Any) -> np.ndarray:
        certainty, share = next(script)
        said = data["validation"].targets.copy()
        said[round(share * len(said)) :] += 1
        return np.float32(certainty) * np.eye(3, dtype=np.float32)[said % 3]

    monkeypatch.setattr(train, "compute_logits", evaluated)
    return training(folder, data=data, eval_steps=2, max_steps=2 * len(certainties), **flags)


def run(job: Training, tmp_path: Path) -> Training:
    job.run(tmp_path / "train_log.jsonl", lambda: None)
    return job


def test_the_best_loss_is_the_lowest(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model holds the weights of that step in the end."""
    job = scripted(tiny(), monkeypatch, [1.0, 3.0, 2.0], [1.0, 1.0, 1.0], metric="loss")
    after: dict[int, torch.Tensor] = {}
    step, weight = job.step, job.model.classifier.out.weight

    def noted(chosen: train.Step) -> Any:
        result = step(chosen)
        after[job.state.step] = weight.detach().clone()
        return result

    job.step = noted  # type: ignore[method-assign]
    run(job, tmp_path)
    assert torch.equal(weight, after[4]) and not torch.equal(weight, after[6])
    assert job.state.best_step == 4 and job.state.best_value == pytest.approx(np.log(1 + 2 * np.exp(-3.0)), rel=1e-4)


def test_the_best_accuracy_is_the_highest_and_of_equals_the_first(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run(scripted(tiny(), monkeypatch, [1.0] * 4, [0.5, 0.8, 0.8, 0.2], metric="accuracy"), tmp_path)
    assert (job.state.best_step, job.state.best_value) == (4, pytest.approx(0.8))


def test_patience_ends_training_after_so_many_evaluations(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [0.5, 0.4, 0.6, 0.6, 0.3, 0.9]
    flags = {"metric": "accuracy", "early_stopping_patience": 2}
    job = run(scripted(tiny(), monkeypatch, [1.0] * 6, right, **flags), tmp_path)
    assert (job.state.step, job.state.best_step) == (10, 6)


def poisoned(job: Training, at: Callable[[int], bool]) -> None:
    """The gradients of some steps become NaN as they are used."""
    step = job.optimizer.step  # type: ignore[union-attr]

    def with_poison(number: int, loss: torch.Tensor | None = None) -> torch.Tensor:
        if at(number):
            job.optimizer.parameters[0].grad.fill_(torch.nan)  # type: ignore[union-attr]
        return step(number, loss)

    job.optimizer.step = with_poison  # type: ignore[union-attr, method-assign]


def test_bad_steps_that_are_not_in_a_row_end_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    job = training(tiny(), max_steps=40)
    poisoned(job, lambda number: number % BAD_STEPS != 0)
    assert run(job, tmp_path).state.skipped == 36
    job = training(tiny(), max_steps=40)
    poisoned(job, lambda number: number % (BAD_STEPS + 1) != 0)
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 11"):
        run(job, tmp_path)
