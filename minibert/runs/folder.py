"""The folder of a run: whether it may be written, what an earlier run left there, and the lock on it."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.runs.search import check_optuna, remove_trials, search_begun
from minibert.runs.seeds import remove_runs, seed_folder
from minibert.runs.trackers import TENSORBOARD, check_tracker
from minibert.runtime import distributed
from minibert.runtime.device import choose
from minibert.runtime.files import locked, sweep
from minibert.training.resume import CHECKPOINTS, STATE_FILE

OUTPUT_FILES = """config.json model.safetensors tokenizer.json tokenizer_config.json metrics.json
check.json splits.json train_log.jsonl predictions-validation.csv predictions-test.csv report.html README.md model.onnx
model-int8.onnx tracker.json""".split()
METRICS = "metrics.json"  # written once training and evaluation are done
RECORD = "run.json"  # written as a run begins, removed last
CHECK = "check.json"  # what --check leaves; a run may follow in the same folder


def refuse_at_once(config: RunConfig) -> None:
    """What can be seen to fail before anything is read: flags without effect, no such device, a folder in use."""
    choose(config)
    check_tracker(config)
    if config.seeds and distributed.world() > 1:
        raise UserError("--seeds: for one process; under torchrun start one run for each --seed")
    if config.search is not None:
        check_search(config)
    if config.check and distributed.world() > 1:
        raise UserError("--check: for one process; leave torchrun out")
    if not distributed.is_first():  # the folder is not its own to write
        return
    if config.output is None:
        if config.resume:
            raise UserError("--resume: give --output, the folder of the run to continue")
        return
    output = Path(config.output)
    folders = [seed_folder(output, int(seed)) for seed in config.seeds] or [output]
    going_on = config.search is not None and search_begun(output)
    if (
        config.resume
        and not going_on
        and not any((folder / CHECKPOINTS / STATE_FILE).is_file() or begun(folder) for folder in folders)
    ):
        raise UserError(f"{output}: no checkpoint to resume; leave --resume out to start anew")
    if config.resume and not config.seeds and finished(output):
        raise UserError(f"{output}: this run is finished, nothing is left to resume; give --overwrite to train anew")
    if config.model is not None and not config.resume and output.resolve() == Path(config.model).resolve():
        raise UserError(f"--output {output}: is the model to start from; give another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another --output")
    refuse_full(output, config)


def check_search(config: RunConfig) -> None:
    """What --search needs, and what it does not go with."""
    check_optuna()
    if distributed.world() > 1:
        raise UserError("--search: for one process; leave torchrun out")
    if config.report_to != "none":
        raise UserError("--search with --report-to: trials are not reported; leave --report-to out")


def begun(output: Path) -> bool:
    """Whether a run was killed here before its first checkpoint: to resume it is to start it again."""
    if not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()}
    return RECORD in names or all(name == "checkpoints" or name.startswith(".") for name in names)


def finished(output: Path) -> bool:
    """Whether a run came to its end here: its results are written, and its checkpoint is gone."""
    return (output / METRICS).is_file() and not (output / CHECKPOINTS / STATE_FILE).is_file()


def refuse_full(output: Path, config: RunConfig) -> None:
    """A folder with anything in it but the result of --check."""
    if config.overwrite or config.resume or not output.is_dir():
        return
    if any(path.name != CHECK for path in output.iterdir()):
        raise UserError(f"{output}: not empty; give --overwrite, --resume or another --output")


def output_folder(config: RunConfig) -> Path:
    """--output, or a new folder runs/<time>, with a number where another run began in the same second."""
    if config.output is not None:
        return Path(config.output)
    name = f"{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def clear(output: Path) -> None:
    """Remove the files of an earlier run, and only those: nothing in a folder that no run has begun in."""
    if not (output / RECORD).is_file():
        return
    for folder in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in [*OUTPUT_FILES, RECORD]:
        (output / name).unlink(missing_ok=True)


def open_output(config: RunConfig, held: ExitStack) -> Path:
    """Make the output folder: --output, or runs/<time>, and lock it until `held` is closed.

    What an earlier run left there goes, unless it is resumed. Of several processes, the first alone does this.
    """
    if not distributed.is_first():
        return Path(config.output or "")
    try:
        output = output_folder(config)
        output.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(output))
        refuse_full(output, config)  # again: another run may have come and gone since
        for folder in (output, output / CHECKPOINTS):
            sweep(folder)
        if not config.resume:
            clear(output)
            remove_runs(output)
            remove_trials(output)
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{config.output or 'runs'}: cannot be made ({error.strerror}); give another --output"
        ) from None
    return output
