"""train_log.jsonl, and the signals that ask a training to stop."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from minibert.errors import UserError
from minibert.runtime import distributed
from minibert.runtime.files import writing

Watch = Callable[[dict[str, Any]], None]


class TrainLog:
    """The log of a run, one JSON object a line; `watch` is given each line, too."""

    def __init__(self, file: IO[str], watch: Watch) -> None:
        self.file, self.watch = file, watch

    @property
    def bytes(self) -> int:
        return self.file.tell()

    def write(self, line: dict[str, Any]) -> None:
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        self.watch(line)

    def sync(self) -> None:
        """Wait until the lines are on disk."""
        if distributed.is_main_process():
            with writing(Path(self.file.name)):
                os.fsync(self.file.fileno())


@contextmanager
def open_log(path: Path, start: int, watch: Watch) -> Iterator[TrainLog]:
    """The log, cut back to its first `start` bytes: steps after the checkpoint will be written again."""
    if not distributed.is_main_process():
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield TrainLog(file, watch)
        return
    with writing(path):
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    try:
        if file.tell() < start:
            raise UserError(f"{path}: shorter than when the checkpoint was written; put it back, or start anew")
        with writing(path):
            file.truncate(start)
            file.seek(0, os.SEEK_END)
        yield TrainLog(file, watch)
    finally:
        with suppress(OSError):  # lines that a full disk did not take
            file.close()


@contextmanager
def record_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the loop ends between two steps; a second one ends at once.

    torchrun repeats the signal by itself, sends SIGTERM to all when one has died, and kills what has not ended after
    half a minute: there it is only noted, and a process on its way out with an error has the time to tell it.
    """
    noted: list[int] = []
    leaving = True

    def note(number: int, _frame: object) -> None:
        if noted and not distributed.is_initialized():
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
        leaving = bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if leaving and distributed.is_initialized() else handler)
