"""Ctrl-C and --resume give the bits of a run that was not stopped, for every kind of data and way to compute."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import CPU, FIXED

from minibert import run
from minibert.cli import given_settings
from minibert.runs import setup
from minibert.runtime.device import Hardware
from minibert.training import flat_adamw as flat
from minibert.training import loop as train
from minibert.training import optimizer as optim

pytestmark = pytest.mark.usefixtures("references_of_kernels")
WORDS = "the a of good bad film very not free call now you money".split()
STEPS = 12
DATA = {  # flags by what the rows are
    "classes": ["--train", "classes.csv"],
    "windows": ["--train", "classes.csv", "--truncation", "window", "--max-length", "12", "--window-stride", "4"],
    "pairs": ["--train", "pairs.csv", "--truncation", "head_tail", "--max-length", "16"],
    "windows of pairs": ["--train", "pairs.csv", "--truncation", "window", "--max-length", "16"],
    "several labels": ["--train", "several.csv", "--label-delimiter", "|"],
    "numbers": ["--train", "numbers.csv"],
    "numbers in windows": ["--train", "numbers.csv", "--truncation", "window", "--max-length", "12"],
}
OPTIONS = {  # that no run of real kills has
    "all frozen": "--freeze all --head mlp:16 --save-steps 1 --class-weights balanced",
    "every row": "--no-compact-vocabulary --no-cls-only --label-smoothing 0.1 --schedule cosine --test-split 0.2",
}
HARDWARE = {  # that the flags of a run give on a GPU alone
    "fixed shapes": FIXED,
    "fixed shapes in bf16": Hardware(CPU, "bf16", "sdpa", "fixed"),
    "fixed shapes with a loss scale": Hardware(CPU, "fp16", "sdpa", "fixed"),
    "a loss scale": Hardware(CPU, "fp16", "sdpa", "eager"),
    "kernels": Hardware(CPU, "fp32", "sdpa", "fixed", kernels=True),
}


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and data of every kind."""
    tiny().rename(tmp_path / "model")
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 30))) for _ in range(60)]
    labels = ["xyz"[i % 3] for i in range(60)]
    tables = {
        "classes.csv": [("text", "label"), *zip(texts, labels, strict=True)],
        "pairs.csv": [("sentence1", "sentence2", "label"), *zip(texts, texts[1:] + texts[:1], labels, strict=True)],
        "several.csv": [
            ("text", "label"),
            *((t, "|".join(w for w in ("good", "bad", "film") if w in t)) for t in texts),
        ],
        "numbers.csv": [("text", "label"), *((text, str(len(text) / 7 + 0.25)) for text in texts)],
    }
    for name, rows in tables.items():
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(output: str, *flags: str) -> None:
    common = f"--model model --output {output} --quiet --device cpu --batch-size 8 --lr 1e-3 --dropout 0.2".split()
    steps = f"--max-steps {STEPS} --eval-steps 5 --epochs 99".split()
    run.run_from_files(given_settings([*common, *steps, *flags]), [])


def results(output: str) -> dict[str, Any]:
    """All that a run leaves, less what a clock says."""
    log = [json.loads(line) for line in Path(output, "train_log.jsonl").read_text().splitlines()]
    metrics = json.loads(Path(output, "metrics.json").read_text())
    files = ("model.safetensors", "config.json", "predictions-validation.csv")
    return {
        "log": [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log],
        "metrics": {key: value for key, value in metrics.items() if key != "speed"},
        "skipped": metrics["speed"]["skipped_steps"],
        **{name: Path(output, name).read_bytes() for name in files},
    }


def assert_resume_changes_nothing(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """One run without a stop, and one that gets Ctrl-C in the middle of its seventh step and is resumed."""
    finetune("whole", *flags)
    with monkeypatch.context() as patch:
        step = train.Training.step

        def interrupted(self: train.Training, chosen: train.Step) -> Any:
            if self.state.step == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, chosen)

        patch.setattr(train.Training, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune("stopped", *flags)
    finetune("stopped", *flags, "--resume")
    steps = [line["step"] for line in results("whole")["log"] if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert results("stopped") == results("whole")


@pytest.mark.parametrize("kind", list(DATA))
@pytest.mark.slow
def test_resume_of_every_kind_of_data(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert_resume_changes_nothing(monkeypatch, *DATA[kind])
    config = json.loads((folder / "whole" / "config.json").read_text())
    assert ("window" in kind) == (config["minibert"]["truncation"] == "window")


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.slow
def test_resume_of_other_options(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert_resume_changes_nothing(monkeypatch, *DATA["classes"], *OPTIONS[name].split())


@pytest.mark.parametrize("name", list(HARDWARE))
@pytest.mark.slow
def test_resume_of_every_way_to_compute(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hardware = HARDWARE[name]
    monkeypatch.setattr(setup, "choose", lambda config: hardware)
    for module in (optim, flat):  # so large that the first steps overflow in fp16, and it has come down by the stop
        monkeypatch.setattr(module, "FIRST_LOSS_SCALE", 2.0**20)
    assert_resume_changes_nothing(monkeypatch, *DATA["classes"], "--gradient-accumulation-steps", "2")
    speed = json.loads((folder / "whole" / "metrics.json").read_text())["speed"]
    assert (0 < speed["skipped_steps"] < 6) == (hardware.precision == "fp16")
    assert (speed["engine"], speed["precision"]) == (hardware.engine, hardware.precision)
