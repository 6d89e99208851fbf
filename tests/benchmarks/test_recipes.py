"""Recipes of tutorials: benchmarks/README.md has their commands, and the scripts keep, show and continue their runs."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from minibert.cli import parse_run_config

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "sms_spam": ["COMMAND"],
    "questions": ["COMMAND"],
    "movie_reviews": ["FROZEN", "FULL"],
    "string_labels": ["COMMAND"],
    "two_lists": ["CODE"],
}


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "recipes")
    recipe = importlib.import_module("recipe")
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "recipes.json")
    return recipe


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_the_command_of_the_script(name: str, recipes: Any) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    module = importlib.import_module(name)
    assert f"`{name}.py`" in page
    for constant in COMMANDS[name]:
        command = getattr(module, constant)
        assert command in page
        if constant != "CODE":
            words = shlex.split(command.replace("\\\n", " "))
            assert words[:3] == ["python", "-m", "minibert.finetune"] and parse_run_config(words[3:]).train


def test_a_recipe_runs_is_kept_and_is_not_run_again(
    recipes: Any, films: Path, film_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = "python -m minibert.finetune --train films.csv --model tiny \\\n --max-steps 3 --output runs/films"
    command += " --keep-checkpoint"
    files = {"films.csv": lambda: films, "tiny": lambda: film_model}
    recipe = recipes.Recipe(
        "films", command, files, lambda m: {"accuracy": m["validation"]["accuracy"]}, {"accuracy": 0.9, "F1": "high"}
    )
    monkeypatch.setattr(sys, "argv", ["films.py"])
    recipes.run_recipes(recipe)
    first = capfd.readouterr().out
    kept = json.loads(recipes.RESULTS.read_text())["films"]
    metrics = json.loads((recipes.RUNS / "films" / "metrics.json").read_text())
    assert kept["scores"]["accuracy"] == round(metrics["validation"]["accuracy"], 4)
    assert json.loads(first.splitlines()[-1]) == {"recipe": "films", **kept}
    assert f"{kept['scores']['accuracy']:.4f}  0.9" in first and "high" in first
    stamp = (recipes.RUNS / "films" / "metrics.json").stat().st_mtime_ns
    recipes.run_recipes(recipe)
    assert (recipes.RUNS / "films" / "metrics.json").stat().st_mtime_ns == stamp
    recipes.RESULTS.unlink()
    (recipes.RUNS / "films" / "metrics.json").unlink()  # as if stopped before its end: the checkpoint is there
    capfd.readouterr()
    recipes.run_recipes(recipe)
    assert "resumed at step 3" in capfd.readouterr().out
    assert json.loads(recipes.RESULTS.read_text())["films"]["scores"] == kept["scores"]
