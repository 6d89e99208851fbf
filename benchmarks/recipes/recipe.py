"""What the recipes share: run one command of minibert in a process of its own, print its result beside the published
one, and keep both in benchmarks/results/recipes.json.

A recipe that the file holds is shown, not run again; one that was stopped goes on from its checkpoint.
`--again` runs it anew, `--extra "--max-steps 5"` adds flags (for a quick look; then nothing is kept).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RUNS = ROOT / "runs" / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"


@dataclass
class Recipe:
    """One tutorial: the command as benchmarks/README.md has it, and what to read from its metrics."""

    name: str
    command: str  # of finetune, or Python, with file names as a user would have them
    files: dict[str, Callable[[], Path]]  # where those files are here
    scores: Callable[[dict[str, Any]], dict[str, float]]  # metrics.json -> what to compare
    published: dict[str, float | str] = field(default_factory=dict)
    note: str = ""
    after: Callable[[Path], dict[str, Any]] | None = None  # what is done with the run folder


def run_recipes(*recipes: Recipe) -> None:
    """The whole of a recipe script."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--again", action="store_true", help="run anew what results/recipes.json holds")
    parser.add_argument("--extra", default="", help="more flags of finetune; the result is then not kept")
    arguments = parser.parse_args()
    for recipe in recipes:
        done = kept().get(recipe.name)
        if done is None or arguments.again or arguments.extra:
            done = run(recipe, shlex.split(arguments.extra), arguments.again)
            if not arguments.extra:
                keep(recipe.name, done)
        show(recipe, done)


def run(recipe: Recipe, extra: list[str], again: bool) -> dict[str, Any]:
    output = RUNS / (recipe.name + ("-trial" if extra else ""))
    started = time.perf_counter()
    if recipe.command.startswith("import"):
        run_python(recipe, output, extra)
    else:
        run_command(recipe, output, extra, again)
    metrics = json.loads((output / "metrics.json").read_text())
    more = recipe.after(output) if recipe.after else {}
    return {
        "command": recipe.command,
        "scores": {name: round(value, 4) for name, value in recipe.scores(metrics).items()},
        "published": recipe.published,
        "note": recipe.note,
        **more,
        "seconds": round(time.perf_counter() - started, 1),
        **environment(output),
    }


def run_command(recipe: Recipe, output: Path, extra: list[str], again: bool) -> None:
    names = {name: str(path()) for name, path in recipe.files.items()}
    flags = [names.get(word, word) for word in shlex.split(recipe.command.replace("\\\n", " "))]
    flags[flags.index("--output") + 1] = str(output)
    begun = (output / "checkpoints" / "last" / "state.safetensors").is_file() and not (output / "metrics.json").exists()
    flags += ["--resume"] if begun and not (again or extra) else ["--overwrite"]
    minibert(*flags[3:], *extra)


def run_python(recipe: Recipe, output: Path, extra: list[str]) -> None:
    """The lines of Python, with `texts` and `labels` read from the recipe's one file."""
    if extra:
        sys.exit("--extra: this recipe has no flags")
    shutil.rmtree(output, ignore_errors=True)
    (path,) = recipe.files.values()
    read = f"import csv\nrows = list(csv.DictReader(open({str(path())!r}, encoding='utf-8', newline='')))\n"
    read += "texts, labels = [row['text'] for row in rows], [row['label'] for row in rows]\n"
    in_own_process(["-c", read + recipe.command.replace("runs/lists", str(output))])


def minibert(*flags: str, module: str = "finetune", capture: bool = False) -> str:
    """A command of minibert, from this checkout."""
    return in_own_process(["-m", f"minibert.{module}", *flags], capture)


def in_own_process(arguments: list[str], capture: bool = False) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    output = subprocess.PIPE if capture else None
    done = subprocess.run([sys.executable, *arguments], stdout=output, text=True, env=environment)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return done.stdout or ""


def environment(output: Path) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    record = json.loads((output / "run.json").read_text())
    machine = f"{platform.machine()}, {record['machine']['threads']} threads"
    load = round(os.getloadavg()[0], 1)  # how busy the machine was: seconds mean little above its number of cores
    return {"commit": commit.stdout.strip(), "machine": machine, "load": load, "versions": record["versions"]}


def kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(name: str, result: dict[str, Any]) -> None:
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps({**kept(), name: result}, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(RESULTS)


def show(recipe: Recipe, done: dict[str, Any]) -> None:
    """Ours beside the published figures; the last line is JSON."""
    print(f"\n{recipe.name}  ({done['seconds']} s)\n{recipe.command}\n")
    print(f"{'':<26}{'minibert':>10}  published")
    for name in dict.fromkeys([*done["scores"], *recipe.published]):
        ours = done["scores"].get(name)
        print(f"{name:<26}{'-' if ours is None else format(ours, '.4f'):>10}  {recipe.published.get(name, '-')}")
    if recipe.note:
        print(recipe.note)
    print(json.dumps({"recipe": recipe.name, **done}, ensure_ascii=False))


def shared(*parts: str) -> Callable[[], Path]:
    """A file of the shared data, or one line that says which is missing."""

    def find() -> Path:
        path = SHARED.joinpath(*parts)
        if not path.is_file():
            sys.exit(f"{path}: no such file; the recipes read real data beside the project")
        return path

    return find


def made(name: str, rows: Callable[[], Iterable[tuple[str, str]]]) -> Callable[[], Path]:
    """A CSV of (text, label) made from shared data, in the folder of the runs."""

    def write() -> Path:
        import csv

        RUNS.mkdir(parents=True, exist_ok=True)
        path = RUNS / name
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows()])
        return path

    return write


def trec(part: str) -> list[tuple[str, str]]:
    """(question, coarse label) of `train_5500` or `TREC_10`."""
    lines = shared("trec", f"{part}.label")().read_text(encoding="latin-1").splitlines()
    return [(line.partition(" ")[2], line.partition(":")[0]) for line in lines if line]
