"""The GPU benchmark, which gets one chance on a machine, runs from end to end at tiny sizes and loses no row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minibert.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, minilm: Path, shared_data: Path) -> dict[str, Any]:
    """What `--smoke` writes, with real weights and a few messages."""
    folder = tmp_path_factory.mktemp("gpu")
    path, packed = folder / "result.json", folder / "packed"
    benchmark(folder, "--pack", str(packed))
    lines = (packed / "sms_spam.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (packed / "sms_spam.csv").write_text("".join(lines[:61]), encoding="utf-8")
    done = benchmark(folder, "--smoke", "--budget", "3600", "--output", str(path), "--packed", str(packed))
    last = json.loads(done.stdout.splitlines()[-1])
    result: dict[str, Any] = json.loads(path.read_text())
    assert last["seconds"] == result["seconds"] and last["figures"]
    return result


def benchmark(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_the_file_says_what_was_measured_on_what(result: dict[str, Any]) -> None:
    assert {"commit", "machine", "gpu", "driver", "torch", "transformers", "triton", "python", "seconds"} <= set(result)
    assert result["smoke"] is True
    assert list(result["parts"]) == list("0123456")


def test_no_row_fails(result: dict[str, Any]) -> None:
    """Here without a GPU some engines and kernels are not available; nothing else may be missing."""
    rows = {(part, name): value for part, of_part in result["parts"].items() for name, value in of_part.items()}
    inner = {(*key, name): v for key, value in rows.items() if isinstance(value, dict) for name, v in value.items()}
    bad = ("error", "skipped", "running")
    assert not {key: v for key, v in (rows | inner).items() if isinstance(v, str) and v.startswith(bad)}


def test_rows_hold_their_figures(result: dict[str, Any]) -> None:
    parts = result["parts"]
    eager = parts["1"]["base, 32 x 25 tokens, eager"]
    assert {"steps_per_second", "real_tokens_per_second", "share_of_matmul_rate", "warm_up_seconds", "loss"} <= set(
        eager
    )
    assert eager["tokens_a_step"] * eager["steps_per_second"] == pytest.approx(
        eager["real_tokens_per_second"], rel=0.01
    )
    kernels = parts["1"]["base, kernels of the best engine"]
    assert 0 < len(kernels["top"]) <= 15 and {"kernel", "ms_a_step", "calls_a_step", "share"} <= set(kernels["top"][0])
    contest = parts["3"]["base, 32 x 25 tokens, side by side"]
    ratio = contest["transformers, sdpa"] / contest["minibert"]
    assert contest["minibert_is_faster_by"] == pytest.approx(ratio, rel=0.01)
    assert "transformers, sdpa, default" in parts["3"]["base, 32 x 25 tokens, side by side, compiled, default"]
    assert parts["0"]["kernel norm, 36 tokens, error"]["right"] is True
    assert parts["0"]["kernel adamw, time"]["microseconds"] > 0
    assert {"times_as_long", "ms_a_step_as_is"} <= set(parts["4"]["base, 32 x 25 tokens, cls_only off"])
    assert {"wall_seconds", "train_seconds"} <= set(parts["5"]["1.3 M questions, base, 1 epoch, batches of 256"])
    assert parts["6"]["minilm, losses, engine eager"]["largest_difference"] < 1e-4
    assert parts["6"]["MiniLM on SMS spam"]["rows"] == 60


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_a_row_says_why_it_has_no_figure(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"parts": {"1": {"before": {"ms": 1.0}, "killer": "running"}}}')

    def unavailable() -> None:
        raise UserError("no such engine")

    def broken() -> None:
        raise ValueError("boom")

    def never() -> None:
        raise AssertionError("called again")

    run = gpu.Run(path, tmp_path, time.time() + 100)
    run.start_part("1", 0.5)
    run.row("before", 1, never)
    run.row("killer", 1, never)
    run.row("unavailable", 1, unavailable)
    run.row("broken", 1, broken)
    run.row("long", 60, never)
    run.row("good", 1, lambda: {"ms": 2.0})
    rows = json.loads(path.read_text())["parts"]["1"]
    assert rows["before"] == {"ms": 1.0} and rows["good"] == {"ms": 2.0}
    assert rows["killer"].startswith("error: killed its process")
    assert rows["unavailable"] == "not available: no such engine"
    assert rows["broken"] == "error: ValueError: boom"
    assert rows["long"].startswith("skipped: ")
    for i in range(3):
        run.rows[f"killer {i}"] = "running"
        run.row(f"killer {i}", 1, never)
    assert "too many" in run.row("after three that killed", 1, never)


def test_made_texts_have_the_lengths_they_should(gpu: Any, tmp_path: Path) -> None:
    """SST-2's phrases have 9.4 words on average; a made word in six is two tokens, as about so many of English are."""
    from minibert.tokens import Tokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(gpu.vocabulary()))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 30_522
    for kind, low, high in (("phrases", 12, 14), ("questions", 16, 18)):
        path = gpu.write_texts(tmp_path / f"{kind}.csv", kind, 5000)
        texts = [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]
        tokens = tokenizer.encode(texts, None, 512)
        assert len(texts) == 5000 and low < tokens.lengths.mean() < high
        assert 1 not in tokens.ids  # [UNK]
