"""--search: real searches of a few trials, killed and resumed, pruned, from Python, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import minibert
from minibert.cli import parse_run_config
from minibert.errors import UserError
from minibert.runs import folder, search, search_study

TEXTS = [f"{'good film very' if number % 2 else 'bad spam not'} {number}" for number in range(60)]
LABELS = ["good" if number % 2 else "bad" for number in range(60)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(TEXTS, LABELS, strict=True)])
    return path


def command(model: Path, rows: Path, output: Path, *flags: str) -> list[str]:
    files = ["--train", str(rows), "--model", str(model), "--output", str(output), "--test-split", "0.2"]
    return [sys.executable, "-m", "minibert.finetune", *files, "--epochs", "2", "--device", "cpu", *flags]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_search_leaves_the_best_model_and_the_command_that_makes_it(
    tiny: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    done = subprocess.run(
        command(tiny(), rows, output, "--search", "3"), capture_output=True, text=True, timeout=600, check=True
    )
    summary = json.loads((output / "search.json").read_text())
    values = {trial["number"]: trial["value"] for trial in summary["trials"] if trial["state"] == "complete"}
    assert [trial["number"] for trial in summary["trials"]] == [1, 2, 3]
    assert summary["best_trial"] == max(values, key=lambda number: values[number])
    assert all(f"trial {number} of 3" in done.stdout for number in (1, 2, 3))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["validation"]["macro_f1"] == pytest.approx(values[summary["best_trial"]])
    assert not list(output.glob("trial-*")) and not (output / "checkpoints").exists()
    assert "trial" in (output / "report.html").read_text(encoding="utf-8")
    assert "epochs" not in summary["searched"]  # which was given
    line = next(line for line in done.stdout.splitlines() if line.startswith("the same model again: "))
    words = line.removeprefix("the same model again: ").split()[3:]
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-m", "minibert.finetune", *words, "--output", str(again), "--quiet"], check=True)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (output, again)]
    assert weights[0] == weights[1]


def test_a_killed_search_goes_on_with_the_trials_it_has(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    output, model = tmp_path / "killed", tiny()
    words = command(model, rows, output, "--search", "3")
    with started(words) as process:
        while process.poll() is None:
            summary = output / "search.json"
            if summary.is_file() and len(json.loads(summary.read_text())["trials"]) == 1:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.02)
    first = json.loads((output / "search.json").read_text())["trials"]
    assert process.returncode == -signal.SIGKILL and len(first) == 1 and not (output / "metrics.json").exists()
    subprocess.run([*words, "--resume"], check=True, capture_output=True, timeout=600)
    trials = json.loads((output / "search.json").read_text())["trials"]
    assert len(trials) == 3 and trials[0] == first[0]  # seconds, too: it was not trained again
    assert (output / "metrics.json").is_file()
    whole = tmp_path / "whole"
    subprocess.run(command(model, rows, whole, "--search", "3"), check=True, capture_output=True, timeout=600)
    tried = [
        [trial["settings"] for trial in json.loads((f / "search.json").read_text())["trials"]] for f in (output, whole)
    ]
    assert tried[0] == tried[1]


@pytest.mark.parametrize("parameters", [1, 6])  # of the first trial's four, of the second's
def test_a_trial_that_a_kill_left_half_proposed_is_proposed_again(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: int
) -> None:
    from optuna.storages import JournalStorage

    original, written = JournalStorage.set_trial_param, [0]

    def killed(*given: Any) -> None:
        written[0] += 1
        if written[0] > parameters:
            raise RuntimeError("killed")
        original(*given)

    flags: dict[str, Any] = {"model": str(tiny()), "epochs": 1.0, "quiet": True, "search": 3}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(JournalStorage, "set_trial_param", killed)
        minibert.finetune(TEXTS, LABELS, output=str(tmp_path / "killed"), **flags)
    minibert.finetune(TEXTS, LABELS, output=str(tmp_path / "killed"), resume=True, **flags)
    minibert.finetune(TEXTS, LABELS, output=str(tmp_path / "whole"), **flags)
    trials = [json.loads((tmp_path / name / "search.json").read_text())["trials"] for name in ("killed", "whole")]
    tried = [[(trial["number"], trial["settings"], trial["value"]) for trial in part] for part in trials]
    assert tried[0] == tried[1] and [number for number, *_ in tried[0]] == [1, 2, 3]


def test_a_trial_behind_the_others_is_ended(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second trial on each is worse than the one before, at every evaluation."""
    monkeypatch.setattr(search_study, "FULL_TRIALS", 1)
    monkeypatch.setattr(search_study, "FIRST_PRUNED", 0)
    original, started_trials = search.watcher, [0]

    def worse(*given: Any) -> search.Watch:
        started_trials[0] += 1
        watch, loss = original(*given), float(started_trials[0])
        return lambda line: watch({**line, "validation_loss": loss} if "validation_loss" in line else line)

    monkeypatch.setattr(search, "watcher", worse)
    flags: dict[str, Any] = {"metric": "loss", "epochs": 3, "quiet": True, "search": 3}
    minibert.finetune(TEXTS, LABELS, model=str(tiny()), output=str(tmp_path / "run"), **flags)
    summary = json.loads((tmp_path / "run" / "search.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["complete", "pruned", "pruned"]
    assert summary["direction"] == "minimize" and summary["best_trial"] == 1
    assert all("behind the median" in trial["reason"] for trial in summary["trials"][1:])


def test_a_time_is_a_budget_and_the_first_trial_always_has_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    classifier = minibert.finetune(
        TEXTS, LABELS, model=str(tiny()), output=str(output), epochs=1, search="0.001s", quiet=True
    )
    assert len(json.loads((output / "search.json").read_text())["trials"]) == 1
    assert classifier.predict(["good film"])[0].label in ("good", "bad")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search", "0"], "--search 0: give a number of trials"),
        (["--search", "fast"], "--search fast: give a number of trials, such as 20, or a time"),
        (["--search", "1.5"], "--search 1.5: give a number of trials"),
        (["--search", "3", "--seeds", "1,2"], "--search with --seeds: one seed chooses; leave one of the two out"),
        (["--search", "3", "--check"], "--search with --check: it trains nothing; leave one of the two out"),
    ],
)
def test_what_a_search_refuses(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_run_config(["--train", "rows.csv", *flags])


def test_a_search_needs_validation_rows_and_its_package(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"model": str(tiny()), "output": str(tmp_path / "run"), "search": 2, "quiet": True}
    with pytest.raises(UserError, match="search: no validation rows to judge trials by"):
        minibert.finetune(TEXTS, LABELS, validation_split=0, **flags)
    with pytest.raises(UserError, match="search with report_to: trials are not reported"):
        minibert.finetune(TEXTS, LABELS, report_to="tensorboard", **flags)
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"search: needs Optuna.*\[search\]"):
        minibert.finetune(TEXTS, LABELS, **flags)
    assert not (tmp_path / "run").exists()
