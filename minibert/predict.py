"""`python -m minibert.predict RUN` on `--text "..."`, `--file F` or standard input: labels for new text.

Everything is read, predicted and written in chunks, so its size does not matter. Standard input is one text a line,
and answered as it comes.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minibert.cli import TEXT_FLAGS, Parser, add_column_flags, column_config, run_command
from minibert.config import flag_name
from minibert.errors import UserError
from minibert.runtime.files import atomic, printable, refuse_output

if TYPE_CHECKING:
    import numpy as np

    from minibert.data.examples import Examples
    from minibert.inference.classifier import Classifier
    from minibert.inference.explain import Word
    from minibert.problem.problem import Problem

FORMATS = ("csv", "jsonl", "parquet")
STANDARD_INPUT = "-"
READ_SIZE = 1 << 16  # bytes of standard input at a time: what a pipe holds


def parser() -> Parser:
    result = Parser(prog="python -m minibert.predict", description="Labels and probabilities for new text.")
    result.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", action="extend", metavar="T", help="one or more texts")
    second = "the second text of each --text"
    result.add_argument("--text-pair", nargs="+", action="extend", metavar="T", help=second)
    source.add_argument(
        "--file",
        type=os.path.expanduser,
        metavar="F",
        help="data file with a text column; - is standard input, a text a line",
    )
    result.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help="where to write: .csv, .jsonl or .parquet (default: stdout)",
    )
    result.add_argument("--format", choices=FORMATS[:2], help="of what goes to stdout (default csv)")
    result.add_argument("--top-k", type=int, metavar="K", help="only the K most probable classes")
    result.add_argument("--explain", action="store_true", help="mark the words that moved the result (a pass a word)")
    text = (
        "put an apostrophe before CSV cells that a spreadsheet would run as a formula (those that begin with = + - @)"
    )
    result.add_argument("--spreadsheet-safe", action="store_true", help=text)
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    text = "give probabilities as trained, without the temperature fitted on validation (labels stay the same)"
    result.add_argument("--no-temperature", dest="temperature", action="store_false", help=text)
    add_column_flags(result)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    kind = output_format(arguments)
    check_pairs(arguments)
    if arguments.spreadsheet_safe and kind != "csv":
        raise UserError(f"--spreadsheet-safe: is about CSV files; {kind} holds texts as they are, leave it out")
    arguments.top_k = arguments.top_k or 0
    if arguments.file in (None, STANDARD_INPUT):
        check_no_file(arguments)
    from minibert.inference.classifier import load
    from minibert.problem.problem import REGRESSION
    from minibert.runtime.device import keep_freed_memory

    keep_freed_memory()
    classifier = load(arguments.run, arguments.device, arguments.temperature)
    warn_of_single_texts(arguments)
    if arguments.top_k and classifier.problem.kind == REGRESSION:
        raise UserError(f"--top-k {arguments.top_k}: {arguments.run} is a regression, it has no classes")
    if arguments.text is not None and not (arguments.output or arguments.format):
        print_predictions(classifier, arguments)
    else:
        write_predictions(classifier, arguments, kind)


def output_format(arguments: argparse.Namespace) -> str:
    """csv, jsonl or parquet; refuse at once what could not be written in the end."""
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k {arguments.top_k}: give a whole number of at least 1")
    if arguments.output is None:
        return arguments.format or "csv"
    path = Path(arguments.output)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"--output {path}: end the name in .csv, .jsonl or .parquet")
    if arguments.format not in (None, kind):
        raise UserError(f"--format {arguments.format}: --output {path} says {kind}; leave one of the two out")
    refuse_output(path, arguments.file)
    if kind == "parquet" and find_spec("pyarrow") is None:
        raise UserError(f"--output {path}: writing Parquet needs pyarrow; pip install pyarrow")
    return kind


def check_pairs(arguments: argparse.Namespace) -> None:
    """Second texts come one for each first."""
    texts, pairs = arguments.text, arguments.text_pair
    if pairs is not None and texts is None:
        raise UserError("--text-pair: goes with --text; in a file --text-pair-column names the second texts")
    if pairs is not None and len(pairs) != len(texts):
        raise UserError(f"{len(texts)} texts after --text but {len(pairs)} after --text-pair; give one for each")


def warn_of_single_texts(arguments: argparse.Namespace) -> None:
    """A model of pairs that is given one text a row says so and goes on; a file is refused as it is read."""
    from minibert.data.columns import trained_columns

    if arguments.file not in (None, STANDARD_INPUT):
        return
    trained = trained_columns(arguments.run)
    if trained is not None and not trained.pair and arguments.text_pair is not None:
        print(f"warning: {arguments.run} was trained on one text a row; leave --text-pair out", file=sys.stderr)
    if trained is not None and trained.pair and arguments.text_pair is None:
        advice = "--text-pair gives the second" if arguments.text else "give a --file with both"
        print(f"warning: {arguments.run} was trained on two texts a row; {advice}", file=sys.stderr)


def check_no_file(arguments: argparse.Namespace) -> None:
    """There are texts, and no flag that is about a file."""
    nothing = sys.stdin is None or (arguments.file is None and sys.stdin.isatty())
    if arguments.text is None and nothing:
        raise UserError("give --text, --file, or texts on standard input, one a line")
    for name in TEXT_FLAGS:
        if getattr(arguments, name) and (name != "encoding" or arguments.text is not None):  # lines have one
            raise UserError(f"{flag_name(name)}: is about a data file; give it with --file")


def print_predictions(classifier: Classifier, arguments: argparse.Namespace) -> None:
    """For people: one line a text with label, probability and text, then what --top-k and --explain add."""
    from minibert.inference.explain import explain, marked, strongest
    from minibert.inference.predictions import most_probable

    problem, texts, pairs = classifier.problem, arguments.text, arguments.text_pair
    logits = classifier.logits(texts, pairs)
    words = explain(classifier, texts, pairs, logits) if arguments.explain else None
    probabilities = problem.probabilities(logits)
    for i, decision in enumerate(problem.decisions(probabilities)):
        shown = [texts[i], *(pairs or [])[i : i + 1]]
        if words is not None:
            shown = [marked(text, words[i], in_pair=place > 0) for place, text in enumerate(shown)]
        print("\t".join([described(decision, probabilities[i], problem), *shown]))
        for k in most_probable(probabilities[i : i + 1], arguments.top_k)[0] if arguments.top_k else ():
            print(f"\t{probabilities[i, k]:.4f}\t{printable(problem.labels[k])}")
        if words is not None:
            explained = printable(problem.labels[problem.foremost(probabilities[i : i + 1])[0]])
            print(f"\tfor {explained}: " + (", ".join(map(str, strongest(words[i]))) or "no word matters"))


def described(decision: Any, probabilities: np.ndarray, problem: Problem) -> str:
    """A decision in a line: label and probability, each label with its own, or the number of a regression."""
    if isinstance(decision, float):
        return f"{decision:.4f}"
    if not isinstance(decision, list):
        return f"{printable(decision)}\t{probabilities.max():.4f}"
    by_name = dict(zip(problem.labels, probabilities, strict=True))
    return ", ".join(f"{printable(name)} {by_name[name]:.4f}" for name in decision) or "(none)"


def write_predictions(classifier: Classifier, arguments: argparse.Namespace, kind: str) -> None:
    """All columns, to --output (whole or not at all) or to standard output, chunk by chunk."""
    chunks = predicted_chunks(classifier, arguments)
    if not arguments.output:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        write_text(classifier, chunks, arguments, kind, sys.stdout)
        return
    path = Path(arguments.output)
    with atomic(path) as temporary:
        if kind == "parquet":
            count = write_parquet(classifier, chunks, arguments.top_k, temporary)
        else:  # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes \udxxx
            with open(temporary, "w", encoding="utf-8", newline="", errors="backslashreplace") as file:
                count = write_text(classifier, chunks, arguments, kind, file)
    print(f"{count} predictions written to {path}")


Chunk = tuple["Examples", "np.ndarray", "list[list[Word]] | None"]


def predicted_chunks(classifier: Classifier, arguments: argparse.Namespace) -> Iterator[Chunk]:
    """Texts with their logits and, if asked for, the effects of their words."""
    from minibert.inference.explain import explain

    for examples in read_chunks(arguments):
        logits = classifier.logits(examples.texts, examples.pairs)
        words = explain(classifier, examples.texts, examples.pairs, logits) if arguments.explain else None
        yield examples, logits, words


def read_chunks(arguments: argparse.Namespace) -> Iterator[Examples]:
    from minibert.data.columns import trained_columns
    from minibert.data.examples import Examples
    from minibert.inference.stream import stream_examples

    if arguments.text is not None:
        yield Examples("--text", arguments.text, arguments.text_pair, lines=list(range(1, len(arguments.text) + 1)))
    elif arguments.file not in (None, STANDARD_INPUT):
        yield from stream_examples(arguments.file, column_config(arguments), trained=trained_columns(arguments.run))
    else:
        encoding = column_config(arguments).encoding or "utf-8-sig"
        empty = True
        for examples in stream_lines(lambda: os.read(sys.stdin.fileno(), READ_SIZE), encoding):
            yield examples
            empty = False
        if empty and arguments.file is None:
            raise UserError("standard input is empty; give --text, --file, or texts on standard input, one a line")
        if empty:
            yield Examples("standard input", [])


def stream_lines(read: Callable[[], bytes], encoding: str) -> Iterator[Examples]:
    """The lines that are there, as soon as they are; blank ones too, so that line n is answered by row n."""
    from minibert.data.examples import Examples
    from minibert.data.sources import LONGEST_LINE, known_encoding

    source, rest, count = "standard input", "", 0
    decoder = codecs.getincrementaldecoder(known_encoding(encoding))()
    data = b"\n"
    while data:
        data = read()
        try:
            *lines, rest = (rest + decoder.decode(data, final=not data)).split("\n")
        except UnicodeError:
            raise UserError(f"{source}, after line {count}: not {encoding} text; give --encoding") from None
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"{source}, line {count + len(lines) + 1}: longer than {LONGEST_LINE >> 20} million characters"
            )
        if lines:
            numbers = list(range(count + 1, count + len(lines) + 1))
            yield Examples(source, [line.removesuffix("\r") for line in lines], lines=numbers)
            count += len(lines)
    if rest:
        yield Examples(source, [rest], lines=[count + 1])


def write_text(
    classifier: Classifier, chunks: Iterator[Chunk], arguments: argparse.Namespace, kind: str, file: IO[str]
) -> int:
    from minibert.inference.predictions import columns, records, write_csv

    count, first, top_k = 0, True, arguments.top_k
    for examples, logits, words in chunks:
        if kind == "csv":
            table = columns(examples, classifier.problem, logits, top_k=top_k, words=words)
            write_csv(file, table, header=first, spreadsheet_safe=arguments.spreadsheet_safe)
        else:
            for record in records(examples, classifier.problem, logits, top_k=top_k, words=words):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        count, first = count + len(examples), False
    return count


def write_parquet(classifier: Classifier, chunks: Iterator[Chunk], top_k: int, path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    from minibert.inference.predictions import columns

    writer, count = None, 0
    try:
        for examples, logits, words in chunks:
            table = columns(examples, classifier.problem, logits, top_k=top_k, words=words)
            schema = pyarrow.schema([(name, _arrow_type(name, classifier)) for name in table])
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(pyarrow.table({name: _storable(values) for name, values in table.items()}, schema))
            count += len(examples)
    finally:
        if writer is not None:
            writer.close()
    return count


def _arrow_type(name: str, classifier: Classifier) -> Any:
    import pyarrow

    from minibert.problem.problem import MULTI, REGRESSION

    if name == "row":
        return pyarrow.int64()
    if name.startswith("probability") or name.endswith("_probability"):
        return pyarrow.float64()
    if name == "predicted" and classifier.problem.kind == MULTI:
        return pyarrow.list_(pyarrow.string())
    is_number = name == "predicted" and classifier.problem.kind == REGRESSION
    return pyarrow.float64() if is_number else pyarrow.string()


def _storable(values: list[Any]) -> list[Any]:
    """Strings that UTF-8 can hold."""
    return [v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for v in values]


if __name__ == "__main__":
    sys.exit(run_command(main))
