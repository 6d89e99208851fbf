"""--report-to: the command writes with the real libraries, offline; what they stored is read back."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needed
from interrupted import interrupted

import minibert.run
import minibert.runs.finish
import minibert.runs.trackers
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.reporting.console import console
from minibert.runs.trackers import Trackers, check_trackers, curve_values, final_values

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers' own libraries


def command(films: Path, film_model: Path, output: Path, tracker: str, *more: str) -> list[str]:
    recipe = ["--epochs", "4", "--lr", "5e-3", "--batch-size", "16", "--test-split", "0.2", "--report-to", tracker]
    given = ["--train", str(films), "--model", str(film_model), "--output", str(output)]
    return [sys.executable, "-m", "minibert.finetune", *given, *recipe, *more]


def finetune(*arguments: Any, env: dict[str, str] | None = None) -> Path:
    output: Path = arguments[2]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, **(env or {})}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=600, env=environment, cwd=output.parent
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "given up" not in done.stderr, done.stderr
    return output


def expected_curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    """What train_log.jsonl says, under the trackers' names."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in (output / "train_log.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in curve_values(row).items():
            curves.setdefault(name, []).append((row["step"], value))
    names = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "validation/macro_f1"}
    assert names <= set(curves)
    return curves


def test_tensorboard(films: Path, film_model: Path, tmp_path: Path) -> None:
    needed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = finetune(films, film_model, tmp_path / "run", "tensorboard", "--run-name", "films one")
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for name, points in expected_curves(output).items():
        stored = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in stored] == [step for step, _ in points]
        assert np.allclose([value for _, value in stored], [value for _, value in points])
    metrics = json.loads((output / "metrics.json").read_text())
    assert events.Scalars("final/test/accuracy")[0].value == pytest.approx(metrics["test"]["accuracy"])
    text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| learning_rate | 0.005 |" in text["settings/text_summary"] and "films one" in text["settings/text_summary"]
    assert "model.safetensors" in text["files/text_summary"]


def test_tensorboard_shows_a_resumed_run_as_one(films: Path, film_model: Path, tmp_path: Path) -> None:
    needed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    interrupt(films, film_model, output, "tensorboard")
    finetune(films, film_model, output, "tensorboard", "--max-steps", "60", "--epochs", "999", "--resume")
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    stored = [(event.step, event.value) for event in events.Scalars("train/loss")]
    points = expected_curves(output)["train/loss"]
    assert len(stored) == len(points) and np.allclose(stored, points)


def interrupt(films: Path, film_model: Path, output: Path, tracker: str, env: dict[str, str] | None = None) -> None:
    arguments = command(films, film_model, output, tracker, "--max-steps", "60", "--epochs", "999")
    interrupted(20, arguments[3:], env=env or {}, cwd=output.parent)


def test_mlflow(films: Path, film_model: Path, tmp_path: Path) -> None:
    mlflow = needed("mlflow")
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": "films"}
    output = tmp_path / "run"
    interrupt(films, film_model, output, "mlflow", env)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("films").experiment_id
    assert client.search_runs([experiment])[0].info.status == "KILLED"
    more = ("--max-steps", "60", "--epochs", "999", "--resume")
    finetune(films, film_model, output, "mlflow", *more, env=env)
    (run,) = client.search_runs([experiment])  # resumed: still the one run
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["learning_rate"] == "0.005" and run.data.params["rows_test"] == "32"
    for name, points in expected_curves(output).items():
        stored = {(m.step, round(m.value, 6)) for m in client.get_metric_history(run.info.run_id, name)}
        assert {(step, round(value, 6)) for step, value in points} <= stored, name
    metrics = json.loads((output / "metrics.json").read_text())
    assert run.data.metrics["final/test/accuracy"] == pytest.approx(metrics["test"]["accuracy"])
    assert run.data.metrics["final/test/f1/good"] == pytest.approx(metrics["test"]["per_class"]["good"]["f1"])
    kept = Path(client.download_artifacts(run.info.run_id, "model", str(tmp_path)))
    assert (kept / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert minibert.load(kept).predict(["the film is good"])[0].label == "good"
    assert {file.path for file in client.list_artifacts(run.info.run_id, "report")} >= {"report/metrics.json"}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format (blocks of 32 KiB, 7-byte headers) after 7 bytes of wandb."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb(films: Path, film_model: Path, tmp_path: Path) -> None:
    needed("wandb")
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT")}
    output = finetune(
        films, film_model, tmp_path / "run", "wandb", "--run-name", "films one", env={"WANDB_MODE": "offline", **places}
    )
    (stored,) = (output / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(stored))
    run = next(record.run for record in records if record.HasField("run"))
    assert run.display_name == "films one" and run.project == "minibert"
    settings = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert settings["learning_rate"] == 0.005 and settings["rows_test"] == 32
    history: dict[str, list[float]] = {}
    for record in records:
        if record.HasField("history"):
            for item in record.history.item:
                history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    for name, points in expected_curves(output).items():
        if name != "train/epoch":  # a line of training and one of evaluation share a step, and so an epoch
            assert np.allclose(history[name], [value for _, value in points]), name
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.HasField("summary")
        for item in record.summary.update
    }
    metrics = json.loads((output / "metrics.json").read_text())
    assert summary["final/test/accuracy"] == pytest.approx(metrics["test"]["accuracy"])
    kept = {record.artifact.type: record.artifact for record in artifacts_in(records)}
    files = {entry.path: entry for entry in kept["model"].manifest.contents}
    assert files["model.safetensors"].size == (output / "model.safetensors").stat().st_size
    assert "metrics.json" in {entry.path for entry in kept["report"].manifest.contents}


def artifacts_in(records: list[Any]) -> Iterator[Any]:
    for record in records:
        if record.HasField("artifact"):
            yield record
        elif record.HasField("request") and record.request.HasField("log_artifact"):
            yield record.request.log_artifact


def test_a_missing_package_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(minibert.runs.trackers, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(UserError, match=f"--report-to {name}: .* pip install {name}$"):
            check_trackers(RunConfig(report_to=(name,)))
        with pytest.raises(UserError, match=f"report_to='{name}'"):
            minibert.finetune(["a", "b"], [0, 1], report_to=name, model="/none", output=str(tmp_path / "x"))
    folder = ModuleSpec("wandb", None, is_package=True)  # what Python takes a folder for that wandb left
    monkeypatch.setattr(minibert.runs.trackers, "find_spec", lambda name: folder)
    with pytest.raises(UserError, match="wandb is not installed"):
        check_trackers(RunConfig(report_to=("wandb",)))
    check_trackers(RunConfig())
    assert not (tmp_path / "x").exists()


def test_nothing_is_imported_unasked(films: Path, film_model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from minibert.cli import run_command
from minibert.finetune import main
flags = ["--train", {str(films)!r}, "--model", {str(film_model)!r}, "--max-steps", "1", "--output", "x", "--quiet"]
assert run_command(main, flags) == 0
assert not [name for name in ("tensorboard", "wandb", "mlflow") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not (tmp_path / "x" / "tracker.json").exists() and not (tmp_path / "x" / "tensorboard").exists()


def test_a_failing_service_is_given_up_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("server\nis away")

    class Working:
        steps: list[int] = []  # noqa: RUF012

        def log(self, values: dict[str, float], step: int) -> None:
            self.steps.append(step)

        def stop(self) -> None:
            self.steps.append(-1)

    trackers = Trackers({"mlflow": Broken(), "tensorboard": Working()})  # type: ignore[dict-item]
    with console(quiet=True):
        trackers.log({"step": 1, "loss": 0.5})
        trackers.log({"step": 2, "loss": 0.5})
        trackers.stop()
        trackers.stop()
    assert Working.steps == [1, 2, -1]  # the other one goes on
    assert capsys.readouterr().err == "warning: --report-to mlflow is given up: server is away\n"


def test_a_run_that_fails_after_training_ends_its_tracker(
    films: Path, film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []

    class Service:
        log = finish = lambda *_: None

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(minibert.run, "open_trackers", lambda *_: Trackers({"service": Service()}))  # type: ignore[arg-type]
    flags = {"train": str(films), "model": str(film_model), "max_steps": 2, "quiet": True}
    minibert.run.run_from_files({**flags, "output": str(tmp_path / "well")}, ["x"])
    assert not stopped

    def full(*_: object) -> None:
        raise UserError("disk full")

    monkeypatch.setattr(minibert.runs.finish, "write_report", full)
    with pytest.raises(UserError, match="disk full"):
        minibert.run.run_from_files({**flags, "output": str(tmp_path / "badly")}, ["x"])
    assert stopped == [True]


def test_names_of_values() -> None:
    line = {"step": 3, "loss": None, "grad_norm": 2, "validation_macro_f1": 0.5}
    assert curve_values(line) == {"train/grad_norm": 2.0, "validation/macro_f1": 0.5}
    metrics = {"test": {"accuracy": 1.0, "confusion_matrix": [[1]], "per_class": {"a/b é": {"f1": 0.5}}}, "x": 1.0}
    assert final_values(metrics) == {"final/test/accuracy": 1.0, "final/test/f1/a_b _": 0.5}
    odd = {"test": {"per_class": {name: {"f1": 0.5} for name in ("é", "è", "..", "", "x" * 999)}}}
    names = [name.removeprefix("final/test/f1/") for name in final_values(odd)]
    assert len(set(names)) == 5 and all(re.fullmatch(r"[\w-][\w .-]{0,110}", name, re.ASCII) for name in names)
