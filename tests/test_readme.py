"""What the README says is so: its flags exist, its modules exist, its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minibert import export, predict
from minibert.cli import run_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_exists() -> None:
    parsers = (run_parser(), predict.parser(), export.parser())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}  # torchrun's
    known |= {"--logdir", "--parts"}  # tensorboard's, benchmarks/gpu.py's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", README))
    assert named and not named - known


def test_the_layout_names_every_module() -> None:
    layout = README.split("## How the code is laid out")[1]
    named = set(re.findall(r"`(\w+\.py)`", layout))
    modules = {path.name for path in (ROOT / "minibert").glob("*.py")}
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


def test_figures_are_those_of_the_result_files() -> None:
    """Every file of results that the README names is there."""
    for name in re.findall(r"benchmarks/results/[\w.-]+", README):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_promises_name_tests() -> None:
    """Each promise stands beside a test that exists."""
    promised = README.split("## What is promised")[1].split("\n## ")[0]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = [row for row in promised.splitlines() if row.startswith("| ")][1:]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert not [name for name in named if f"def {name}(" not in tests], row
