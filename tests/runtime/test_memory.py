"""Memory that runs out, and memory that stays flat."""

from __future__ import annotations

import gc
import importlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import one_line_error, resumes

from minibert.cli import run_command
from minibert.errors import UserError
from minibert.finetune import main
from minibert.model import checkpoint
from minibert.runtime.memory import split_on_oom
from minibert.training import loop as train
from minibert.training.best import BestWeights

ROOT = Path(__file__).resolve().parents[2]


def scarce(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Forward passes of more than `most` tokens fail as they do without memory; returns the sizes that passed."""
    from minibert.model.bert import BertForSequenceClassification

    logits = BertForSequenceClassification.logits
    sizes: list[int] = []

    def limited(self: Any, x: Any, masks: Any = None) -> torch.Tensor:
        tokens = int(x.packing.cu_seqlens[-1])
        if tokens > most:
            raise error
        sizes.append(tokens)
        return logits(self, x, masks)

    monkeypatch.setattr(BertForSequenceClassification, "logits", limited)
    return sizes


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["MemoryError", "cuda", "cpu"])
@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_not_the_effective_one(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    flags = (
        "--dropout",
        "0",
        "--class-weights",
        "balanced",
        "--learning-rate",
        "1e-3",
        "--gradient-accumulation-steps",
        "2",
    )
    assert run_command(main, arguments(tmp_path / "whole", *flags)) == 0
    given = [flag for flag in arguments(tmp_path / "scarce", *flags) if flag != "--quiet"]
    sizes = scarce(monkeypatch, 40, error)
    capsys.readouterr()
    assert run_command(main, given) == 0
    assert capsys.readouterr().out.count("memory ran out") in (1, 2) and max(sizes) <= 40
    logs = [losses(tmp_path / name) for name in ("whole", "scarce")]
    assert len(logs[0]) == len(logs[1]) and np.allclose(logs[0], logs[1], atol=2e-5)
    predictions = [
        (tmp_path / name / "predictions-validation.csv").read_text().count("\n") for name in ("whole", "scarce")
    ]
    assert predictions[0] == predictions[1]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_one_example_that_does_not_fit_is_one_line(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scarce(monkeypatch, 3, MemoryError())
    assert "not enough memory to train on one example" in one_line_error(
        capsys, arguments(tmp_path / "run", "--head-init", "random")
    )


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["MemoryError", "cuda", "cpu"])
def test_out_of_memory_where_nothing_can_be_halved_is_one_line(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fails(*given: Any) -> None:
        raise error

    monkeypatch.setattr(BestWeights, "restore_to", fails)
    assert "not enough memory" in one_line_error(capsys, arguments(tmp_path / "run"))
    monkeypatch.undo()
    resumes(arguments(tmp_path / "run"))


def test_other_runtime_errors_stay_what_they_are(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(monkeypatch, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(main, arguments(tmp_path / "run"))


def test_halving_computes_every_row_once() -> None:
    def compute(rows: np.ndarray) -> np.ndarray:
        if len(rows) > 3:
            raise MemoryError
        return rows * 2

    found = list(split_on_oom([np.arange(10), np.arange(10, 25), np.array([25])], compute))
    assert np.concatenate([rows for rows, _ in found]).tolist() == list(range(26))
    assert all(np.array_equal(result, rows * 2) for rows, result in found)
    with pytest.raises(UserError, match="one example"):
        list(split_on_oom([np.arange(2)], lambda rows: [][1] if len(rows) > 2 else _fail()))


def _fail() -> Any:
    raise MemoryError


def held_bytes() -> tuple[int, int]:
    """Tensors that are alive, and bytes of Python's and numpy's memory: no other process or allocator counts."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    return tensors, tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("leak", [None, torch.ones, np.ones], ids=["none", "a tensor a step", "an array a step"])
@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: Callable[[int], Any] | None) -> None:
    """Over 80 steps with evaluations and checkpoints nothing is kept of a step; what leaks on purpose is seen."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    job = importlib.import_module("memory").training(150)
    seen: dict[int, tuple[int, int]] = {}
    kept: list[Any] = []
    step = job.step

    def measured(chosen: train.Step) -> Any:
        if job.state.step in (60, 140):  # the first evaluation, at 50, has kept the best weights
            seen[job.state.step] = held_bytes()
        if leak is not None:
            kept.append(leak(1000))
        return step(chosen)

    job.step = measured
    tracemalloc.start()
    try:
        job.run(tmp_path / "train_log.jsonl", lambda: checkpoint.write_tensors(tmp_path / "state", job.best.weights))
    finally:
        tracemalloc.stop()
    (tensors, size), (later_tensors, later_size) = seen[60], seen[140]
    grown = later_tensors > tensors + 20 or (later_size - size) / 80 > 500
    assert grown == (leak is not None), (seen, job.state)
