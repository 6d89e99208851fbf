"""Where Python has neither fcntl nor resource, as on Windows: a training and a prediction run all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDDEN = """
import sys, types
sys.modules["fcntl"] = sys.modules["resource"] = None
memory = types.ModuleType("psutil")
memory.Process = lambda: types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=1 << 30))
import torch
sys.modules["psutil"] = memory
import minibert
from minibert.cli import run_command
from minibert.finetune import main as train
from minibert.predict import main as answer
train_file, model, output = sys.argv[1:]
flags = ["--train", train_file, "--model", model, "--output", output, "--device", "cpu", "--epochs", "1"]
code = run_command(train, [*flags, "--max-steps", "12"])
sys.exit(code or run_command(answer, [output, "--text", "a good film"]))
"""


def test_a_training_runs_without_what_windows_lacks(films: Path, film_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HIDDEN, str(films), str(film_model), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1.0 GiB of memory so far" in done.stdout and (tmp_path / "run" / "model.safetensors").is_file()
    assert "good" in done.stdout.splitlines()[-1] or "bad" in done.stdout.splitlines()[-1]
