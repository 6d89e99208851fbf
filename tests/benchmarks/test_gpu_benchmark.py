"""The GPU benchmark, which gets one chance on a machine: every row runs at a tiny size, and no row costs another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from minibert.batching.dataset import collate
from minibert.errors import UserError
from minibert.training import step as training_step

ROOT = Path(__file__).resolve().parents[2]
SMOKE = """
import json, sys, tempfile
from pathlib import Path
sys.path[0:0] = ["benchmarks"]
from gpu.plan import rows
from gpu.supervisor import guarded
from gpu.workloads import Setting
found = {}
for row in rows():
    with tempfile.TemporaryDirectory() as scratch:
        found[row.name] = guarded(row, Setting(Path(scratch), Path(sys.argv[1]), smoke=True))
print(json.dumps(found))
"""


def on_the_cpu() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return environment | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def command(*flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command as users start it: nothing on the path."""
    environment = {name: value for name, value in on_the_cpu().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu"), *flags], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, with the modules that the tests use."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu.cli
    import gpu.minibert_steps
    import gpu.transformers_steps

    return gpu


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, minilm: Path, shared_data: Path) -> Path:
    """What `--pack` writes, with fewer texts afterwards."""
    folder = tmp_path_factory.mktemp("packed")
    command("--pack", str(folder))
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 60e6
    for name in ("sst2-train.csv", "sst2-dev.csv"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:101]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(packed: Path) -> dict[str, Any]:
    """Every row at its tiny size, in one process, which is quicker than one for each."""
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, str(packed)], capture_output=True, text=True, cwd=ROOT, env=on_the_cpu()
    )
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_every_row_gives_figures(measured: dict[str, Any]) -> None:
    """What only a GPU has is not available here; nothing else may be missing."""
    assert not {name: row for name, row in measured.items() if "error" in row}
    unavailable = {name: row["not_available"] for name, row in measured.items() if "not_available" in row}
    only_there = ("graph", "flash", "triton attention", "fp16", "tf32", "Trainer")
    assert not {name: why for name, why in unavailable.items() if not any(word in name for word in only_there)}


def test_rows_hold_their_figures(measured: dict[str, Any]) -> None:
    for name in ("minibert eager", "transformers sdpa"):
        row = measured[f"base, 32 sentences: {name}"]
        assert row["tokens_per_step"] * row["windows"] * row["steps_per_window"] > 0
        assert row["texts"] == "SST-2 sentences" and row["loss"] == pytest.approx(0.7, abs=0.4)
        assert row["steps_per_second"] == pytest.approx(1000 / row["ms_per_step"], rel=0.01)
    assert measured["base, 32 sentences: minibert eager"]["micro_batch_tokens"] == "whole batches"
    assert "eager" in measured["base, 32 sentences: minibert eager"]["hardware"]
    top = measured["base, 32 sentences: kernels of minibert eager"]["top"]
    assert {"kernel", "ms_per_step", "calls_per_step", "fraction"} == set(top[0])
    assert measured["kernel adamw"]["microseconds_of_torch"] > 0
    assert measured["kernel norm"]["36"]["microseconds_of_compile"] > 0
    assert measured["the machine's rates"]["matmul_tflops"] > 0
    run = measured["whole run, minilm, engine eager, epochs 3"]
    peer = measured["whole run, minilm, transformers at its best, epochs 3"]
    for each in (run, peer):
        assert each["wall_seconds"] > each["train_seconds"] > 0 and 0 <= each["validation"]["accuracy"] <= 1
        assert each["steps"] > 0


def test_both_sides_see_the_same_batches(gpu: ModuleType, tmp_path: Path) -> None:
    """And each is built within the loop: the padded batches hold the ids that minibert packs."""
    setting = gpu.workloads.Setting(tmp_path, smoke=True)
    for workload in (gpu.workloads.SENTENCES.tiny(), gpu.workloads.SENTENCES_SORTED.tiny()):
        encoded = gpu.workloads.encode(setting, workload)
        training = gpu.minibert_steps.prepare(setting, "base", workload, encoded, {"compact_vocabulary": False})
        ours = [rows for epoch in range(2) for step in training.steps_of_epoch(epoch) for rows in step.batches]
        theirs = gpu.transformers_steps.batches(encoded, workload, multiple=8)
        assert len(ours) == 2 * workload.steps
        for rows, (tokens, padded) in zip(ours, theirs, strict=False):
            ids = padded["input_ids"][padded["attention_mask"].bool()]
            assert ids.tolist() == collate(encoded.tokens, rows).input_ids.tolist()
            assert padded["labels"].tolist() == encoded.labels[rows].tolist()
            assert tokens == len(ids) and padded["input_ids"].shape[1] % 8 == 0


def test_texts_have_the_lengths_they_should(gpu: ModuleType, tmp_path: Path) -> None:
    setting = gpu.workloads.Setting(tmp_path)
    work = gpu.workloads
    assert set(work.encode(setting, work.TEXTS_128).tokens.lengths.tolist()) == {128}
    mixed = work.encode(setting, work.MIXED).tokens
    assert 8 <= mixed.lengths.min() < 32 and mixed.lengths.max() == 512
    sentences = work.encode(setting, work.SENTENCES).tokens
    assert len(sentences) == 1600 and len(np.unique(sentences.lengths)) > 8
    for tokens in (mixed, sentences):
        assert set(tokens.ids[tokens.offsets[:-1]]) == {2} and set(tokens.ids[tokens.offsets[1:] - 1]) == {3}


def test_the_timed_loop_is_the_one_users_run(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window ends at a line of the log of `Training.run`, and holds as many steps as were asked for."""
    setting, workload = gpu.workloads.Setting(tmp_path, smoke=True), gpu.workloads.SENTENCES
    row = gpu.minibert_steps.train(setting, "base", workload, engine="eager", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert row["windows"] == len(lines) - gpu.clock.WARM_UP and row["steps_per_window"] == 2


def test_a_batch_that_was_split_says_so(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training_step.train_step

    def short_of_memory(model: Any, problem: Any, optimizer: Any, batches: list[Any], **options: Any) -> Any:
        if max(len(x.input_ids) for x, _ in batches) > 60:
            raise MemoryError
        return step(model, problem, optimizer, batches, **options)

    monkeypatch.setattr(training_step, "train_step", short_of_memory)
    setting = gpu.workloads.Setting(tmp_path, smoke=True)
    row = gpu.minibert_steps.train(setting, "base", gpu.workloads.TEXTS_128, engine="eager", device="cpu")
    assert row["tokens_per_step"] == 64 and row["micro_batch_tokens"] == 32


@pytest.mark.parametrize("make", ["our_update", "torch_update"])
def test_both_optimizers_do_the_same_work(gpu: ModuleType, tmp_path: Path, make: str) -> None:
    """Parameters move, their half-precision copy is theirs, and the gradients are cleared."""
    update = getattr(gpu.kernels, make)(gpu.workloads.Setting(tmp_path, smoke=True), 5000)
    before = update.param.detach().clone()
    assert update.grad.count_nonzero() > 4000
    update.call()
    assert (update.param != before).sum() > 4000
    # Triton's interpreter cuts bf16 off where a GPU rounds.
    torch.testing.assert_close(update.half_copy.float(), update.param.detach(), rtol=2**-7, atol=0)
    assert update.grad.count_nonzero() == 0


def test_the_command_measures_and_goes_on(tmp_path: Path) -> None:
    """With a process for each row, and minibert's own messages where nothing was packed."""
    flags = ["--output", str(tmp_path / "out"), "--smoke", "--device", "cpu", "--only"]
    left_behind = str(tmp_path / "packed")
    done = command(*flags, "^base, 32 sentences: minibert eager$", "--commit", "abc", "--packed", left_behind)
    path = tmp_path / "out" / "gpu-cpu.json"
    assert json.loads(done.stdout.splitlines()[-1]) == {"file": str(path), "rows": 1, "left": 0}
    assert f"no folder {left_behind}: the rows use the messages bundled with minibert" in done.stdout
    content = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "transformers", "python", "processor"} <= set(content["header"])
    eager = content["rows"]["base, 32 sentences: minibert eager"]
    assert eager["commit"] == "abc" and eager["seconds"] > 0 and eager["texts"].startswith("bundled messages")

    done = command(*flags, "^base, 32 sentences: minibert eager$|rates", "--minutes", "0")
    assert "\n  the machine's rates\n" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"file": str(path), "rows": 1, "left": 1}
    assert json.loads(path.read_text()) == content


def test_mistakes_are_one_line(gpu: ModuleType, tmp_path: Path) -> None:
    mistakes = {
        "--output is missing": [],
        "matches no row": ["--only", "nonsense"],
        "write the folder with --pack": ["--output", str(tmp_path), "--packed", str(tmp_path)],
        "not a results file": ["--output", str(tmp_path), "--merge", __file__],
    }
    for message, flags in mistakes.items():
        with pytest.raises(UserError, match=message):
            gpu.cli.run(gpu.cli.parser().parse_args(flags))
    error = command("--output", str(tmp_path), code=2).stderr
    assert "finds no GPU" in error and error.startswith("error: ") and len(error.splitlines()) == 1, error


Processes = Callable[[str], None]


@pytest.fixture
def processes(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Processes:
    """Rows' processes that run this code instead; `scratch` is their folder."""

    def run(code: str) -> None:
        monkeypatch.setattr(
            gpu.supervisor, "command", lambda name, options, scratch: [sys.executable, "-c", code, scratch]
        )

    return run


def options(gpu: ModuleType, **changes: Any) -> Any:
    return gpu.supervisor.Options(**({"packed": None, "smoke": False, "cpu": True, "commit": "abc"} | changes))


def results(gpu: ModuleType, folder: Path, **rows: Any) -> Any:
    header = {"device": "NVIDIA H100 80GB HBM3", "driver": "580", "torch": "2", "smoke": False}
    return gpu.results.Results(folder / "gpu.json", header, dict(rows))


def row(gpu: ModuleType, name: str, seconds: int = 1, **changes: Any) -> Any:
    return gpu.plan.Row(name, lambda setting: {}, seconds, **changes)


def test_a_killed_row_costs_only_itself(gpu: ModuleType, processes: Processes, tmp_path: Path) -> None:
    found = results(gpu, tmp_path)
    processes("import os; print('last words', flush=True); os.kill(os.getpid(), 9)")
    assert gpu.supervisor.measure([row(gpu, "killed")], found, options(gpu), time.time() + 60) == []
    processes("import sys; open(sys.argv[1] + '/report.json', 'w').write('{\"ms\": 1.5}')")
    assert gpu.supervisor.measure([row(gpu, "good")], found, options(gpu), time.time() + 60) == []
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert "ended with code -9" in rows["killed"]["error"] and "last words" in rows["killed"]["error"]
    assert rows["good"] | {"seconds": 0} == {"ms": 1.5, "commit": "abc", "driver": "580", "seconds": 0}


def test_a_hanging_row_says_where_it_was_and_takes_its_children_along(
    gpu: ModuleType, processes: Processes, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    processes(
        "import faulthandler, signal, subprocess, sys, time\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "def hanging(): time.sleep(600)\n"
        "hanging()\n"
    )
    value = gpu.supervisor.measure_row(row(gpu, "hanging"), options(gpu), limit=5.0)
    assert value["stopped"] and "in hanging" in value["error"]
    wait_until_dead(int(pid.read_text()))


def wait_until_dead(pid: int) -> None:
    """Of processes that would sleep for ten minutes."""
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the process lives on")


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is dead."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_row_cut_short_by_the_budget_is_left_for_another_call(
    gpu: ModuleType, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.supervisor, "GRACE", 0.0)
    processes("import time; time.sleep(600)")
    found = results(gpu, tmp_path)
    assert gpu.supervisor.measure([row(gpu, "slow")], found, options(gpu), time.time() + 2) == ["slow"]
    assert found.rows == {}


def test_after_three_deaths_the_rest_is_left(gpu: ModuleType, processes: Processes, tmp_path: Path) -> None:
    processes("raise SystemExit(3)")
    names = ["1", "2", "3", "4"]
    left = gpu.supervisor.measure(
        [row(gpu, name) for name in names], results(gpu, tmp_path), options(gpu), time.time() + 100
    )
    assert left == ["4"]


def test_rows_present_are_skipped_and_failed_ones_tried_again_when_asked(
    gpu: ModuleType, processes: Processes, tmp_path: Path
) -> None:
    processes("import sys; open(sys.argv[1] + '/report.json', 'w').write('{\"ms\": 2}')")
    found = results(gpu, tmp_path, good={"ms": 1}, bad={"error": "boom"})
    rows = [row(gpu, "good"), row(gpu, "bad"), row(gpu, "other", needs="no_such_package")]
    gpu.supervisor.measure(rows, found, options(gpu), time.time() + 60)
    assert found.rows["good"] == {"ms": 1} and found.rows["bad"] == {"error": "boom"}
    assert found.rows["other"]["not_available"] == "no_such_package is not installed"
    gpu.supervisor.measure(rows, found, options(gpu, retry=True), time.time() + 60)
    assert found.rows["good"] == {"ms": 1} and found.rows["bad"]["ms"] == 2


def test_a_row_says_why_it_has_no_figure(gpu: ModuleType, tmp_path: Path) -> None:
    def unavailable(setting: Any) -> dict[str, Any]:
        raise UserError("no such engine")

    def broken(setting: Any) -> dict[str, Any]:
        raise ValueError("boom")

    setting = gpu.workloads.Setting(tmp_path)
    for measure, expected in (
        (unavailable, {"not_available": "no such engine"}),
        (broken, {"error": "ValueError: boom"}),
    ):
        assert gpu.supervisor.guarded(gpu.plan.Row("row", measure, 1), setting) == expected


def test_files_of_one_machine_merge_under_its_name(gpu: ModuleType, tmp_path: Path) -> None:
    first = results(gpu, tmp_path / "a", both={"ms": 1}, failed={"error": "boom"}, late={"error": "boom"})
    second = results(gpu, tmp_path / "b", both={"ms": 2}, late={"ms": 3}, failed={"error": "bang"}, new={"ms": 4})
    second.rows["both"] = {"error": "boom"}
    for each in (first, second):
        each.write()
    merged = gpu.results.merge([first.path, second.path], tmp_path / "out")
    assert merged.path.name == "gpu-nvidia-h100-80gb-hbm3.json"
    assert merged.rows == {"both": {"ms": 1}, "failed": {"error": "bang"}, "late": {"ms": 3}, "new": {"ms": 4}}
    second.header["torch"] = "3"
    second.write()
    with pytest.raises(UserError, match="torch is 3"):
        gpu.results.merge([second.path], tmp_path / "out")


def test_the_table_compares_with_transformers_at_its_best(gpu: ModuleType, tmp_path: Path) -> None:
    figures = {"tokens_per_second": 1000, "tflops": 50.0}
    rows = {
        "base, x: minibert eager": {"ms_per_step": 2.0, **figures},
        "base, x: transformers sdpa": {"ms_per_step": 5.0, **figures},
        "base, x: transformers compiled": {"ms_per_step": 3.0, **figures},
        "the machine's rates": {"matmul_tflops": 500.0},
        "kernel": {"error": "boom"},
    }
    lines = gpu.results.table(results(gpu, tmp_path, **rows))
    assert lines[1].split()[-4:] == ["2.00", "1.50x", "1000", "10%"]
    assert lines[-1] == "kernel: boom"


def test_a_row_ends_with_its_supervisor(gpu: ModuleType, tmp_path: Path) -> None:
    """Which is killed, and can do nothing about it, while the row runs."""
    pid = tmp_path / "pid"
    row = (
        "import os, sys, time; from pathlib import Path\n"
        "from gpu.plan import Row; from gpu.supervisor import serve; from gpu.workloads import Setting\n"
        "def measure(setting):\n"
        f"    open({str(pid)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"    os.rename({str(pid)!r} + '.new', {str(pid)!r})\n"
        "    time.sleep(600)\n"
        "serve('row', [Row('row', measure, 1)], Setting(Path(sys.argv[1])))\n"
    )
    supervisor = (
        "import sys; from gpu import supervisor\n"
        f"supervisor.command = lambda name, options, scratch: [sys.executable, '-c', {row!r}, scratch]\n"
        "supervisor.run_process('row', supervisor.Options(None, False, True, 'abc'), 600)\n"
    )
    environment = on_the_cpu()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "benchmarks")
    with subprocess.Popen([sys.executable, "-c", supervisor], env=environment) as process:
        while not pid.exists():
            time.sleep(0.1)
        process.kill()
    wait_until_dead(int(pid.read_text()))
