"""--report-to: the flags, curves, final metrics and files of a run for TensorBoard, Weights & Biases or MLflow.

Each is a small class with `log`, `finish` and `stop`, and is imported only when asked for. None of them can end a
training: one that fails under way is given up with a warning, as train_log.jsonl has the same numbers.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minibert.config import OutputSettings
from minibert.errors import UserError
from minibert.filenames import CARD, METRICS, MODEL_FILES, RECORD, REPORT, TENSORBOARD, TRACKERS
from minibert.runtime.files import one_line, write_json

logger = logging.getLogger(__name__)

PROJECT = "minibert"  # where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME do not say otherwise
REPORT_FILES = (REPORT, METRICS, RECORD)  # not the predictions: they hold the texts
LABEL_LENGTH, VALUE_LENGTH = 100, 500  # MLflow takes names of 250 characters, older ones values of 500
LONGEST_REASON = 2000  # characters: services say at the end what to set
NOT_SETTINGS = ("output", "overwrite", "resume", "quiet", "check", "report_to", "run_name", "seeds", "search")


def check_trackers(config: OutputSettings) -> None:
    """Say what to install before any work is done."""
    for name in config.report_to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name, such as wandb makes
            raise UserError(f"--report-to {name}: {name} is not installed; pip install {name}")


@dataclass
class Trackers:
    """What a run reports to: names the numbers, and gives up a service that fails. With no service it does nothing."""

    services: dict[str, TensorBoard | WeightsAndBiases | MLflow]

    def log(self, line: dict[str, Any]) -> None:
        """A line of train_log.jsonl."""
        self._call(lambda service: service.log(curve_values(line), line["step"]))

    def finish(self, metrics: dict[str, Any], output: Path) -> None:
        """The end of a good run: final metrics, model and report."""
        self._call(lambda service: service.finish(final_values(metrics), artifacts(output)))
        self.services = {}

    def stop(self) -> None:
        """The end of any other; nothing after `finish`."""
        self._call(lambda service: service.stop())
        self.services = {}

    def _call(self, call: Callable[[Any], None]) -> None:
        for name, service in list(self.services.items()):
            try:
                call(service)
            except Exception as error:  # whatever a service or the way to it comes up with
                del self.services[name]
                logger.warning(f"--report-to {name} is given up: {one_line(error, LONGEST_REASON)}")


def open_trackers(config: OutputSettings, output: Path, record: dict[str, Any], step: int) -> Trackers:
    """The trackers that --report-to names; on --resume they go on with their runs, from `step`."""
    trackers, settings = Trackers({}), run_settings(record)
    title = config.run_name or output.resolve().name
    saved = _run_ids(output) if config.resume else {}
    ids = {}
    for name in config.report_to:
        try:
            if name == "tensorboard":
                service: Any = TensorBoard(output, title, settings, step if config.resume else None)
            else:
                kind = WeightsAndBiases if name == "wandb" else MLflow
                service = kind(output, title, settings, saved.get(name))
                ids[name] = service.id
        except Exception as error:
            trackers.stop()
            raise UserError(f"--report-to {name}: cannot begin ({one_line(error, LONGEST_REASON)})") from None
        trackers.services[name] = service
    if ids:
        write_json(output / TRACKERS, ids)
    return trackers


def _run_ids(output: Path) -> dict[str, str]:
    """Each tracker's name for the run, where it was begun with any."""
    try:
        saved = json.loads((output / TRACKERS).read_text(encoding="utf-8"))
        return {str(name): str(run_id) for name, run_id in saved.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def run_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Flags, rows and versions of run.json as one flat table."""
    flags = {
        key: value for key, value in record["flags"].items() if key not in NOT_SETTINGS and value not in (None, [])
    }
    flags = {key: ",".join(value) if isinstance(value, list) else value for key, value in flags.items()}
    rows = {f"rows_{part}": count for part, count in record["rows"].items()}
    versions = {f"{package}_version": version for package, version in record["versions"].items()}
    return flags | rows | {"labels": len(record["labels"])} | versions


def curve_values(line: dict[str, Any]) -> dict[str, float]:
    """{"loss": 1} -> {"train/loss": 1}, {"validation_accuracy": 1} -> {"validation/accuracy": 1}; no None."""
    values = {}
    for key, value in line.items():
        if key != "step" and isinstance(value, int | float):
            part, _, name = key.partition("_") if key.startswith("validation_") else ("train", "", key)
            values[f"{part}/{name}"] = float(value)
    return values


def final_values(metrics: dict[str, Any]) -> dict[str, float]:
    """metrics.json as final/PART/NAME, with each class's F1; lists and words left out."""
    values: dict[str, float] = {}
    for part, found in metrics.items():
        if isinstance(found, dict):
            numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
            values |= {f"final/{part}/{name}": float(value) for name, value in numbers.items()}
            for label, row in found.get("per_class", {}).items():
                name = _plain(label)
                name = name if f"final/{part}/f1/{name}" not in values else f"{name}_{len(values)}"
                values[f"final/{part}/f1/{name}"] = float(row["f1"])
    return values


def _plain(label: str) -> str:
    """A label in the letters, and of the length, that every tracker takes in a name; not "." or empty either."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in " ._-") else "_" for c in label[:LABEL_LENGTH])
    return name.strip(" .") or "_"


def artifacts(output: Path) -> dict[str, list[Path]]:
    """The files to keep, by kind."""
    found = {"model": (*MODEL_FILES, CARD), "report": REPORT_FILES}
    return {kind: [output / name for name in names if (output / name).is_file()] for kind, names in found.items()}


class TensorBoard:
    """Event files in OUTPUT/tensorboard. It keeps no files: the text tab says where they are."""

    def __init__(self, output: Path, title: str, settings: dict[str, Any], resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = output / TENSORBOARD
        self.settings = settings
        self.step = resumed_step or 0
        # Steps after the checkpoint are written again: the old ones are not to be shown.
        self.writer = SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self.writer.add_text("settings", f"{title}\n\n| flag | value |\n|---|---|\n{rows}", self.step)

    def log(self, values: dict[str, float], step: int) -> None:
        self.step = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, values: dict[str, float], files: dict[str, list[Path]]) -> None:
        paths = "\n".join(f"- {kind}: {path}" for kind, found in files.items() for path in found)
        self.writer.add_text("files", paths, self.step)
        self.writer.add_hparams(self.settings, values, run_name=".", global_step=self.step)
        self.writer.close()

    def stop(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb; its mode, project and place come from its own WANDB_... variables."""

    def __init__(self, output: Path, title: str, settings: dict[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=title,
            dir=os.environ.get("WANDB_DIR", str(output)),
            config=settings,
            id=run_id,
            resume="allow" if run_id and os.environ.get("WANDB_MODE") != "offline" else None,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id = str(self.run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def finish(self, values: dict[str, float], files: dict[str, list[Path]]) -> None:
        self.run.summary.update(values)
        for kind, paths in files.items():
            artifact = self.wandb.Artifact(f"{kind}-{self.id}", type=kind)
            for path in paths:
                artifact.add_file(str(path), policy="immutable")  # read in place, not copied first
            self.run.log_artifact(artifact)
        self.run.finish()

    def stop(self) -> None:
        self.run.finish(exit_code=130)


class MLflow:
    """A run of MLflow through its client, which shares no state with other runs of the process."""

    def __init__(self, output: Path, title: str, settings: dict[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a new store's tables are not news
        from mlflow import MlflowClient, entities

        self.client, self.entities = MlflowClient(), entities
        if run_id is not None:
            self.id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = str(self.client.create_run(number, run_name=title).info.run_id)
        params = [entities.Param(key, str(value)[:VALUE_LENGTH]) for key, value in settings.items()]
        for start in range(0, len(params), 100):  # the most that MLflow takes at once
            self.client.log_batch(self.id, params=params[start : start + 100])

    def log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # the most that MLflow takes at once
            self.client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def finish(self, values: dict[str, float], files: dict[str, list[Path]]) -> None:
        self.log(values, 0)
        for kind, paths in files.items():
            for path in paths:
                self.client.log_artifact(self.id, str(path), kind)
        self.client.set_terminated(self.id, "FINISHED")

    def stop(self) -> None:
        self.client.set_terminated(self.id, "KILLED")
