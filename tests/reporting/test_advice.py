"""A run says when it was not done, and when it went too far; one that was as it should be says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minibert
from minibert.reporting.advice import advice


def lines(values: list[float | None], losses: list[float] | None = None) -> list[dict[str, Any]]:
    losses = losses or [1.0] * len(values)
    return [
        {"epoch": float(epoch), "step": 10 * epoch, "validation_accuracy": value, "validation_loss": loss}
        for epoch, (value, loss) in enumerate(zip(values, losses, strict=True))
    ]


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ([0.2, 0.6, 0.8], 7.0),  # gains 0.4, 0.2: halved seven times to 0.002
        ([0.2, 0.4, 0.6], 2.0),  # no slower than before: as long again
        ([0.2, 0.8, 0.801], None),
        ([0.2, 0.8, 0.7], None),
        ([0.9], None),
        ([None, None], None),
        ([0.2, None, 0.8], 2.0),
    ],
)
def test_more_epochs_are_measured_from_the_curve(values: list[float | None], more: float | None) -> None:
    epochs = 4.0 if more == 7.0 else 2.0
    found = advice(lines(values), "accuracy", False, epochs)
    if more is None:
        assert found == []
    else:
        (line,) = found
        assert f"about {more:g} epochs more" in line and f"--epochs {epochs + more:g}" in line


def test_a_run_that_never_beat_its_probe_says_so() -> None:
    found = advice(lines([0.9, 0.5, 0.6]), "accuracy", False, 2.0)
    assert len(found) == 1 and found[0].startswith("no evaluation was better than the linear probe")
    assert advice(lines([0.9, 0.5, 0.6])[1:], "accuracy", False, 2.0)[0].startswith("not done")


def test_an_error_falls_where_a_score_rises() -> None:
    curve = [{"epoch": float(i), "validation_mse": value} for i, value in enumerate((4.0, 2.0, 1.0))]
    assert "about 2 epochs more" in advice(curve, "mse", True, 1.0)[0]
    assert advice(curve[::-1], "mse", True, 1.0)[0].startswith("validation loss rose")


def test_a_validation_loss_that_rises_is_told() -> None:
    assert advice(lines([0.8, 0.9, 0.9], [0.5, 0.4, 0.6]), "accuracy", False, 2.0)[0].startswith("validation loss rose")
    assert advice(lines([0.8, 0.9, 0.9], [0.5, 0.4, 0.42]), "accuracy", False, 2.0) == []


def test_a_run_that_was_cut_short_says_so(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{'good film' if i % 2 else 'bad spam'} {i}" for i in range(80)]
    labels = ["a" if i % 2 else "b" for i in range(80)]
    flags: dict[str, Any] = {"model": str(tiny()), "head_init": "random", "learning_rate": 2e-3, "eval_steps": 1}
    minibert.finetune(texts, labels, output=str(tmp_path / "run"), metric="loss", max_steps=4, warmup_ratio=0, **flags)
    (line,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["advice"]
    assert line.startswith("not done") and line in capsys.readouterr().out
