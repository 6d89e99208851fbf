"""Do the tests notice? Changes of one line, each of which must turn a named test red.

    python tests/mutants.py                        all of them
    python tests/mutants.py --only batching        those with the word in their file, name or test
    python tests/mutants.py --results mutants.json      keep the results; caught ones are not run again

Each change is made in a copy of the project, never in the project itself, and its test runs there. The exit code is 1
if a change survives, or if its line is no longer there exactly once: then adapt the list below. Not part of CI.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # as conftest.py says

import pytest
import torch._dynamo  # noqa: F401 - this and what follows for the forks
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("minibert", "kernels", "tests", "benchmarks", "pyproject.toml", "README.md", "docs", "CONTRIBUTING.md")
SECONDS = 300  # of one test; a change may make it wait for ever


@dataclass(frozen=True)
class Mutant:
    """One line of one file, what it becomes, and the test that must fail."""

    name: str
    path: str
    old: str
    new: str
    test: str

    def fits(self, folder: Path) -> bool:
        return (folder / self.path).read_text(encoding="utf-8").count(self.old) == 1

    @property
    def key(self) -> str:
        return "\n".join((self.path, self.old, self.new, self.test))


def mutants() -> list[Mutant]:
    """The list in mutants.txt beside this file."""
    text = (Path(__file__).parent / "mutants.txt").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n") if block and not block.startswith("#")]
    return [Mutant(name, path, old[2:], new[2:], test) for name, path, old, new, test in blocks]


@contextmanager
def copy_of_project() -> Iterator[Path]:
    """The project in a folder of its own, with the shared data beside it as in a checkout."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name, "project")
        folder.mkdir()
        for entry in COPIED:
            source = ROOT / entry
            if source.is_dir():
                shutil.copytree(source, folder / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / entry)
        if (ROOT.parent / "shared").is_dir():
            Path(name, "shared").symlink_to((ROOT.parent / "shared").resolve())
        yield folder


def run_tests(folder: Path, tests: list[str], seconds: float | None = None) -> int:
    """pytest's exit code for some tests of the copy: 0 passed, 1 failed, anything else is no answer."""
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(folder, tests))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)  # with what it has started
        process.join()
        return 1
    return process.exitcode or 0


def in_child(folder: Path, tests: list[str]) -> None:
    """A fork has torch and transformers loaded, and nothing of the project: most of a test's time is their import."""
    os.setsid()
    os.chdir(folder)
    # Without compiled files: a change within the same second, of the same length, would go unseen.
    os.environ |= {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "tests"]
    with open(folder.parent / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(int(pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--assert=plain", *tests])))


def verdict(mutant: Mutant, folder: Path) -> str:
    """caught, SURVIVED, or what is wrong with the mutant itself."""
    if not mutant.fits(folder):
        return "LINE NOT FOUND ONCE"
    path = folder / mutant.path
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code = run_tests(folder, [mutant.test], SECONDS)
    finally:
        path.write_text(source, encoding="utf-8")
    return {0: "SURVIVED", 1: "caught"}.get(code, f"TEST DID NOT RUN ({code})")


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes of one line that the tests must notice.")
    parser.add_argument("--only", default="", metavar="WORD", help="those with WORD in their file, name or test")
    parser.add_argument("--results", type=Path, metavar="JSON", help="keep results here; caught ones are not run again")
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if arguments.only in f"{m.path} {m.name} {m.test}"]
    known = json.loads(arguments.results.read_text()) if arguments.results and arguments.results.is_file() else {}
    left = [m for m in chosen if known.get(m.key) != "caught"]
    with copy_of_project() as folder:
        tests = sorted({m.test for m in left})
        if tests and run_tests(folder, tests):
            print((folder.parent / "output").read_text()[-5000:])
            print("the named tests do not all pass without a change; mend that first")
            return 1
        for mutant in left:
            started = time.monotonic()
            known[mutant.key] = found = verdict(mutant, folder)
            print(f"{found:<10} {time.monotonic() - started:5.1f} s  {mutant.path}: {mutant.name}", flush=True)
            if arguments.results:
                arguments.results.write_text(json.dumps(known, indent=1))
    caught = sum(known.get(m.key) == "caught" for m in chosen)
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
