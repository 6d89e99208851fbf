"""Imports point one way, and the project's folders do not get in anyone's way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minibert"


def imports_of(path: Path) -> set[str]:
    """The minibert modules that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minibert"):
            _, _, module = node.module.partition(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def test_modules_import_without_circles() -> None:
    graph = {path.stem: imports_of(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
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
            assert not [n for n in names if n.split(".")[0] in ("transformers", "sklearn", "scipy", "pandas")], path


def test_our_kernels_folder_does_not_disturb_transformers() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import BertModel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
