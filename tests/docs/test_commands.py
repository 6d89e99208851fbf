"""The commands and the Python of README, tutorials and notebook run, on small files and with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from minibert import cli
from minibert.runs import setup

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README": ROOT / "README.md", "first-model": ROOT / "docs" / "tutorials" / "first-model.md"}
PYTHON_PAGES = {"README": PAGES["README"], "python": ROOT / "docs" / "reference" / "python.md"}
NOTEBOOK = ROOT / "docs" / "tutorials" / "from-python.ipynb"


@pytest.fixture
def clone(films: Path, film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the commands run as in a clone, with the files that they name and a tiny model."""
    (tmp_path / "minibert" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "minibert" / "demo" / "messages.csv", tmp_path / "minibert" / "demo")
    shutil.copy(films, tmp_path / "reviews.csv")
    (tmp_path / "new.csv").write_text("text\ngood film\nbad film\n", encoding="utf-8")
    monkeypatch.setattr(setup, "demo_weights", lambda: str(film_model))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(page: Path) -> list[str]:
    """The lines of the fenced blocks without a language, continued ones joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    texts = [text.replace("\\\n", " ") for language, text in blocks if not language]
    return [line for text in texts for line in text.splitlines() if line]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.slow
def test_every_command_runs(page: str, clone: Path) -> None:
    listed = commands(PAGES[page])
    assert len(listed) >= 6
    for command in listed:
        words = shlex.split(command)
        if words[0] in ("pip", "pytest"):
            check_is_run_by_ci(words)
        elif words[:2] == ["python", "-m"]:
            module = import_module(words[2])
            assert cli.run_command(module.main, words[3:]) == 0, command
        else:
            subprocess.run(words, check=True, cwd=clone)


def check_is_run_by_ci(words: list[str]) -> None:
    """Installing and the whole suite are the work of .ci/run; here only the extras are looked up."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    if words[0] == "pytest":
        assert re.search(r"^pytest\b", script, re.MULTILINE)
        return
    assert words[:3] == ["pip", "install", "-e"] and "pip install --quiet -e" in script
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.fullmatch(r"\.(\[([\w,]+)\])?", words[3])
    assert named and set((named[2] or "").split(",")) <= {*extras, ""}


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_example_runs(page: str, clone: Path, film_model: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", PYTHON_PAGES[page].read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    texts = [f"this is {'good' if i % 2 else 'bad'} number {i}" for i in range(40)]
    labels = ["good" if i % 2 else "bad" for i in range(40)]
    exec(code.replace("path/to/bert", str(film_model)), {"texts": texts, "labels": labels})
    assert (clone / "runs" / "mine" / "model.safetensors").exists()


def test_the_notebook_runs(clone: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and not any(cell.get("outputs") for cell in cells)
    scope: dict[str, object] = {}
    for cell in code:
        exec(cell, scope)
    assert (clone / "runs" / "messages" / "report.html").exists()
