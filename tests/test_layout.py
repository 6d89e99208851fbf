"""Imports point one way, and the project's folders do not get in anyone's way."""

from __future__ import annotations

import ast
import os
import pwd
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minibert"


def imports_of(path: Path) -> set[str]:
    """The minibert modules that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minibert":
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(modules())


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.parts): ROOT / path.with_suffix(".py") for path in paths}


def test_modules_import_without_circles() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    assert len(graph) > 50
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_transformers_and_scikit_learn_stay_in_tests_and_benchmarks() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            allowed = {"sklearn"} if path == PACKAGE / "sklearn.py" else set()  # the estimator, which nothing imports
            foreign = {"transformers", "sklearn", "scipy", "pandas"} - allowed
            assert not [n for n in names if n.split(".")[0] in foreign], path


def test_our_kernels_folder_does_not_disturb_transformers() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import BertModel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_tests_write_into_nobodys_home() -> None:
    """Nor does what they start, which gets the same variables."""
    home = Path(os.environ["MINIBERT_TESTS_HOME"])
    assert Path.home() == home != Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert Path(os.environ["HF_HOME"]).is_relative_to(home)
