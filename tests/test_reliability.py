"""What may go wrong around a run: disks that fill, folders that vanish, numbers that are none, memory that runs out."""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import gc
import importlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minibert import run
from minibert.cli import run_command
from minibert.config import RunConfig
from minibert.data.examples import Examples
from minibert.errors import UserError
from minibert.finetune import main
from minibert.inference import predictions
from minibert.model import checkpoint
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime import files
from minibert.runtime.memory import split_on_oom
from minibert.training import loop as train
from minibert.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[1]
STATE = Path("checkpoints", "last", "state.safetensors")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    words = "good bad film very not free call now".split()
    lines = [f"{' '.join(words[: 1 + i % 8])} {i},{'ab'[i % 2]}" for i in range(40)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def arguments(tiny: Callable[..., Path], rows: Path) -> Callable[..., list[str]]:
    model = tiny()

    def make(output: Path, *flags: str) -> list[str]:
        fixed = ["--train", str(rows), "--model", str(model), "--output", str(output), "--quiet", "--device", "cpu"]
        return [*fixed, "--epochs", "2", "--batch-size", "8", "--save-steps", "2", *flags]

    return make


def one_line_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run finetune, which must end with exit code 2 and one line."""
    capsys.readouterr()
    assert run_command(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def resumes(arguments: list[str]) -> None:
    assert run_command(main, [*arguments, "--resume"]) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "save", "write"])
def test_a_refused_write_is_one_line_and_leaves_the_last_checkpoint(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
    code: int,
) -> None:
    """Each way to write fails from its seventh or eighth use on, after the first checkpoint; later the run goes on."""
    output = tmp_path / "run"
    count = 0
    kept = b""

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_fail(*given: Any, **options: Any) -> Any:
            nonlocal count, kept
            if (output / STATE).exists():
                count += 1
                if count == 8:
                    kept = (output / STATE).read_bytes()
                if count >= 8:
                    raise OSError(code, os.strerror(code))
            return function(*given, **options)

        return call_or_fail

    with monkeypatch.context() as patch:
        if call in ("fsync", "replace"):
            patch.setattr(files.os, call, failing(getattr(os, call)))
        elif call == "save":
            patch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
        else:

            def opened(*given: Any, **options: Any) -> Any:
                log = open(*given, **options)  # noqa: SIM115 - the caller closes it
                log.write = failing(log.write)  # type: ignore[method-assign]
                return log

            patch.setattr(train, "open", opened, raising=False)
        limit = 2 if call in ("replace", "save") else 8
        count = 8 - limit
        error = one_line_error(capsys, arguments(output))
    assert os.strerror(code) in error and "cannot be written" in error
    assert (output / STATE).read_bytes() == kept
    assert not [path for path in output.rglob(".*.tmp")]
    resumes(arguments(output))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(arguments: Callable[..., list[str]], small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1430 << 10))
    assert "cannot be written" in one_line_error(capsys, arguments(small_disk / "run"))
    filler.unlink()
    resumes(arguments(small_disk / "run"))


def test_a_read_only_disk(
    arguments: Callable[..., list[str]], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in one_line_error(capsys, arguments(small_disk / "run"))


def test_a_limit_on_file_sizes(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """As quotas do it: the file that grows too large cannot be written, in a real process."""
    command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and not (tmp_path / "run" / STATE).exists()
    resumes(arguments(tmp_path / "run"))


def test_a_vanished_folder(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    step = train.Training._step
    for vanish_at in (3, 9):

        def deleting(self: train.Training, chosen: train.Step, vanish_at: int = vanish_at) -> Any:
            if self.state.step == vanish_at:
                shutil.rmtree(output)
            return step(self, chosen)

        monkeypatch.setattr(train.Training, "_step", deleting)
        assert "No such file or directory" in one_line_error(capsys, arguments(output))
        assert not output.exists()


def test_two_runs_on_one_folder(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run_command(main, arguments(output, "--keep-checkpoint")) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for flag in ("--resume", "--overwrite"):
        assert "another run is writing here" in one_line_error(capsys, [*arguments(output), flag])
    os.close(descriptor)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    resumes(arguments(output))


def test_overwriting_takes_only_what_a_run_left(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    output, theirs = tmp_path / "project", tmp_path / "project" / "checkpoints" / "other.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    (output / "splits.json").write_text("mine, too")
    (output / "tracker.json").write_text("and mine")
    assert run_command(main, [*arguments(output), "--overwrite"]) == 0
    assert (output / "tracker.json").read_text() == "and mine"  # there was no run
    assert run_command(main, [*arguments(output), "--overwrite"]) == 0
    assert theirs.read_text() == "mine" and not (output / "tracker.json").exists()


def test_the_model_to_start_from_is_never_overwritten(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run_command(main, arguments(output)) == 0
    before = (output / "model.safetensors").read_bytes()
    assert "is the model to start from" in one_line_error(
        capsys, [*arguments(output), "--model", str(output), "--overwrite"]
    )
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("more", [[], ["--seeds", "1,2"]])
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


def test_a_closed_terminal_is_no_traceback(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run")])
    done = subprocess.run(f"{command} >&-", shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_resume_from_another_folder(
    arguments: Callable[..., list[str]], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are those of the folder that the run was begun in; of the files their content counts."""
    monkeypatch.chdir(tmp_path)
    whole = arguments(Path("run"))
    whole[whole.index("--train") + 1] = rows.name
    assert run_command(main, [*whole, "--keep-checkpoint"]) == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert (
        run_command(main, ["--resume", "--output", "../run"]) == 0
    )  # with the flags of the run, which keep the checkpoint
    moved = tmp_path / "below" / "moved.csv"
    moved.write_bytes(rows.read_bytes())
    again = [*arguments(Path("../run")), "--train", str(moved), "--resume", "--keep-checkpoint"]
    assert run_command(main, again) == 0
    moved.write_bytes(rows.read_bytes().replace(b"film", b"book", 1))
    assert run_command(main, again) == 2


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minibert.runs import folder as output

    class Noon:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 1, 2, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "datetime", Noon)
    found = [str(output.output_folder(RunConfig())) for _ in range(3)]
    assert found == ["runs/20260102-120000", "runs/20260102-120000-2", "runs/20260102-120000-3"]


def test_a_full_terminal_log_is_one_line(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / "run")]
    command.remove("--quiet")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_long_run_keeps_one_checkpoint(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last and best are one file that is replaced: the folder does not grow with the number of checkpoints."""
    output = tmp_path / "run"
    sizes: list[int] = []
    save = run.save_checkpoint

    def measured(*given: Any) -> None:
        save(*given)
        assert [path.name for path in (output / "checkpoints").rglob("*")] == ["last", "state.safetensors"]
        sizes.append((output / STATE).stat().st_size)

    monkeypatch.setattr(run, "save_checkpoint", measured)
    flags = ["--save-steps", "1", "--eval-steps", "2", "--epochs", "6"]
    assert run_command(main, arguments(output, *flags)) == 0
    assert len(sizes) == 30 and max(sizes[10:]) - min(sizes[10:]) < 1000  # numbers of other lengths, no more


def test_writing_to_a_device_or_through_a_link_replaces_neither(tmp_path: Path) -> None:
    files.write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "x"


# Numbers


def poisoned(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], value: float) -> None:
    """Gradients of the steps that `at` picks become NaN or infinite, as a bad batch makes them."""
    step = Optimizer.step

    def with_poison(self: Optimizer, number: int, loss: torch.Tensor | None = None) -> torch.Tensor:
        if at(number):
            gradient = self.parameters[0].grad
            assert gradient is not None
            gradient.view(-1)[0] = value
        return step(self, number, loss)

    monkeypatch.setattr(Optimizer, "step", with_poison)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_counted(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poisoned(monkeypatch, lambda number: number in (2, 3, 7), value)
    assert run_command(main, arguments(tmp_path / "run")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["speed"]["skipped_steps"] == 3 and np.isfinite(metrics["validation"]["loss"])


def test_ten_bad_steps_in_a_row_end_the_run_at_the_last_good_checkpoint(
    arguments: Callable[..., list[str]],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned(monkeypatch, lambda number: number >= 5, float("nan"))
    error = one_line_error(capsys, arguments(tmp_path / "run", "--epochs", "9"))
    assert "10 steps in a row, up to step 15" in error and f"the last batch holds {rows} rows " in error
    named = [
        int(word) for word in error.split(f"{rows} rows ")[1].split("; look")[0].replace("...", "").split(", ") if word
    ]
    assert len(named) >= 2 and all(2 <= line <= 41 for line in named)
    with files_of(tmp_path / "run" / STATE) as tensors:
        assert json.loads(tensors.metadata()["state"])["step"] == 4
        assert all(bool(torch.isfinite(tensors.get_tensor(name)).all()) for name in tensors.keys())  # noqa: SIM118


@contextlib.contextmanager
def files_of(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield file


@pytest.mark.parametrize("flags", ["--metric accuracy", "--validation-split 0", "--problem-type regression"])
def test_training_that_diverges_is_one_line(
    arguments: Callable[..., list[str]], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    """Too few steps for ten bad ones in a row, and weights that are finite, but nothing that comes out of them is."""
    if "regression" in flags:
        rows.write_text("text,label\n" + "\n".join(f"good film {i},{i / 3}" for i in range(40)))
    wild = [*"--learning-rate 1e30 --max-grad-norm 0 --max-steps 5 --head-init random".split(), *flags.split()]
    assert "training has diverged (lower --learning-rate)" in one_line_error(capsys, arguments(tmp_path / "run", *wild))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_diverged_weights_are_not_the_best(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argmax of NaN is the first class, which may well be right more often than the model that was."""
    compute_logits, seen = train.compute_logits, [0]

    def later_nan(*given: Any, **options: Any) -> np.ndarray:
        seen[0] += 1
        found = compute_logits(*given, **options)
        return found if seen[0] == 1 else np.full_like(found, np.nan)

    monkeypatch.setattr(train, "compute_logits", later_nan)
    assert (
        run_command(main, arguments(tmp_path / "run", *"--eval-steps 2 --metric accuracy --head-init random".split()))
        == 0
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["best_step"] == 2 and seen[0] > 2


def test_fp16_overflow_is_no_error_until_the_scale_is_used_up() -> None:
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()  # type: ignore[assignment]
    model.encoder.layers = torch.nn.ModuleList()  # type: ignore[union-attr]
    model.classifier = torch.nn.Linear(2, 2)
    from minibert.config import RunConfig

    optimizer = Optimizer(model, RunConfig(), 100, scale_loss=True)
    bad = []
    for number in range(18):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        optimizer.step(number, torch.tensor(1.0))
        bad.append(bool(optimizer.bad))
    assert bad == [False] * 16 + [True] * 2 and int(optimizer.skipped) == 18


def test_weights_that_are_no_numbers_are_refused(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    given = arguments(tmp_path / "run")
    path = Path(given[given.index("--model") + 1]) / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(tensors, path)
    assert "encoder.layer.0.output.dense.bias holds NaN" in one_line_error(capsys, given)


def test_deterministic_runs_are_equal(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """In processes of their own: the switch is for the whole process."""
    for name in ("a", "b"):
        command = [sys.executable, "-m", "minibert.finetune", *arguments(tmp_path / name, "--deterministic")]
        subprocess.run(command, check=True, cwd=ROOT)
    for name in ("model.safetensors", "predictions-validation.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_deterministic_asks_torch_for_it() -> None:
    """On a CPU runs are equal anyway; on a GPU it is this switch that makes them so."""
    code = "import torch; from minibert.config import RunConfig; from minibert.runtime.device import choose; "
    code += "choose(RunConfig(deterministic={})); print(torch.are_deterministic_algorithms_enabled())"
    for wanted in (True, False):
        done = subprocess.run([sys.executable, "-c", code.format(wanted)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(wanted)


# Memory


def scarce(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Forward passes of more than `most` tokens fail as they do without memory; returns the sizes that passed."""
    from minibert.model.bert import BertForSequenceClassification

    logits = BertForSequenceClassification.logits
    sizes: list[int] = []

    def limited(self: Any, x: Any, masks: Any = None) -> torch.Tensor:
        tokens = int(x.packing.cu_seqlens[-1])
        if tokens > most:
            raise error
        sizes.append(tokens)
        return logits(self, x, masks)

    monkeypatch.setattr(BertForSequenceClassification, "logits", limited)
    return sizes


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["MemoryError", "cuda", "cpu"])
def test_out_of_memory_halves_the_micro_batch_not_the_effective_one(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    flags = (
        "--dropout",
        "0",
        "--class-weights",
        "balanced",
        "--learning-rate",
        "1e-3",
        "--gradient-accumulation-steps",
        "2",
    )
    assert run_command(main, arguments(tmp_path / "whole", *flags)) == 0
    given = [flag for flag in arguments(tmp_path / "scarce", *flags) if flag != "--quiet"]
    sizes = scarce(monkeypatch, 40, error)
    capsys.readouterr()
    assert run_command(main, given) == 0
    assert capsys.readouterr().out.count("memory ran out") in (1, 2) and max(sizes) <= 40
    logs = [losses(tmp_path / name) for name in ("whole", "scarce")]
    assert len(logs[0]) == len(logs[1]) and np.allclose(logs[0], logs[1], atol=2e-5)
    predictions = [
        (tmp_path / name / "predictions-validation.csv").read_text().count("\n") for name in ("whole", "scarce")
    ]
    assert predictions[0] == predictions[1]


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_one_example_that_does_not_fit_is_one_line(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scarce(monkeypatch, 3, MemoryError())
    assert "not enough memory to train on one example" in one_line_error(
        capsys, arguments(tmp_path / "run", "--head-init", "random")
    )


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["MemoryError", "cuda", "cpu"])
def test_out_of_memory_where_nothing_can_be_halved_is_one_line(
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fails(*given: Any) -> None:
        raise error

    monkeypatch.setattr(train.Training, "use_best_weights", fails)
    assert "not enough memory" in one_line_error(capsys, arguments(tmp_path / "run"))
    monkeypatch.undo()
    resumes(arguments(tmp_path / "run"))


def test_other_runtime_errors_stay_what_they_are(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce(monkeypatch, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(main, arguments(tmp_path / "run"))


def test_halving_computes_every_row_once() -> None:
    def compute(rows: np.ndarray) -> np.ndarray:
        if len(rows) > 3:
            raise MemoryError
        return rows * 2

    found = list(split_on_oom([np.arange(10), np.arange(10, 25), np.array([25])], compute))
    assert np.concatenate([rows for rows, _ in found]).tolist() == list(range(26))
    assert all(np.array_equal(result, rows * 2) for rows, result in found)
    with pytest.raises(UserError, match="one example"):
        list(split_on_oom([np.arange(2)], lambda rows: [][1] if len(rows) > 2 else _fail()))


def _fail() -> Any:
    raise MemoryError


def held_bytes() -> tuple[int, int]:
    """Tensors that are alive, and bytes of Python's and numpy's memory: no other process or allocator counts."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    return tensors, tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("leak", [None, torch.ones, np.ones], ids=["none", "a tensor a step", "an array a step"])
def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: Callable[[int], Any] | None) -> None:
    """Over 80 steps with evaluations and checkpoints nothing is kept of a step; what leaks on purpose is seen."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    job = importlib.import_module("memory").training(150)
    seen: dict[int, tuple[int, int]] = {}
    kept: list[Any] = []
    step = job._step

    def measured(chosen: train.Step) -> Any:
        if job.state.step in (60, 140):  # the first evaluation, at 50, has kept the best weights
            seen[job.state.step] = held_bytes()
        if leak is not None:
            kept.append(leak(1000))
        return step(chosen)

    job._step = measured
    tracemalloc.start()
    try:
        job.run(tmp_path / "train_log.jsonl", lambda: checkpoint.write_tensors(tmp_path / "state", job.best))
    finally:
        tracemalloc.stop()
    (tensors, size), (later_tensors, later_size) = seen[60], seen[140]
    grown = later_tensors > tensors + 20 or (later_size - size) / 80 > 500
    assert grown == (leak is not None), (seen, job.state)


def test_nothing_is_unpickled() -> None:
    """No module that can run code from a file is ever imported or called."""
    for path in (ROOT / "minibert").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "np.load", "numpy.load", "eval", "exec"}, path


def test_a_file_of_predictions_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i}" for i in range(25)]
    examples = Examples("f", texts, None, ["ab"[i % 2] for i in range(25)], list(range(2, 27)))
    logits, targets = np.random.default_rng(0).normal(size=(25, 2)).astype(np.float32), np.arange(25) % 2
    for size in (1000, 10, 25):
        monkeypatch.setattr(predictions, "CHUNK", size)
        predictions.write_predictions(tmp_path / f"{size}.csv", examples, Problem(SINGLE, ["a", "b"]), logits, targets)
    whole = (tmp_path / "1000.csv").read_text()
    assert whole.count("\n") == 26
    assert whole == (tmp_path / "10.csv").read_text() == (tmp_path / "25.csv").read_text()
