"""`python -m minibert.predict RUN --text "..."` or `--file F [--output preds.csv]`: labels for new text.

A file is read, predicted and written in chunks, so its size does not matter.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minibert.cli import Parser, add_column_flags, column_config, run_command
from minibert.errors import UserError

if TYPE_CHECKING:
    from minibert.classifier import Classifier


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m minibert.predict", description="Labels and probabilities for new text.")
    parser.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="T", help="one or more texts")
    source.add_argument("--file", metavar="F", help="data file with a text column")
    parser.add_argument("--output", metavar="CSV", help="where to write (default: the terminal)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    text = "give probabilities as trained, without the temperature fitted on validation (labels stay the same)"
    parser.add_argument("--no-temperature", dest="temperature", action="store_false", help=text)
    add_column_flags(parser)
    arguments = parser.parse_args(list(argv))
    from minibert.classifier import load

    classifier = load(arguments.run, arguments.device, arguments.temperature)
    if arguments.text and not arguments.output:
        print_predictions(classifier, arguments.text)
    else:
        write_predictions(classifier, arguments)


def print_predictions(classifier: Classifier, texts: list[str]) -> None:
    """One line a text: label, probability, text."""
    for text, prediction in zip(texts, classifier.predict(texts), strict=True):
        print(f"{prediction.label}\t{prediction.score:.4f}\t{text}")


def write_predictions(classifier: Classifier, arguments: Any) -> None:
    """CSV with a header, to --output (whole or not at all) or to standard output."""
    from minibert.files import atomic

    path = Path(arguments.output) if arguments.output else None
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it, or give another --output")
    if path is None:
        _write_rows(classifier, arguments, sys.stdout)
        return
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace", newline="") as file:
        count = _write_rows(classifier, arguments, file)
    print(f"{count} predictions written to {path}")


def _write_rows(classifier: Classifier, arguments: Any, file: IO[str]) -> int:
    from minibert import predictions
    from minibert.data import Examples, stream_examples

    writer = csv.writer(file, lineterminator="\n")
    if arguments.text:
        lines = list(range(1, len(arguments.text) + 1))
        chunks = iter([Examples("--text", arguments.text, None, None, lines)])
    else:
        chunks = stream_examples(arguments.file, column_config(arguments))
    count = 0
    for examples in chunks:
        if count == 0:
            writer.writerow(predictions.header(examples, classifier.problem))
        logits = classifier.logits(examples.texts, examples.pairs)
        writer.writerows(predictions.rows(examples, classifier.problem, logits, None))
        count += len(examples)
    return count


if __name__ == "__main__":
    sys.exit(run_command(main))
