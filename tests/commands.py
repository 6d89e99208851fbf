"""minibert's commands as a user runs them: in a process of their own, or, where that proves as much, in this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from minibert.cli import run_command

Done = subprocess.CompletedProcess[str]


def run(*arguments: str, text: str | None = None, check: bool = True, cwd: Path | None = None) -> Done:
    """`python -m` with these arguments; `text` is its standard input."""
    given = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, **given)  # type: ignore[call-overload]
    if check:
        assert done.returncode == 0, done.stderr
    return done


def run_here(name: str, *arguments: str, text: str | None = None, check: bool = True, cwd: Path | None = None) -> Done:
    """The same in this process, which costs no start of Python and torch."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    stdin = sys.stdin
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given:  # a file, as predict reads its descriptor
        given.write(text or "")
        given.seek(0)
        sys.stdin = given
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd or Path.cwd()):
                code = run_command(import_module(name).main, arguments)
        finally:
            sys.stdin = stdin
    said = [stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush()]  # type: ignore[attr-defined]
    if check:
        assert code == 0, said[1]
    return subprocess.CompletedProcess(arguments, code, *said)
