"""`python tests/interrupted.py N FLAGS`: the command finetune, which gets Ctrl-C while it takes its Nth step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from minibert.cli import run_command
from minibert.finetune import main
from minibert.training.loop import Training


def interrupted(step: int, flags: list[str], **options: Any) -> str:
    """Run this file in a process of its own; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **options.pop("env", {})}
    command = [sys.executable, __file__, str(step), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **options)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def interrupt_at(step: int) -> None:
    """Counted over all trainings of the process."""
    take, taken = Training.step, 0

    def take_and_count(self: Training, *given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, *given)

    Training.step = take_and_count  # type: ignore[method-assign]


if __name__ == "__main__":
    interrupt_at(int(sys.argv[1]))
    sys.exit(run_command(main, sys.argv[2:]))
