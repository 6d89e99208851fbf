"""Small runs of the command finetune in this process, and what they must end with."""

from __future__ import annotations

from pathlib import Path

import pytest

from minibert.cli import run_command
from minibert.finetune import main

ROOT = Path(__file__).resolve().parents[1]

STATE = Path("checkpoints", "last", "state.safetensors")


def one_line_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run finetune, which must end with exit code 2 and one line."""
    capsys.readouterr()
    assert run_command(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def resumes(arguments: list[str]) -> None:
    assert run_command(main, [*arguments, "--resume"]) == 0
