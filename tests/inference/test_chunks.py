"""A file of predictions is the same whatever the size of its chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minibert.data.examples import Examples
from minibert.inference import predictions
from minibert.problem.problem import SINGLE, Problem

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_of_predictions_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i}" for i in range(25)]
    examples = Examples("f", texts, None, ["ab"[i % 2] for i in range(25)], list(range(2, 27)))
    logits, targets = np.random.default_rng(0).normal(size=(25, 2)).astype(np.float32), np.arange(25) % 2
    for size in (1000, 10, 25):
        monkeypatch.setattr(predictions, "ROWS_PER_WRITE", size)
        predictions.write_predictions(tmp_path / f"{size}.csv", examples, Problem(SINGLE, ["a", "b"]), logits, targets)
    whole = (tmp_path / "1000.csv").read_text()
    assert whole.count("\n") == 26
    assert whole == (tmp_path / "10.csv").read_text() == (tmp_path / "25.csv").read_text()
