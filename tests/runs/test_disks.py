"""What may go wrong with the folder of a run: disks that fill, folders that vanish, a second run in it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from small_runs import STATE, one_line_error, resumes

from minibert import run
from minibert.cli import run_command
from minibert.config import RunConfig
from minibert.finetune import main
from minibert.model import checkpoint
from minibert.runtime import files
from minibert.training import log as train_log
from minibert.training import loop as train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "save", "write"])
@pytest.mark.slow
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

            patch.setattr(train_log, "open", opened, raising=False)
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


@pytest.mark.slow
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
    step = train.Training.step
    for vanish_at in (3, 9):

        def deleting(self: train.Training, chosen: train.Step, vanish_at: int = vanish_at) -> Any:
            if self.state.step == vanish_at:
                shutil.rmtree(output)
            return step(self, chosen)

        monkeypatch.setattr(train.Training, "step", deleting)
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
