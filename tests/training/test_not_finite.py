"""Losses, gradients and weights that are not finite, and equal bits from run to run."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import STATE, one_line_error

from minibert.cli import run_command
from minibert.config import RunConfig
from minibert.finetune import main
from minibert.runtime.device import choose
from minibert.training import loop as train
from minibert.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[2]


def poisoned(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], value: float) -> None:
    """Gradients of the steps that `at` picks become NaN or infinite, as a bad batch makes them."""
    step = Optimizer.step

    def with_poison(self: Optimizer, number: int, loss: torch.Tensor | None = None) -> torch.Tensor:
        if at(number):
            gradient = self.parameters[0].grad
            assert gradient is not None
            gradient.view(-1)[0] = value
        return step(self, number, loss)

    monkeypatch.setattr(Optimizer, "step", with_poison)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_counted(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poisoned(monkeypatch, lambda number: number in (2, 3, 7), value)
    assert run_command(main, arguments(tmp_path / "run")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["speed"]["skipped_steps"] == 3 and np.isfinite(metrics["validation"]["loss"])


def test_ten_bad_steps_in_a_row_end_the_run_at_the_last_good_checkpoint(
    arguments: Callable[..., list[str]],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned(monkeypatch, lambda number: number >= 5, float("nan"))
    error = one_line_error(capsys, arguments(tmp_path / "run", "--epochs", "9"))
    assert "10 steps in a row, up to step 15" in error and f"the last batch holds {rows} rows " in error
    named = [
        int(word) for word in error.split(f"{rows} rows ")[1].split("; look")[0].replace("...", "").split(", ") if word
    ]
    assert len(named) >= 2 and all(2 <= line <= 41 for line in named)
    with files_of(tmp_path / "run" / STATE) as tensors:
        assert json.loads(tensors.metadata()["state"])["step"] == 4
        assert all(bool(torch.isfinite(tensors.get_tensor(name)).all()) for name in tensors.keys())  # noqa: SIM118


@contextlib.contextmanager
def files_of(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield file


@pytest.mark.parametrize("flags", ["--metric accuracy", "--validation-split 0", "--problem-type regression"])
def test_training_that_diverges_is_one_line(
    arguments: Callable[..., list[str]], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    """Too few steps for ten bad ones in a row, and weights that are finite, but nothing that comes out of them is."""
    if "regression" in flags:
        rows.write_text("text,label\n" + "\n".join(f"good film {i},{i / 3}" for i in range(40)))
    wild = [*"--learning-rate 1e30 --max-grad-norm 0 --max-steps 5 --head-init random".split(), *flags.split()]
    assert "training has diverged (lower --learning-rate)" in one_line_error(capsys, arguments(tmp_path / "run", *wild))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_diverged_weights_are_not_the_best(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argmax of NaN is the first class, which may well be right more often than the model that was."""
    compute_logits, seen = train.compute_logits, [0]

    def later_nan(*given: Any, **options: Any) -> np.ndarray:
        seen[0] += 1
        found = compute_logits(*given, **options)
        return found if seen[0] == 1 else np.full_like(found, np.nan)

    monkeypatch.setattr(train, "compute_logits", later_nan)
    assert (
        run_command(main, arguments(tmp_path / "run", *"--eval-steps 2 --metric accuracy --head-init random".split()))
        == 0
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["best_step"] == 2 and seen[0] > 2


def test_fp16_overflow_is_no_error_until_the_scale_is_used_up() -> None:
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()  # type: ignore[assignment]
    model.encoder.layers = torch.nn.ModuleList()  # type: ignore[union-attr]
    model.classifier = torch.nn.Linear(2, 2)
    from minibert.config import RunConfig

    optimizer = Optimizer(model, RunConfig(), 100, scale_loss=True)
    bad = []
    for number in range(18):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        optimizer.step(number, torch.tensor(1.0))
        bad.append(bool(optimizer.bad))
    assert bad == [False] * 16 + [True] * 2 and int(optimizer.skipped) == 18


def test_weights_that_are_no_numbers_are_refused(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    given = arguments(tmp_path / "run")
    path = Path(given[given.index("--model") + 1]) / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(tensors, path)
    assert "encoder.layer.0.output.dense.bias holds NaN" in one_line_error(capsys, given)


@pytest.mark.slow
def test_deterministic_runs_are_equal(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """In processes of their own: the switch is for the whole process."""
    for name in ("a", "b"):
        command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / name, "--deterministic")]
        subprocess.run(command, check=True, cwd=ROOT)
    for name in ("model.safetensors", "predictions-validation.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_deterministic_asks_torch_for_it() -> None:
    """On a CPU runs are equal anyway; on a GPU it is this switch that makes them so."""
    for wanted in (True, False):
        with choose(RunConfig(deterministic=wanted, device="cpu")).computing():
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()
