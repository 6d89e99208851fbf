"""The pages say what is so: their flags, files, links, rooms and tests exist, and generated pages are fresh."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from minibert import embed, evaluate, export, predict
from minibert.cli import run_parser

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {
    "docs/reference/cli.md": ("docs", "generate"),
    "benchmarks/README.md": ("benchmarks", "readme"),
}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
OTHER_FLAGS = {
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"),  # torchrun
    *("--logdir", "--again", "--rounds", "--only", "--batches", "--pack", "--packed"),  # TensorBoard, our benchmarks
    *("--follow", "--no-deps", "--durations", "--no-cache-dir", "--index-url"),  # git, pip, pytest
    *("--host", "--port", "--workers", "--preload"),  # uvicorn, gunicorn
}


@pytest.mark.parametrize("page", GENERATED)
def test_generated_pages_are_fresh(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = GENERATED[page]
    monkeypatch.syspath_prepend(ROOT / folder)
    try:
        made = importlib.import_module(name).page()
    finally:
        sys.modules.pop(name, None)
    written = (ROOT / page).read_text(encoding="utf-8")
    assert made == written, f"{page} is out of date: python {folder}/{name}.py"


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_flag_exists() -> None:
    parsers = (run_parser(), *(command.parser() for command in (predict, evaluate, embed, export)))
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", page.read_text(encoding="utf-8")))
        assert not {name.replace("_", "-") for name in named} - known - OTHER_FLAGS, page


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            found = page.parent / target if target else page
            assert found.exists(), f"{page}: {link}"
            assert not anchor or anchor in heading_anchors(found), f"{page}: {link}"


def test_every_file_that_is_named_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:minibert|kernels|tests|benchmarks|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_map_names_every_room() -> None:
    design = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*) \|.*\|$", design, re.MULTILINE)
    named = set(re.findall(r"`([\w./]+)`", " ".join(rows)))
    package = ROOT / "minibert"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert named == folders | modules | {"kernels/minibert_kernels/"}
    for name in re.findall(r"`(\w+/\w+\.py)`", design):
        assert (package / name).exists(), name


def test_nobody_is_sent_to_the_index() -> None:
    """The name minibert belongs to another package there: it is installed from a clone."""
    texts = [*PAGES, *(ROOT / "minibert").rglob("*.py"), *(ROOT / "minibert").rglob("*.md")]
    for path in texts:
        assert not re.search(r"pip3? install (-U |--upgrade )?['\"]?minibert", path.read_text(encoding="utf-8")), path


def test_promises_name_tests() -> None:
    """Each promise stands beside a test that exists."""
    promised = (ROOT / "docs" / "explanation" / "reliability.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    rows = [row for row in promised.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "test_hostile.py" in row, row
        assert not [name for name in named if f"def {name}(" not in tests], row
