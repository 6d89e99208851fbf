"""Several processes give what one gives, end together, and go on from one another's checkpoints: real torchrun runs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minibert.batching.plans import split_by_tokens
from minibert.cli import given_settings
from minibert.model.dropout import DropoutMasks
from minibert.run import run_from_files

WORDS = "good bad film very not is was spam free call now see you at money win prize the a of and".split()
COMMON = ["--max-length", "48", "--lr", "3e-4", "--batch-size", "12", "--dropout", "0", "--head-dropout", "0"]
COMMON += ["--head-init", "random"]  # of a fitted head the steps are larger, and so is their rounding
JOBS = {  # every way to train
    "plain": ["--train", "classes.csv", "--epochs", "2"],
    "dense": ["--train", "classes.csv", "--max-steps", "5", "--no-compact-vocabulary", "--batch-tokens", "200"],
    "few": ["--train", "classes.csv", "--max-steps", "6", "--batch-size", "3"],
    "weighted": ["--train", "classes.csv", "--class-weights", "balanced", "--gradient-accumulation-steps", "3"],
    "prefix": ["--train", "classes.csv", "--epochs", "1", "--freeze", "1", "--head", "mlp:16"],
    "frozen": ["--train", "classes.csv", "--epochs", "2", "--freeze", "all", "--label-smoothing", "0.1"],
    "multi": ["--train", "several.csv", "--label-delimiter", "|", "--epochs", "2", "--test-split", "0.2"],
    "windows": ["--train", "classes.csv", "--max-steps", "5", "--truncation", "window", "--max-length", "16"],
    "pairs": ["--train", "pairs.csv", "--max-steps", "5", "--truncation", "head_tail", "--max-length", "24"],
    "windows of pairs": [*"--train pairs.csv --max-steps 5 --truncation window --max-length 24".split()],
    "probe": [*"--train classes.csv --max-steps 1 --head-init probe".split()],
    "regression": [*"--train numbers.csv --epochs 9 --eval-steps 3 --early-stopping-patience 2".split()],
}
ON_TWO_NODES = ("plain", "weighted", "prefix", "multi", "windows of pairs", "regression")
SCRIPT = """
import json, sys, zlib
from minibert.finetune import main
from minibert.runtime import distributed
from minibert.cli import given_settings, run_command
from minibert.errors import UserError
from minibert.run import run_from_files

for name, flags in json.loads(sys.argv[1]).items():
    classifier = run_from_files(given_settings(flags), [])
    weights = {name: zlib.crc32(p.detach().numpy().tobytes()) for name, p in classifier.model.named_parameters()}
    distributed.check_same_on_all_ranks(weights)  # every process ends with the same bits
assert distributed.broadcast(distributed.rank()) == 0
try:
    distributed.check_same_on_all_ranks({"data": distributed.rank() == 1, "seed": 42})
except UserError as error:
    assert "process 1 differs from process 0 in data;" in str(error)
else:
    raise AssertionError("unlike data was not refused")
sys.exit(run_command(main, ["--train", "none.csv"]))
"""


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and data of every kind."""
    tiny().rename(tmp_path / "model")
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(120)]
    labels = ["xyz"[i % 7 % 3] for i in range(120)]
    write_csv(tmp_path / "classes.csv", [(f"{label} {text}", label) for label, text in zip(labels, texts, strict=True)])
    write_csv(tmp_path / "several.csv", [(t, "|".join(w for w in ("good", "bad", "film") if w in t)) for t in texts])
    pairs = list(zip(texts, texts[1:] + texts[:1], labels, strict=True))
    write_csv(tmp_path / "pairs.csv", pairs, ("sentence1", "sentence2", "label"))
    write_csv(tmp_path / "numbers.csv", [(text, str(len(text) / 7 + 0.25)) for text in texts])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(job: str, output: str) -> list[str]:
    return [*COMMON, *JOBS[job], "--model", "model", "--output", output, "--device", "cpu"]


def alone(*arguments: str) -> None:
    """A run in one process: this one."""
    run_from_files(given_settings([*arguments, "--quiet"]), [])


def torchrun(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start torchrun on this machine; each of its workers has one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [*([] if "--master-port" in arguments else ["--standalone"]), *arguments]  # a port that it chooses
    project = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{project}{os.pathsep}{project / 'kernels'}"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens in the test, no process stays behind."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with ended(process):
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err


@contextlib.contextmanager
def reserved_port() -> Iterator[str]:
    """A port that nobody else is given: bound here, and torchrun may bind it too, as this one never listens."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield str(held.getsockname()[1])


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        ranks = [entry for entry in environment if entry.startswith("RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix("RANK="))] = child
    return [found[rank] for rank in sorted(found)]


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    log, deadline = output / "train_log.jsonl", time.monotonic() + 600
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def lines(output: str | Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (Path(output) / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def metrics(output: str) -> dict[str, Any]:
    return json.loads(Path(output, "metrics.json").read_text())


def validation(output: str) -> dict[str, float]:
    return {name: value for name, value in metrics(output)["validation"].items() if isinstance(value, float)}


def assert_same_result(a: str, b: str, tolerance: float = 1e-5) -> None:
    """Log and weights, less the key biases: softmax cancels them, so their gradient is rounding that Adam blows up."""
    logs = lines(a), lines(b)
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for one, other in zip(*logs, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=tolerance, rel=tolerance), one
    tensors = [load_file(Path(output) / "model.safetensors") for output in (a, b)]
    for name, tensor in tensors[0].items():
        if not name.endswith("key.bias"):
            assert bool(((tensor - tensors[1][name]).abs() < tolerance).all()), name


def test_split_is_fair_and_whole() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 200, 500)
    rows = rng.permutation(500)[:64]
    for parts in (1, 2, 3, 8):
        found = split_by_tokens(rows, lengths, parts)
        assert sorted(np.concatenate(found)) == sorted(rows)
        loads = [int(lengths[part].sum()) for part in found]
        assert max(loads) < 1.02 * np.mean(loads)
        places = [[list(rows).index(row) for row in part] for part in found]
        assert all(place == sorted(place) for place in places)
    assert [len(part) for part in split_by_tokens(rows[:2], lengths, 4)] == [1, 1, 0, 0]


def script_of(folder: Path, names: Iterable[str], suffix: str) -> list[str]:
    """What torchrun is to run: these jobs, into folders of their own, and one with dropout."""
    (folder / "jobs.py").write_text(SCRIPT)
    jobs = {job: flags(job, f"{job}-{suffix}") for job in names}
    jobs["dropout"] = [*flags("plain", f"dropout-{suffix}"), "--dropout", "0.2", "--max-steps", "4"]
    return ["jobs.py", json.dumps(jobs)]


@pytest.mark.slow
def test_processes_and_machines_give_what_one_process_gives(folder: Path) -> None:
    """Four processes of one torchrun do every job, and two torchruns that meet on a port, as two nodes do, some.

    Each then makes a mistake, which is told once on each node.
    """
    code, out, err = result(torchrun(*script_of(folder, JOBS, "four"), processes=4))
    assert code != 0 and err.count("error: none.csv: no such file") == err.count("error: ") == 1, err
    assert out.count("saved to plain-four") == 1 and out.count("over 4 processes") == len(JOBS) + 1

    with reserved_port() as port, contextlib.ExitStack() as stack:
        machines = []
        for number, suffix in enumerate(("two", "unseen")):
            meeting = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", port]
            machines.append(torchrun(*meeting, *script_of(folder, ON_TWO_NODES, suffix), processes=1))
            stack.enter_context(ended(machines[-1]))
        (_, out, err), (_, other_out, other_err) = map(result, machines)
    assert out.count("saved to plain-two") == 1 and other_out == ""
    assert err.count("error: none.csv") == err.count("error: ") == other_err.count("error: ") == 1, err + other_err
    assert not list(folder.glob("*-unseen"))

    for job in JOBS:
        alone(*flags(job, job))
        for suffix, world in (("four", 4), *([("two", 2)] if job in ON_TWO_NODES else [])):
            assert_same_result(job, f"{job}-{suffix}")
            assert validation(f"{job}-{suffix}") == pytest.approx(validation(job), abs=1e-5)
            assert metrics(f"{job}-{suffix}")["speed"]["processes"] == world
    assert 3 < metrics("regression")["train"]["steps"] < 81  # stopped early, at the same step everywhere
    assert lines("dropout-two")[0]["loss"] != pytest.approx(lines("plain-two")[0]["loss"], abs=1e-3)


def test_processes_drop_different_elements() -> None:
    """Each has a stream of its own, and the first the one that a single process has."""
    like = torch.empty(())
    masks = [DropoutMasks(42 + (rank << 40), 7).draw([1000], 0.5, like)[0] for rank in (0, 1, 2)]
    assert torch.equal(masks[0], DropoutMasks(42, 7).draw([1000], 0.5, like)[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < float((masks[a] == masks[b]).float().mean()) < 0.6


SLOW_TO_TELL = """
import sys, time
from minibert.finetune import main
from minibert.runtime import distributed
from minibert.cli import run_command

printed = distributed._error_printed_on_node
distributed._error_printed_on_node = lambda: time.sleep(1) or printed()
sys.exit(run_command(main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_dead_worker_ends_the_job_and_one_process_goes_on(folder: Path) -> None:
    """What is left tells why, though torchrun tells it to end before it gets there."""
    arguments = [*flags("few", "dead"), "--max-steps", "80", "--save-steps", "1"]
    (folder / "slow_to_tell.py").write_text(SLOW_TO_TELL)
    process = torchrun("slow_to_tell.py", *arguments)
    with ended(process):
        wait_for_step(folder / "dead", 4, process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        code, _, err = result(process)
    assert code != 0 and "minibert/" not in err  # no traceback of ours beside what torchrun says
    said = re.findall(r"^error: .*", err, re.MULTILINE)
    assert len(said) == 1 and re.match(r"error: process 0 of 2: another process has died .*--resume$", said[0]), err
    alone(*arguments, "--resume")
    alone(*flags("few", "whole"), "--max-steps", "80")
    assert_same_result("whole", "dead")


STALLING = """
import datetime, signal, sys, time
import torch.distributed as dist
from minibert.finetune import main
from minibert.runtime import distributed
from minibert.training import loop as train
from minibert.cli import run_command

step, group = train.Training.step, dist.init_process_group


def meet(*arguments, store, rank, timeout, **options):
    store.set(f"came {rank}", "")
    store.wait(["came 0", "came 1"])  # a busy machine may take its time to start; only what comes later may not
    group(*arguments, store=store, rank=rank, timeout=datetime.timedelta(seconds=5), **options)


def stalling(self, chosen):
    if distributed.rank() == 1 and self.state.step == 2:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun need not wait before it kills
        time.sleep(1000)
    return step(self, chosen)


train.Training.step, dist.init_process_group = stalling, meet
sys.exit(run_command(main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_worker_that_stalls_ends_the_job(folder: Path) -> None:
    """It is alive and says nothing: the others wait for it as long as a slow one may take, and no longer."""
    (folder / "stalling.py").write_text(STALLING)
    code, _, err = result(torchrun("stalling.py", *flags("few", "stalled"), "--save-steps", "1"))
    said = re.findall(r"^error: .*", err, re.MULTILINE)
    assert code != 0 and "minibert/" not in err
    assert len(said) == 1 and re.match(r"error: process 0 of 2: .* does not answer .*--resume$", said[0]), err
    alone(*flags("few", "stalled"), "--save-steps", "1", "--resume")


@pytest.mark.slow
def test_an_interrupted_job_goes_on_in_more_processes(folder: Path) -> None:
    arguments = [*flags("few", "stopped"), "--epochs", "999", "--max-steps", "80", "--eval-steps", "5"]
    process = torchrun("-m", "minibert.finetune", *arguments)
    with ended(process):
        wait_for_step(folder / "stopped", 4, process)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does: torchrun and every worker
        code, out, err = result(process)
    assert code != 0 and "minibert/" not in err and "error: " not in err
    assert len(re.findall(r"^checkpoint at step \d+; continue with --resume", out, re.MULTILINE)) == 1
    code, out, err = result(torchrun("-m", "minibert.finetune", *arguments, "--resume", processes=3))
    assert code == 0 and out.count("resumed at step") == 1, err
    alone(*flags("few", "whole"), "--epochs", "999", "--max-steps", "80", "--eval-steps", "5")
    assert_same_result("whole", "stopped")
