"""The reference scores' own arithmetic: rows, label order, verdicts, and what is not repeated."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from minibert.batching.plans import plan_epoch
from minibert.config import RunConfig
from minibert.data.loading import load_data
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("scores")


def test_tasks_have_the_rows_of_their_sources(scores: Any, shared_data: Path) -> None:
    sizes = {name: {part: len(rows) for part, rows in task.parts().items()} for name, task in scores.TASKS.items()}
    assert sizes["sst2"] == {"train": 6920, "validation": 872, "test": 1821}
    assert sizes["stsb"] == {"train": 5749, "validation": 1500, "test": 1379}
    assert sizes["mrpc"]["test"] == 1725 and sizes["mrpc"]["train"] + sizes["mrpc"]["validation"] == 4076
    assert sizes["trec6"] == sizes["trec50"] and sizes["trec6"]["test"] == 500
    assert sizes["goemotions"] == {"train": 43410, "validation": 5426, "test": 5427}
    assert sum(sizes["sms_spam"].values()) == 5572


def test_a_cap_keeps_the_shares_of_the_classes(scores: Any, shared_data: Path) -> None:
    task = scores.TASKS["sst2"]
    rows = scores.capped(task, None)["train"]
    assert len(rows) == task.max_rows and rows == scores.capped(task, None)["train"]
    assert Counter(row[2] for row in rows)["1"] / len(rows) == pytest.approx(3610 / 6920, abs=1e-3)


@pytest.mark.parametrize("name", ["trec50", "goemotions"])
def test_labels_have_minibert_s_order(name: str, scores: Any, shared_data: Path, tmp_path: Path) -> None:
    """Outputs are compared column by column."""
    import csv

    parts = {part: rows[:400] for part, rows in scores.TASKS[name].parts().items()}
    for part, rows in parts.items():
        with open(tmp_path / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "second", "label"), *rows])
    files = {part: str(tmp_path / f"{part}.csv") for part in parts}
    config = RunConfig(**files, text_column=("text",), label_delimiter="|" if name == "goemotions" else None)
    data = load_data(config)
    assert data.problem.labels == scores.label_names(scores.TASKS[name], parts)
    theirs = data.problem.targets(data.splits["test"].labels or [])
    assert np.array_equal(theirs, scores.targets(scores.TASKS[name], parts, "test"))


def test_transformers_can_be_given_the_batches_and_the_head_of_minibert(scores: Any, minilm: Path) -> None:
    lengths = list(range(1, 101))
    order = scores.OurOrder(lengths, seed=3)
    for epoch in range(2):
        planned = plan_epoch(np.array(lengths), batch_size=32, seed=3, epoch=epoch)
        assert list(order) == np.concatenate(planned).tolist()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3)
    scores.copy_our_head(theirs, 3)
    ours, _ = load_model(minilm, BertForSequenceClassification, num_labels=3, seed=3)
    assert torch.equal(theirs.classifier.weight, ours.classifier.out.weight) and not theirs.classifier.bias.any()


def test_verdicts(scores: Any) -> None:
    verdict = scores.verdict
    assert verdict({"minibert": [90.0, 91.0, 92.0], "transformers": [91.0, 92.0, 93.0]}) == "level"  # the seeds differ
    assert verdict({"minibert": [90.0, 90.1], "transformers": [90.4, 90.5]}) == "level"  # less than half a point
    assert verdict({"minibert": [90.0, 90.1], "transformers": [92.0, 92.1]}) == "minibert worse by 2.0"
    assert verdict({"minibert": [90.0], "transformers": [92.0]}) == "too few runs"


def test_kept_runs_are_not_repeated(
    scores: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    monkeypatch.setattr(scores, "RESULTS", tmp_path / "scores.json")
    done = []

    def pretend(task: Any, trainer: str, seed: int, cap: int | None) -> dict[str, Any]:
        done.append((task.name, trainer, seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        return {"scores": {"accuracy": 90.0 + seed}, "train_rows": 1, "wall_seconds": 1.0}

    monkeypatch.setattr(scores, "in_own_process", pretend)
    monkeypatch.setattr(sys, "argv", ["scores.py", "--tasks", "trec6", "--seeds", "1", "2"])
    with pytest.raises(KeyboardInterrupt):
        scores.main()
    assert len(json.loads((tmp_path / "scores.json").read_text())["runs"]) == 2
    scores.main()
    wanted = [("trec6", trainer, seed) for seed in (1, 2) for trainer in scores.TRAINERS]
    assert done == wanted[:3] + wanted[2:]  # only what was stopped is run again
    assert "91.50 ± 0.71" in capsys.readouterr().out
