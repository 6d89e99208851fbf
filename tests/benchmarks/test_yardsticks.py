"""The yardsticks' own arithmetic: rows of a cell, label order, scores, the table, and what is not repeated."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def yardsticks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("yardsticks")


def test_cells_have_the_rows_they_promise(yardsticks: Any, shared_data: Path) -> None:
    few = yardsticks.chosen(yardsticks.TASKS["trec6"], "few", 1)
    assert set(Counter(row[2] for row in few["train"]).values()) == {20} and len(few["test"]) == 500
    assert few["train"] != yardsticks.chosen(yardsticks.TASKS["trec6"], "few", 2)["train"]
    emotions = Counter(
        label
        for row in yardsticks.chosen(yardsticks.TASKS["goemotions"], "few", 1)["train"]
        for label in row[2].split("|")
    )
    assert len(emotions) == 28 and min(emotions.values()) >= 20
    assert len(yardsticks.chosen(yardsticks.TASKS["stsb"], "few", 1)["train"]) == 100
    whole = yardsticks.chosen(yardsticks.TASKS["sst2"], "all", 1)
    assert len(whole["train"]) == 6920 and len(yardsticks.chosen(yardsticks.TASKS["sst2"], "2000", 1)["train"]) == 2000
    assert not {*map(tuple, whole["test"])} - {*map(tuple, yardsticks.TASKS["sst2"].parts()["test"])}


def test_scores_are_those_of_the_labels_given(yardsticks: Any) -> None:
    tasks = yardsticks.TASKS
    single = {"train": [("a", "", "x"), ("b", "", "y")], "test": [("c", "", "x"), ("d", "", "y")]}
    assert yardsticks.score(tasks["trec6"], single, np.array([0, 0])) == 50
    several = {"train": [("a", "", "x|y")], "test": [("c", "", "x|y"), ("d", "", "y")]}
    assert yardsticks.score(tasks["goemotions"], several, np.array([[True, True], [False, False]])) == pytest.approx(80)
    numbers = {"train": [("a", "b", "1")], "test": [("c", "d", str(value)) for value in (1, 2, 3)]}
    assert yardsticks.score(tasks["stsb"], numbers, np.array([3.0, 2.0, 1.0])) == pytest.approx(-100)
    assert yardsticks.score(tasks["stsb"], numbers, np.ones(3)) == 0  # a constant orders nothing


def test_runs_are_kept_and_not_repeated(
    yardsticks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def pretend(cell: dict[str, Any]) -> dict[str, Any]:
        done.append(cell)
        return {"score": 80.0 + cell["seed"], "train_rows": 120, "seconds": 10.0}

    monkeypatch.setattr(yardsticks, "in_own_process", pretend)
    flags = ["--tasks", "trec6", "--sizes", "few", "--trainers", "minibert", "--results", str(tmp_path / "y.json")]
    for seeds in (["1"], ["1", "3"]):
        monkeypatch.setattr(sys, "argv", ["yardsticks.py", *flags, "--seeds", *seeds])
        yardsticks.main()
    assert [cell["seed"] for cell in done] == [1, 3]
    assert "| trec6, few | 82.0 ± 1.4 (2), 10 s |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "y.json").read_text())["runs"]) == 2
