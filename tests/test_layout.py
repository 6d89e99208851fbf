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


# Each room may import from those after it. `cli` stands above `runtime` because it turns that room's errors, such as
# memory that runs out, into one line; `sklearn` is one more door to the Python API.
ORDER = [
    ("finetune", "predict", "evaluate", "embed", "export", "sklearn"),
    ("api",),
    ("run",),
    ("runs",),
    ("cli",),
    ("reporting",),
    ("training",),
    ("inference",),
    ("batching",),
    ("data",),
    ("model",),
    ("problem",),
    ("runtime",),
    ("messages",),
    ("config",),
    ("errors", "filenames", "version"),
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LOADING_MODELS = ("minibert.model.bert", "minibert.model.checkpoint")  # `from_pretrained` of a class that this makes
MOST_LINES = 350
NOT_YET_SHORT = {  # may only shrink
    "kernels/minibert_kernels/attention.py",
}


def modules() -> dict[str, Path]:
    """Every module of the package but the empty ones of its rooms, by its dotted name."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.parts): ROOT / path.with_suffix(".py") for path in paths}


def imports_of(path: Path) -> set[str]:
    """The minibert modules that a file imports, inside functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minibert":
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(modules())


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_modules_import_without_circles() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    assert len(graph) > 50
    graph[LOADING_MODELS[0]].discard(LOADING_MODELS[1])
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_rooms_import_downwards_only() -> None:
    upwards = [
        (name, other)
        for name, path in modules().items()
        for other in imports_of(path)
        if room_of(other) != room_of(name) and LEVEL[room_of(other)] <= LEVEL[room_of(name)]
    ]
    assert not upwards


def test_files_are_short() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    lines = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {path for path, count in lines.items() if count > MOST_LINES} <= NOT_YET_SHORT


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
