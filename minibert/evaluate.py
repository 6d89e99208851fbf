"""`python -m minibert.evaluate RUN --file F`: metrics of a saved model on a labelled file, as JSON.

The file is read in chunks; only logits and labels are kept.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minibert.cli import Parser, add_column_flags, column_config, run_command
from minibert.errors import UserError
from minibert.runtime.files import check_output_path, write_json


def parser() -> Parser:
    result = Parser(prog="python -m minibert.evaluate", description="Metrics of a saved model on a labelled file.")
    result.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    result.add_argument(
        "--file", type=os.path.expanduser, metavar="F", required=True, help="data file with text and labels"
    )
    result.add_argument("--output", type=os.path.expanduser, metavar="JSON", help="also write the metrics to this file")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_column_flags(result, labels=True)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    if arguments.output:
        check_output_path(Path(arguments.output), arguments.file)
    import numpy as np

    from minibert.data.columns import trained_columns
    from minibert.inference.classifier import load
    from minibert.inference.stream import stream_labelled

    classifier = load(arguments.run, arguments.device)
    problem = classifier.problem
    logits, targets = [], []
    trained = trained_columns(arguments.run)
    for examples in stream_labelled(arguments.file, problem, column_config(arguments), trained):  # a chunk at a time
        logits.append(classifier.logits(examples.texts, examples.pairs))
        targets.append(problem.targets(examples.labels or []))
    if not sum(map(len, targets)):
        raise UserError(f"{arguments.file}: no rows")
    metrics = problem.metrics(np.concatenate(logits), np.concatenate(targets))
    if arguments.output:
        write_json(Path(arguments.output), metrics)
    print(json.dumps(metrics, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(run_command(main))
