"""The folder of a run: whether it may be written, what an earlier run left there, and the lock on it."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from minibert.config import OutputSettings, RunConfig
from minibert.errors import UserError
from minibert.filenames import (
    CARD,
    CHECK,
    CHECKPOINTS,
    GITIGNORE,
    METRICS,
    MODEL_FILES,
    ONNX,
    ONNX_INT8,
    RECORD,
    REPORT,
    SEARCH,
    SEARCH_JOURNAL,
    SEEDS,
    SPLITS,
    TENSORBOARD,
    TRACKERS,
    TRAIN_LOG,
    predictions_file,
)
from minibert.inference.hub import check_hub
from minibert.runs.trackers import check_trackers
from minibert.runtime import distributed
from minibert.runtime.device import choose
from minibert.runtime.files import locked, sweep
from minibert.training.resume import STATE_FILE

OUTPUT_FILES = (
    *MODEL_FILES,
    *(METRICS, CHECK, SPLITS, TRAIN_LOG, REPORT, CARD, TRACKERS, GITIGNORE),
    *(predictions_file("validation"), predictions_file("test")),
    *(ONNX, ONNX_INT8, "model.onnx", "model-int8.onnx"),  # the last two: of versions before
)


def refuse_at_once(config: RunConfig) -> None:
    """What can be seen to fail before anything is read: flags without effect, no such device, a folder in use."""
    choose(config)
    if config.push_to_hub is not None and distributed.is_main_process():
        check_hub(config.push_to_hub)
    check_trackers(config)
    if config.seeds and distributed.world_size() > 1:
        raise UserError("--seeds: for one process; under torchrun start one run for each --seed")
    if config.search is not None:
        check_search(config)
    if config.check and distributed.world_size() > 1:
        raise UserError("--check: for one process; leave torchrun out")
    if not distributed.is_main_process():  # the folder is not its own to write
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


def check_optuna() -> None:
    """Say what to install before any work is done."""
    if find_spec("optuna") is None:
        raise UserError("--search: needs Optuna, which the extra `search` brings: pip install -e '.[search]'")


def check_search(config: RunConfig) -> None:
    """What --search needs, and what it does not go with."""
    check_optuna()
    if distributed.world_size() > 1:
        raise UserError("--search: for one process; leave torchrun out")
    if config.report_to:
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


def refuse_full(output: Path, config: OutputSettings) -> None:
    """A folder with anything in it but the result of --check."""
    if config.overwrite or config.resume or not output.is_dir():
        return
    if any(path.name != CHECK for path in output.iterdir()):
        raise UserError(f"{output}: not empty; give --overwrite, --resume or another --output")


def output_folder(config: OutputSettings) -> Path:
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


def open_output(config: OutputSettings, held: ExitStack) -> Path:
    """Make the output folder: --output, or runs/<time>, and lock it until `held` is closed.

    What an earlier run left there goes, unless it is resumed. Of several processes, the first alone does this.
    """
    if not distributed.is_main_process():
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


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}"


def remove_runs(output: Path, keep: Path | None = None) -> None:
    """Take away what an earlier run with --seeds left in `output`, except the folder to keep."""
    for folder in output.glob("seed-*"):
        if folder != keep and (folder / RECORD).is_file():  # only what is ours
            shutil.rmtree(folder)
    (output / SEEDS).unlink(missing_ok=True)


def trial_folder(output: Path, number: int) -> Path:
    return output / f"trial-{number}"


def search_begun(output: Path) -> bool:
    return (output / SEARCH_JOURNAL).is_file()


def remove_trials(output: Path) -> None:
    """Take away what an earlier search left in `output`."""
    if not search_begun(output):
        return
    for folder in output.glob("trial-*"):
        if (folder / CHECKPOINTS).is_dir():  # only what is ours
            shutil.rmtree(folder)
    for name in (SEARCH, SEARCH_JOURNAL, f"{SEARCH_JOURNAL}.lock"):
        (output / name).unlink(missing_ok=True)
