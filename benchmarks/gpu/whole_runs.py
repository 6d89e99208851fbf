"""Whole runs, from files of texts to a model folder, in a process as users start it. Wall seconds count all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minibert.errors import UserError

from .results import ROOT
from .workloads import Setting, random_model_folder

ALL = 1 << 31  # texts


def finetune(setting: Setting, model: str, **flags: Any) -> dict[str, Any]:
    """`python -m minibert.finetune` on the whole corpus.

    model: minilm, which is pretrained, or base or large, of random weights.
    """
    corpus = setting.corpus()
    flags = {"model": model_folder(setting, model), "train": corpus.train, **flags}
    if corpus.validation is not None:
        flags["validation"] = corpus.validation
    if setting.smoke:
        flags |= {"max_train_samples": 64, "epochs": 1, "max_length": 32}
    output = setting.scratch / "run"
    command = ["-m", "minibert.finetune", "--quiet", "--output", str(output)]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    wall = seconds_of(command)
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "wall_seconds": wall,
        **metrics["speed"],
        "steps": metrics["train"]["steps"],
        "validation": {name: v for name, v in metrics["validation"].items() if isinstance(v, int | float)},
        "texts": corpus.name,
    }


def finetune_transformers(setting: Setting, model: str, epochs: int) -> dict[str, Any]:
    """The same with transformers at its best."""
    corpus, output = setting.corpus(), setting.scratch / "run"
    if corpus.validation is None:
        raise UserError("the validation texts are missing; give --packed, a folder that --pack has written")
    files = [model_folder(setting, model), corpus.train, corpus.validation, output]
    sizes = (1, 64) if setting.smoke else (epochs, ALL)
    wall = seconds_of(["-m", "gpu.transformers_run", *map(str, (*files, *sizes))])
    return {"wall_seconds": wall, **json.loads((output / "metrics.json").read_text()), "texts": corpus.name}


def model_folder(setting: Setting, model: str) -> Path:
    pretrained = setting.corpus().minilm
    if model != "minilm":
        return random_model_folder(setting, model)
    if pretrained is None:
        raise UserError("the weights of MiniLM are missing; give --packed, a folder that --pack has written")
    return pretrained


def seconds_of(arguments: list[str]) -> float:
    """Of a Python process from its start to its end; UserError where it ends with a user's error."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "benchmarks")])
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    seconds = time.perf_counter() - started
    if done.returncode == 2:  # what minibert refuses, with its reason in the last line
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    return round(seconds, 2)
