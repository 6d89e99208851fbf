"""A run whose terminal is closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("more", [[], ["--seeds", "1,2"]])
@pytest.mark.slow
def test_a_run_goes_on_where_nobody_reads_its_lines(
    arguments: Callable[..., list[str]], tmp_path: Path, more: list[str]
) -> None:
    command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run", *more)]
    command.remove("--quiet")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process, contextlib.ExitStack() as stack:  # type: ignore[call-overload]
        stack.callback(process.kill)  # if it says what it should not
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_closed_terminal_is_no_traceback(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run")])
    done = subprocess.run(f"{command} >&-", shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_full_terminal_log_is_one_line(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run")]
    command.remove("--quiet")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
