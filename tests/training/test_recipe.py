"""The learning rate and epochs that a run chooses: by width and rows, and only where none is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import minibert
from minibert.cli import parse_run_config
from minibert.errors import UserError
from minibert.training.recipe import choose_recipe

TEXTS = [f"good film {number}" if number % 2 else f"bad book {number}" for number in range(40)]
LABELS = ["good" if number % 2 else "bad" for number in range(40)]


def test_wider_models_learn_slower_and_few_rows_longer() -> None:
    rates = [choose_recipe(width, 5_000, False)[0] for width in (128, 256, 384, 512, 768, 1024)]
    assert rates == [5e-4, 2e-4, 1e-4, 6e-5, 3e-5, 2e-5]
    epochs = [choose_recipe(384, rows, False)[1] for rows in (40, 1_999, 2_000, 10_000, 1_000_000)]
    assert epochs == [8.0, 8.0, 3.0, 3.0, 3.0]
    assert choose_recipe(768, 40, True) == (1e-3, 10.0)


@pytest.mark.parametrize(
    ("flags", "expected", "automatic"),
    [
        ({}, (5e-4, 8.0), ["learning_rate", "epochs"]),
        ({"learning_rate": "auto", "epochs": 1}, (5e-4, 1.0), ["learning_rate"]),
        ({"learning_rate": 1e-3, "epochs": "auto"}, (1e-3, 8.0), ["epochs"]),
        ({"freeze": "all"}, (1e-3, 10.0), ["learning_rate", "epochs"]),
    ],
)
def test_a_run_says_and_keeps_what_was_chosen(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, object],
    expected: tuple[float, float],
    automatic: list[str],
) -> None:
    minibert.finetune(TEXTS, LABELS, model=str(tiny()), max_steps=1, output=str(tmp_path / "run"), **flags)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["flags"]["learning_rate"], record["flags"]["epochs"]) == expected
    assert record["automatic"] == automatic
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe")]
    assert f"learning rate {expected[0]:g}" in line and f"epochs {expected[1]:g}" in line
    assert line.count("(for ") == len(automatic)


def test_auto_is_a_flags_value_and_nothing_else_is() -> None:
    assert parse_run_config(["--lr", "auto", "--num_train_epochs", "auto"]).learning_rate is None
    with pytest.raises(UserError, match="--learning-rate: 'fast' is not auto or a number"):
        parse_run_config(["--learning-rate", "fast"])
    with pytest.raises(UserError, match="epochs = 'many' is not auto or a number"):
        minibert.finetune(TEXTS, LABELS, epochs="many")
