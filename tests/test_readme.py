"""What the README says is so: its flags exist, its modules exist, its Python runs, its figures are those measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minibert import export, predict
from minibert.cli import run_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_exists() -> None:
    parsers = (run_parser(), predict.parser(), export.parser())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}  # torchrun's
    known |= {
        "--logdir",
        "--again",
        "--trainers",
        "--rounds",
        "--only",
        "--batches",
    }  # of tensorboard and our benchmarks
    known |= {"--pack", "--packed"}  # of benchmarks/gpu
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", README))
    assert named and not {name.replace("_", "-") for name in named} - known


def test_the_layout_names_every_module() -> None:
    layout = README.split("## How the code is laid out")[1]
    named = set(re.findall(r"`(\w+\.py)`", layout))
    modules = {path.name for path in (ROOT / "minibert").rglob("*.py")}
    assert named | {"__init__.py", "errors.py", "files.py"} == modules


def test_the_python_example_runs(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    texts = [f"this is {'good' if i % 2 else 'bad'} number {i}" for i in range(40)]
    labels = ["good" if i % 2 else "bad" for i in range(40)]
    scope = {"texts": texts, "labels": labels}
    exec(code.replace("path/to/bert", str(minilm)), scope)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()


def test_the_result_files_are_there() -> None:
    for name in re.findall(r"benchmarks/results/[\w.-]+", README):
        assert (ROOT / name.rstrip(".")).exists(), name


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def check_row(label: str, *figures: str) -> None:
    """The README has a row of a table with these figures, of whom the label names; its words are free."""
    owner = "minibert" if "minibert" in label else label.split()[0].strip("`,'")
    tables = [line.strip("| ").split("|") for line in README.replace("**", "").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in cells if cell.strip()] for cells in tables]
    wanted = [figure for figure in figures if figure]
    assert any(owner in row[0] and row[-len(wanted) :] == wanted for row in rows if row), (owner, wanted)


def plus_minus(numbers: dict[str, float], digits: int) -> str:
    return f"{numbers['mean']:.{digits}f} ± {numbers['std']:.{digits}f}"


STEPS = {
    "transformers, padded to 175": "transformers, padded to 175 (the tutorials' way)",
    "transformers, best": "transformers at its best",
    "minibert, batches of like length": "minibert with `--length-buckets`",
    "minibert without CLS-only last layer": "minibert without the [CLS]-only last layer",
    "minibert without compact vocabulary": "minibert without the compact vocabulary",
    "minibert without attention chunks": "minibert without small groups in attention",
    "minibert without dropout": "minibert with dropout 0",
}


def test_figures_of_steps() -> None:
    measured = results("steps-cpu")
    for name, milliseconds in measured["milliseconds_a_step"].items():
        ratio, digits = measured["minibert_is_faster_by"][name], 1 if name.startswith("transformers") else 2
        if not name.endswith("compiled"):  # in the text
            check_row(
                STEPS.get(name, name), f"{milliseconds:.0f}", "" if name == "minibert" else f"{ratio:.{digits}f}x"
            )


TRAININGS = {
    "best": "all weights, 1 epoch, transformers at its best",
    "minibert": "all weights, 1 epoch, minibert",
    "frozen-tutorial": "frozen, 10 epochs, the tutorial's loop in transformers",
    "frozen-minibert": "frozen, 10 epochs, minibert",
}


def test_figures_of_whole_trainings() -> None:
    for name, numbers in results("end-to-end")["summary"].items():
        several = numbers["seeds"] > 1
        shown = {
            score: plus_minus(numbers[score], digits) if several else f"{numbers[score]['mean']:.{digits}f}"
            for score, digits in (("wall_seconds", 1), ("accuracy", 3), ("spam_f1", 3))
        }
        gigabytes = f"{numbers['peak_megabytes']['mean'] / 1000:.1f} GB"
        row = f"{TRAININGS[name]} ({numbers['seeds']} seed{'s' if several else ''})"
        check_row(row, shown["wall_seconds"], gigabytes, shown["accuracy"], shown["spam_f1"])


SERVING = {
    "transformers pipeline": "transformers' pipeline, batches of 32",
    "transformers pipeline, sorted by length": "transformers' pipeline, sorted by length",
    "onnxruntime": "onnxruntime, the same batches",
    "onnxruntime, sorted by length": "onnxruntime, sorted by length",
    "minibert": "minibert",
    "onnxruntime int8, sorted by length": "onnxruntime, int8, sorted by length (probabilities move by up to 0.06)",
}


def test_figures_of_prediction() -> None:
    measured = results("serving-cpu")
    for name, row in SERVING.items():
        ratio = f"{measured['faster_than_the_pipeline'][name]:.1f}x".replace("1.0x", "1")
        check_row(row, f"{measured['texts_per_second'][name]:.0f}", ratio)


def test_figures_of_memory_by_rows() -> None:
    commands = {
        "finetune": "`finetune`, an epoch",
        "evaluate": "`evaluate`",
        "predict --file": "`predict --file`",
        "predict < texts": "`predict`, standard input to standard output",
    }
    for name, numbers in results("load-cpu")["commands"].items():
        peaks = [f"{numbers[rows]['peak_megabytes']:.0f} MB" for rows in ("100000 rows", "1000000 rows")]
        check_row(commands[name], *peaks, f"{numbers['bytes_a_row']} bytes")


TASKS = {
    "sms_spam": "SMS",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "trec6": "TREC-6",
    "trec50": "TREC-50",
    "goemotions": "GoEmotions",
}


def test_figures_of_reference_scores() -> None:
    verdicts = results("scores")["verdicts"]
    assert set(verdicts) == set(TASKS)
    for task, found in verdicts.items():
        scores = [
            f"{plus_minus(found[name], 1)} ({found[name]['seeds']} seeds)" for name in ("minibert", "transformers")
        ]
        check_row(TASKS[task], *scores)


def test_promises_name_tests() -> None:
    """Each promise stands beside a test that exists."""
    promised = README.split("## What is promised")[1].split("\n## ")[0]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    rows = [row for row in promised.splitlines() if row.startswith("| ")][1:]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert not [name for name in named if f"def {name}(" not in tests], row
