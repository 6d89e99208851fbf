"""A run that is killed, whenever it happens, ends with the bits of one that was not. Real processes, real kill -9."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minibert.errors import UserError
from minibert.training import resume

sys.path.insert(0, str(Path(__file__).parents[1]))
import fuzz

SERVER = multiprocessing.get_context("forkserver")  # its children have all modules loaded, so a start costs little
SERVER.set_forkserver_preload(["minibert.run", "minibert.finetune", "torch._dynamo", "pytest"])  # AdamW loads dynamo

SETTINGS = {
    "windows, accumulation": "--truncation window --max-length 16 --length-buckets --gradient-accumulation-steps 2 "
    "--batch-size 8 --save-steps 1 --eval-steps 3",
    "several labels, early stopping": "--label-column labels --label-delimiter | --batch-size 8 --eval-steps 3 "
    "--early-stopping-patience 2 --save-steps 4 --metric loss --learning-rate 0.02",
    "frozen prefix, token batches": "--freeze 1 --batch-tokens 160 --save-steps 3 --layer-lr-decay 0.9",
}
KILLS_PER_SETTING = 3


def work(arguments: list[str], fatal: int, counter: Any, message: Any) -> None:
    """In a process of its own: finetune, killed at the `fatal`-th moment if there are so many.

    Moments are before and after each write to the log, fsync and rename, and half-way through each weights file.
    """
    import torch

    from minibert.cli import run_command
    from minibert.errors import UserError
    from minibert.finetune import main
    from minibert.model import checkpoint
    from minibert.training import log as train_log
    from minibert.training import loop as train

    torch.set_num_threads(1)

    def moment() -> None:
        counter.value += 1
        if counter.value == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            moment()
            result = function(*args, **options)
            moment()
            return result

        return call

    def half_written(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        moment()
        path.write_bytes(whole)

    save_file = checkpoint.save_file
    checkpoint.save_file = half_written
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    train_log.TrainLog.write = watched(train_log.TrainLog.write)  # type: ignore[method-assign]
    train.Training.step = watched(train.Training.step)  # type: ignore[method-assign]

    def command(argv: Any) -> None:
        try:
            main(argv)
        except UserError as error:
            message.put(str(error))
            raise

    os._exit(run_command(command, arguments))


@contextlib.contextmanager
def started(arguments: list[str], fatal: int = 0) -> Iterator[tuple[Any, Any, Any]]:
    """The process, its count of moments and its error; whatever happens in the test, it does not stay behind."""
    counter, message = SERVER.Value("i", 0), SERVER.SimpleQueue()
    process = SERVER.Process(target=work, args=(arguments, fatal, counter, message))
    process.start()
    try:
        yield process, counter, message
    finally:
        process.kill()
        process.join()


def finetune(arguments: list[str], fatal: int = 0) -> tuple[int, int, str]:
    """Exit code, moments passed, and the error if there was one."""
    with started(arguments, fatal) as (process, counter, message):
        process.join(600)
        assert process.exitcode is not None
        return process.exitcode, counter.value, "" if message.empty() else message.get()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator = random.Random(5)
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "labels"])
        for i in range(70):
            words = generator.choices("the a of good bad film very not free call now you money".split(), k=1 + i % 17)
            several = "|".join(word for word in ("good", "bad", "film") if word in words)
            writer.writerow([" ".join([*words, str(i)]), generator.choice("xyz"), several])
    return path


def base(model: Path, rows: Path, output: Path, flags: str, device: str = "cpu") -> list[str]:
    fixed = ["--train", str(rows), "--model", str(model), "--output", str(output), "--quiet", "--device", device]
    columns = [] if "--label-column" in flags else ["--label-column", "label"]
    return [*fixed, *columns, "--epochs", "2", "--dropout", "0.2", "--max-length", "24", *flags.split()]


def results(output: Path) -> dict[str, Any]:
    """All that a run leaves, less what a clock says."""
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    metrics = json.loads((output / "metrics.json").read_text())
    files = ("model.safetensors", "config.json", "tokenizer.json", "predictions-validation.csv")
    return {
        "log": [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log],
        "metrics": {key: value for key, value in metrics.items() if key != "speed"},
        **{name: (output / name).read_bytes() for name in files},
    }


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.slow
def test_kills_change_nothing(tiny: Callable[..., Path], rows: Path, tmp_path: Path, name: str) -> None:
    """Several for each setting, at seeded moments, one after another on the same run."""
    model = tiny()
    code, moments, error = finetune(base(model, rows, tmp_path / "whole", SETTINGS[name]))
    assert (code, error) == (0, "") and moments > 40
    arguments = base(model, rows, tmp_path / "killed", SETTINGS[name])
    generator = random.Random(name)
    for kill in range(KILLS_PER_SETTING):
        fatal = generator.randint(1, moments // (KILLS_PER_SETTING + 1))
        code, _, error = finetune([*arguments, *(["--resume"] if kill else [])], fatal)
        assert (code, error) == (-signal.SIGKILL, "")
    code, _, error = finetune([*arguments, "--resume"])
    assert (code, error) == (0, "")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    leftovers = [path for path in (tmp_path / "killed").rglob("*") if path.name.endswith(".tmp")]
    assert not leftovers


def killed_twice_and_resumed(model: Path, rows: Path, folder: Path, flags: str, device: str) -> None:
    """A run to its end, and one that is killed, resumed, killed and resumed, leave the same."""
    flags = f"--batch-size 8 --save-steps 2 {flags}"
    code, moments, error = finetune(base(model, rows, folder / "whole", flags, device))
    assert (code, error) == (0, "") and moments > 40
    arguments = base(model, rows, folder / "killed", flags, device)
    for resume_flag, fatal in (([], moments // 3), (["--resume"], moments // 4)):
        code, _, error = finetune([*arguments, *resume_flag], fatal)
        assert (code, error) == (-signal.SIGKILL, "")
        assert (folder / "killed" / "checkpoints" / "last" / "state.safetensors").is_file()
    code, _, error = finetune([*arguments, "--resume"])
    assert (code, error) == (0, "")
    assert results(folder / "killed") == results(folder / "whole")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_run_resumes_too(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    killed_twice_and_resumed(tiny(), rows, tmp_path, "--engine compile", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compile", "graph"])
def test_every_engine_resumes_on_a_gpu(tiny: Callable[..., Path], rows: Path, tmp_path: Path, engine: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = tiny(hidden_size=64, num_attention_heads=2)
    killed_twice_and_resumed(model, rows, tmp_path, f"--engine {engine} --attention sdpa --deterministic", "cuda")


@pytest.mark.slow
def test_a_kill_after_training_is_finished_by_resume(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    model, flags = tiny(), "--batch-size 16 --save-steps 3"
    _, moments, _ = finetune(base(model, rows, tmp_path / "whole", flags))
    arguments = base(model, rows, tmp_path / "killed", flags)
    assert finetune(arguments, moments - 3)[0] == -signal.SIGKILL
    assert finetune([*arguments, "--resume"])[::2] == (0, "")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    code, _, error = finetune([*arguments, "--resume"])
    assert code == 2 and "this run is finished, nothing is left to resume" in error
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_finished_run_keeps_its_checkpoint_when_asked(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    for flags, kept in (("--batch-size 16", False), ("--batch-size 16 --keep-checkpoint", True)):
        output = tmp_path / f"kept-{kept}"
        assert finetune(base(tiny(), rows, output, flags))[::2] == (0, "")
        assert (output / "checkpoints" / "last" / "state.safetensors").is_file() == kept
        assert (output / "checkpoints").exists() == kept
    assert finetune([*base(tiny(), rows, output, flags), "--resume"])[::2] == (0, "")  # evaluates again


@pytest.mark.slow
def test_what_changed_is_refused_by_name(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    model = tiny()
    arguments = base(model, rows, tmp_path / "run", "--batch-size 16 --save-steps 1")
    assert finetune(arguments, 60)[0] == -signal.SIGKILL
    checkpoint = tmp_path / "run" / "checkpoints" / "last" / "state.safetensors"
    before = checkpoint.read_bytes()

    def refused(*flags: str) -> str:
        code, _, error = finetune([*arguments, "--resume", *flags])
        assert code == 2 and checkpoint.read_bytes() == before
        return error

    assert "learning_rate (was 0.0005, is 0.001)" in refused("--learning-rate", "1e-3")
    assert "seed (was 42, is 7)" in refused("--seed", "7")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + b"\x11")
    assert "starting weights (was" in refused()
    (model / "model.safetensors").write_bytes(weights)
    rows.write_text(rows.read_text().replace("film", "Film", 1))
    assert "rows (was" in refused()


def test_changed_code_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of one version of the source, and a run of another."""
    monkeypatch.setattr(resume, "__file__", str(tmp_path / "training" / "resume.py"))
    digests = []
    for source in ("x = 1", "x = 2"):
        (tmp_path / "module.py").write_text(source)
        digests.append(resume.code_digest())
    job = fuzz.training()
    resume.save_checkpoint(tmp_path / "last", job, {"code": digests[0]})
    with pytest.raises(UserError, match=rf"changed: code \(was {digests[0]}, is {digests[1]}\)"):
        resume.load_checkpoint(tmp_path / "last", job, {"code": digests[1]})
    resume.load_checkpoint(tmp_path / "last", job, {"code": digests[0]})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_sigterm_and_ctrl_c_leave_a_checkpoint(
    tiny: Callable[..., Path], rows: Path, tmp_path: Path, number: signal.Signals
) -> None:
    model, output = tiny(), tmp_path / "run"
    arguments = base(model, rows, output, "--batch-size 2 --max-steps 100000 --epochs 10000 --eval-steps 100000")
    with started(arguments) as (process, counter, _):
        while process.is_alive() and counter.value < 40:
            process.join(0.05)
        os.kill(process.pid, number)
        process.join(600)
        assert process.exitcode == 130
    assert (output / "checkpoints" / "last" / "state.safetensors").is_file()


def test_resume_of_a_folder_that_no_run_began_is_refused(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for output in (tmp_path / "mine", tmp_path / "new"):
        code, _, error = finetune([*base(tiny(), rows, output, ""), "--resume"])
        assert code == 2 and "no checkpoint to resume" in error
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep" and not (tmp_path / "new").exists()
