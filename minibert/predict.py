"""`python -m minibert.predict RUN` on `--text "..."`, `--file F` or standard input: labels for new text.

Everything is read, predicted and written in chunks, so its size does not matter. Standard input is one text a line,
and answered as it comes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.cli import TEXT_FLAGS, Parser, add_column_flags, column_config, run_command
from minibert.config import flag_name
from minibert.errors import UserError
from minibert.runtime.files import atomic, check_output_path

if TYPE_CHECKING:
    from minibert.data.columns import Columns
    from minibert.data.examples import Examples

FORMATS = ("csv", "jsonl", "parquet")
STANDARD_INPUT = "-"
READ_SIZE = 1 << 16  # bytes of standard input at a time: what a pipe holds


def parser() -> Parser:
    result = Parser(prog="python -m minibert.predict", description="Labels and probabilities for new text.")
    result.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", action="extend", metavar="T", help="one or more texts")
    help = "the second text of each --text"
    result.add_argument("--text-pair", nargs="+", action="extend", metavar="T", help=help)
    help = "data file with a text column; - is standard input, a text a line"
    source.add_argument("--file", type=os.path.expanduser, metavar="F", help=help)
    help = "where to write: .csv, .jsonl or .parquet (default: stdout)"
    result.add_argument("--output", type=os.path.expanduser, metavar="FILE", help=help)
    result.add_argument("--format", choices=FORMATS[:2], help="of what goes to stdout (default csv)")
    result.add_argument("--top-k", type=int, metavar="K", help="only the K most probable classes")
    result.add_argument("--explain", action="store_true", help="mark the words that moved the result (a pass a word)")
    help = "put an apostrophe before CSV cells that a spreadsheet would run as a formula (that begin with = + - @)"
    result.add_argument("--spreadsheet-safe", action="store_true", help=help)
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    help = "give probabilities as trained, without the temperature fitted on validation (labels stay the same)"
    result.add_argument("--no-temperature", dest="temperature", action="store_false", help=help)
    add_column_flags(result)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    file_format = output_format(arguments)
    check_texts(arguments)
    from minibert.data.columns import trained_columns
    from minibert.inference.classifier import load
    from minibert.inference.predictions import predict_chunks, readable_lines, write_parquet, write_text
    from minibert.problem.problem import REGRESSION

    classifier = load(arguments.run, arguments.device, arguments.temperature)
    problem, top_k, trained = classifier.problem, arguments.top_k or 0, trained_columns(arguments.run)
    if top_k and problem.kind == REGRESSION:
        raise UserError(f"--top-k {top_k}: {arguments.run} is a regression, it has no classes")
    chunks = predict_chunks(classifier, read_texts(arguments, trained), arguments.explain)
    options = {"as_csv": file_format == "csv", "top_k": top_k, "spreadsheet_safe": arguments.spreadsheet_safe}
    if arguments.text is not None and not (arguments.output or arguments.format):
        for predicted in chunks:
            print("\n".join(readable_lines(predicted, problem, top_k=top_k)))
    elif not arguments.output:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        write_text(sys.stdout, chunks, problem, **options)
    else:
        with atomic(Path(arguments.output)) as temporary:  # whole or not at all
            if file_format == "parquet":
                count = write_parquet(temporary, chunks, problem, top_k=top_k)
            else:  # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes \udxxx
                with open(temporary, "w", encoding="utf-8", newline="", errors="backslashreplace") as file:
                    count = write_text(file, chunks, problem, **options)
        print(f"{count} predictions written to {arguments.output}")


def output_format(arguments: argparse.Namespace) -> str:
    """csv, jsonl or parquet; UserError now for what could not be written in the end."""
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k {arguments.top_k}: give an integer of at least 1")
    result = arguments.format or "csv"
    if arguments.output is not None:
        path = Path(arguments.output)
        result = path.suffix.lower().removeprefix(".")
        if result not in FORMATS:
            raise UserError(f"--output {path}: end the name in .csv, .jsonl or .parquet")
        if arguments.format not in (None, result):
            raise UserError(f"--format {arguments.format}: --output {path} says {result}; leave one of the two out")
        check_output_path(path, arguments.file)
        if result == "parquet" and find_spec("pyarrow") is None:
            raise UserError(f"--output {path}: writing Parquet needs pyarrow; pip install pyarrow")
    if arguments.spreadsheet_safe and result != "csv":
        raise UserError(f"--spreadsheet-safe: is about CSV files; {result} holds texts as they are, leave it out")
    return str(result)


def check_texts(arguments: argparse.Namespace) -> None:
    """There are texts, a second for each first if there are seconds, and no flag about a file without a file."""
    texts, pairs = arguments.text, arguments.text_pair
    if pairs is not None and texts is None:
        raise UserError("--text-pair: goes with --text; in a file --text-pair-column names the second texts")
    if pairs is not None and len(pairs) != len(texts):
        raise UserError(f"{len(texts)} texts after --text but {len(pairs)} after --text-pair; give one for each")
    if arguments.file not in (None, STANDARD_INPUT):
        return
    if texts is None and (sys.stdin is None or (arguments.file is None and sys.stdin.isatty())):
        raise UserError("give --text, --file, or texts on standard input, one a line")
    for name in TEXT_FLAGS:
        if getattr(arguments, name) and (name != "encoding" or texts is not None):  # lines have one
            raise UserError(f"{flag_name(name)}: is about a data file; give it with --file")


def read_texts(arguments: argparse.Namespace, trained: Columns | None) -> Iterator[Examples]:
    """The texts to answer, chunk by chunk; `trained`: the columns that training read."""
    from minibert.data.examples import Examples
    from minibert.inference.stream import stream_examples, stream_lines

    texts, config = arguments.text, column_config(arguments)
    if arguments.file not in (None, STANDARD_INPUT):
        yield from stream_examples(arguments.file, config, trained=trained)
        return
    warn_of_single_texts(arguments, trained)
    if texts is not None:
        yield Examples("--text", texts, arguments.text_pair, lines=list(range(1, len(texts) + 1)))
        return
    empty = True
    for examples in stream_lines(lambda: os.read(sys.stdin.fileno(), READ_SIZE), config.encoding or "utf-8-sig"):
        yield examples
        empty = False
    if empty and arguments.file is None:
        raise UserError("standard input is empty; give --text, --file, or texts on standard input, one a line")
    if empty:
        yield Examples("standard input", [])


def warn_of_single_texts(arguments: argparse.Namespace, trained: Columns | None) -> None:
    """A model of pairs that is given one text a row says so and goes on; a file is refused as it is read."""
    if trained is not None and not trained.pair and arguments.text_pair is not None:
        print(f"warning: {arguments.run} was trained on one text a row; leave --text-pair out", file=sys.stderr)
    if trained is not None and trained.pair and arguments.text_pair is None:
        advice = "--text-pair gives the second" if arguments.text else "give a --file with both"
        print(f"warning: {arguments.run} was trained on two texts a row; {advice}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
