"""The figures of README are those of benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def row(first_word: str) -> list[str]:
    """The cells after the first of the table's row that begins so; its other words are free."""
    lines = [line for line in README.replace("**", "").splitlines() if line.startswith(f"| {first_word}")]
    assert len(lines) == 1, first_word
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def plus_minus(numbers: dict[str, float], digits: int) -> str:
    return f"{numbers['mean']:.{digits}f} ± {numbers['std']:.{digits}f}"


def test_steps() -> None:
    found = results("steps-cpu")
    names = ("transformers, padded to 175", "transformers, best", "minibert")
    assert row("training step") == [f"{found['milliseconds_a_step'][name]:.0f}" for name in names]
    assert found["commit"] in README


def test_whole_trainings() -> None:
    found = results("end-to-end")
    summary = found["summary"]
    seconds = {name: plus_minus(summary[name]["wall_seconds"], 1) for name in ("best", "minibert", "frozen-minibert")}
    assert row("full fine-tuning") == ["", seconds["best"], seconds["minibert"]]
    assert row("its accuracy") == ["", *(plus_minus(summary[name]["accuracy"], 3) for name in ("best", "minibert"))]
    tutorial = f"{summary['frozen-tutorial']['wall_seconds']['mean']:.1f}"
    assert row("encoder frozen") == [tutorial, "", seconds["frozen-minibert"]]
    assert found["commit"] in README


def test_prediction() -> None:
    found = results("serving-cpu")
    names = ("transformers pipeline", "transformers pipeline, sorted by length", "minibert")
    assert row("prediction") == [f"{found['texts_per_second'][name]:.0f}" for name in names]
    assert found["commit"] in README
