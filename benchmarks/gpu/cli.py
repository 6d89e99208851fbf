"""The command: measure, or merge files, list rows, pack what is to be carried."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import gpu
from minibert.errors import UserError

from .plan import Row, rows
from .results import commit, merge, open_results, table
from .supervisor import Options, machine, measure, serve
from .texts import load_corpus, pack
from .workloads import Setting

MINUTES = 8.5


def main() -> None:
    arguments = parser().parse_args()
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="benchmarks/gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--output", type=Path, metavar="DIR", help="folder of the results file; required to measure")
    found.add_argument("--minutes", type=float, default=MINUTES, help=f"start no row after these (default {MINUTES})")
    found.add_argument("--packed", type=Path, metavar="FOLDER", help="what --pack has written")
    found.add_argument("--only", metavar="REGEX", help="rows whose names it matches")
    found.add_argument("--retry", action="store_true", help="measure rows again that the file says have failed")
    found.add_argument("--commit", help="what is measured (default: git's, or the variable MINIBERT_COMMIT)")
    found.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: leave a GPU alone")
    found.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    found.add_argument("--pack", type=Path, metavar="FOLDER", help="write what is to be carried along, and end")
    found.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="merge results files into DIR, and end")
    found.add_argument("--list", action="store_true", help="print the rows and their expected seconds, and end")
    found.add_argument("--row", help=argparse.SUPPRESS)  # of a row's process
    found.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return found


def run(arguments: argparse.Namespace) -> None:
    chosen = matching(arguments.only)
    if arguments.row:
        serve(arguments.row, rows(), Setting(arguments.scratch, arguments.packed, arguments.smoke))
    elif arguments.list:
        list_rows(chosen)
    elif arguments.pack:
        print(f"{arguments.pack}: {pack(arguments.pack):.1f} MB; measure with --packed {arguments.pack}")
    elif arguments.output is None:
        raise UserError("--output is missing: give the folder of the results file")
    elif arguments.merge:
        merged = merge(arguments.merge, arguments.output)
        print(f"{merged.path}: {len(merged.rows)} rows")
    else:
        measure_all(arguments, chosen)


def matching(pattern: str | None) -> list[Row]:
    try:
        chosen = [row for row in rows() if pattern is None or re.search(pattern, row.name)]
    except re.error as error:
        raise UserError(f"--only {pattern}: not a regular expression ({error})") from None
    if not chosen:
        raise UserError(f"--only {pattern}: matches no row; --list prints them")
    return chosen


def list_rows(chosen: list[Row]) -> None:
    total = 0
    for row in chosen:
        total += row.seconds
        print(f"{row.seconds:>4} s  {total / 60:>5.1f} min  {row.name}")


def measure_all(arguments: argparse.Namespace, chosen: list[Row]) -> None:
    """Measure until the time is up; last line: JSON."""
    ends = time.time() + 60 * arguments.minutes
    options = Options(
        packed=packed_folder(arguments.packed),
        smoke=arguments.smoke,
        cpu=arguments.device == "cpu",
        commit=arguments.commit or commit(),
        retry=arguments.retry,
    )
    header = machine(options)
    if header["device"] == "cpu" and not (options.cpu or options.smoke):
        raise UserError("torch finds no GPU here; give --device cpu or --smoke to measure the processor")
    results = open_results(arguments.output, header)
    print(f"{header['device']}, commit {options.commit}: {results.path}", flush=True)
    left = measure(chosen, results, options, ends)
    print("\n".join(table(results)))
    if left:
        print(f"{len(left)} rows are left; the same command goes on with them:\n  " + "\n  ".join(left))
    print(json.dumps({"file": str(results.path), "rows": len(results.rows), "left": len(left)}))


def packed_folder(folder: Path | None) -> Path | None:
    """The folder, if it is there and complete; it may have been left behind, which must not cost the measurement."""
    if folder is not None and folder.exists():
        load_corpus(folder, folder)
        return folder
    why = "no --packed" if folder is None else f"no folder {folder}"
    print(f"{why}: the rows use the messages bundled with minibert, and none has pretrained weights", flush=True)
    return None
