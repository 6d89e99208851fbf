"""Runs rows in processes of their own until the time is up. One that dies or hangs costs only itself."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minibert.errors import UserError

from .plan import Row
from .results import ROOT, Results, describe
from .workloads import Setting

GRACE = 10.0  # seconds that a row may take beyond the budget
TO_DESCRIBE = 120.0  # seconds to name the device; the first start of a GPU and of torch is slow
SMOKE_LIMIT = 600.0  # seconds of a row on a slow CPU
MOST_DEATHS = 3  # in a row, before the machine is taken for broken
DESCRIBE = "describe the machine"


@dataclass(frozen=True)
class Options:
    """Of a call."""

    packed: Path | None
    smoke: bool
    cpu: bool
    commit: str
    retry: bool = False


class Stopped(Exception):
    """A row's process did not end by itself in time."""


class Died(Exception):
    """A row's process ended without a result."""


def machine(options: Options) -> dict[str, Any]:
    """The header of the results file, by a process of its own: the driver may hang, too."""
    try:
        return run_process(DESCRIBE, options, TO_DESCRIBE)
    except (Stopped, Died) as error:
        raise UserError(f"torch does not start here: {error}") from None


def measure(rows: list[Row], results: Results, options: Options, ends: float) -> list[str]:
    """Measure what the file lacks until the time `ends`; returns the names of the rows that are left."""
    left, deaths = [], 0
    for row in rows:
        if results.has(row.name, options.retry):
            continue
        if time.time() + row.seconds > ends or deaths >= MOST_DEATHS:
            left.append(row.name)
            continue
        started = time.time()
        limit, rest = SMOKE_LIMIT if options.smoke else row.limit, ends + GRACE - started
        value = measure_row(row, options, min(limit, rest))
        if "stopped" in value and rest < limit:  # by the end of the budget: another call may measure it
            left.append(row.name)
            continue
        seconds = round(time.time() - started, 1)
        deaths = deaths + 1 if "died" in value or "stopped" in value else 0
        about = {"commit": options.commit, "driver": results.header["driver"], "seconds": seconds}
        results.rows[row.name] = value | about
        results.write()
        print(f"{row.name:<66} {seconds:>6.1f} s  {brief(value)}", flush=True)
    if deaths >= MOST_DEATHS:
        print(f"{MOST_DEATHS} processes in a row died or hung: the other rows are left for another call", flush=True)
    return left


def measure_row(row: Row, options: Options, limit: float) -> dict[str, Any]:
    """The row's figures, or {"error": ...} or {"not_available": ...}."""
    if row.needs and find_spec(row.needs) is None:
        return {"not_available": f"{row.needs} is not installed"}
    try:
        return run_process(row.name, options, limit)
    except Stopped as error:
        return {"error": str(error), "stopped": True}
    except Died as error:
        return {"error": str(error), "died": True}


def run_process(name: str, options: Options, limit: float) -> dict[str, Any]:
    """What `serve` writes for the row, in a process group that does not outlive `limit` seconds."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        report, log = Path(scratch) / "report.json", Path(scratch) / "log.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command(name, options, scratch),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment(options),
                start_new_session=True,
            )
            finished = wait(process, limit)
        tail = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
        if report.exists():
            result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            return result
        if not finished:
            raise Stopped(f"stopped after {limit:.0f} s; it was here:\n{tail}")
        raise Died(f"ended with code {process.returncode}:\n{tail}")


def command(name: str, options: Options, scratch: str) -> list[str]:
    """What measures one row."""
    found = [sys.executable, str(Path(__file__).parent), "--row", name, "--scratch", scratch]
    found += ["--packed", str(options.packed.resolve())] if options.packed else []
    return found + (["--smoke"] if options.smoke else [])


def environment(options: Options) -> dict[str, str]:
    """Of a row's process and of those that it starts."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {})


def wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether the process ended in time. Else it prints where it is, and it and its children are killed."""
    try:
        process.wait(max(limit, 1.0))
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)  # to `faulthandler`, which prints the stack
        time.sleep(1.0)
        return False
    finally:  # also on Ctrl-C, and for what a finished process has left running
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even a killed process
            process.wait(GRACE)


def end_with_supervisor() -> None:
    """In a row's process: its standard input ends when the supervisor does, however that came to die."""

    def wait_and_end() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_and_end, daemon=True).start()


def serve(name: str, rows: list[Row], setting: Setting) -> None:
    """In a row's process: measure it and write the report."""
    end_with_supervisor()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    value = describe(setting.smoke) if name == DESCRIBE else guarded({row.name: row for row in rows}[name], setting)
    temporary = setting.scratch / "report.tmp"
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, setting.scratch / "report.json")


def guarded(row: Row, setting: Setting) -> dict[str, Any]:
    """The figures, or why there are none."""
    torch._dynamo.config.disable = setting.smoke  # compiling takes longer than all the rest
    try:
        return row.measure(setting)
    except (UserError, ImportError) as error:
        return {"not_available": str(error)[:1000]}
    except Exception as error:  # whatever torch, Triton or the driver may raise: the row says it, the others go on
        return {"error": f"{type(error).__name__}: {error}"[:1500]}


def brief(value: dict[str, Any]) -> str:
    """The first figures, on one line."""
    text = "  ".join(f"{key} {v}" for key, v in value.items() if isinstance(v, int | float | str))
    return " ".join(text.split())[:110]
