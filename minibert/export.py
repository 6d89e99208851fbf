"""`python -m minibert.export RUN [--int8] [--output FILE]`: a model for onnxruntime, compared with ours."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.cli import Parser, add_column_flags, column_config, run_command
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.filenames import ONNX, ONNX_INT8
from minibert.runtime.files import check_output_path

if TYPE_CHECKING:
    import numpy as np

    from minibert.data.examples import Examples
    from minibert.inference.classifier import Classifier
    from minibert.problem.problem import Problem

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # what torch exports with, and what the result is checked in


def parser() -> Parser:
    result = Parser(prog="python -m minibert.export", description="Write a trained model for onnxruntime.")
    result.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    help = "as ONNX, padded ids, mask and types in, logits out: the one format there is, so it may be left out"
    result.add_argument("--onnx", action="store_true", help=help)
    result.add_argument("--int8", action="store_true", help="weights as 8-bit integers (dynamic quantization)")
    help = f"default RUN/{ONNX}, or RUN/{ONNX_INT8} with --int8"
    result.add_argument("--output", type=os.path.expanduser, metavar="FILE", help=help)
    help = "labelled data on which to compare --int8 (default: sample texts)"
    result.add_argument("--file", type=os.path.expanduser, metavar="F", help=help)
    add_column_flags(result, labels=True)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    if arguments.file and not arguments.int8:
        raise UserError("--file: is for --int8, whose predictions are compared on it; leave it out")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"exporting needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    output = output_path(arguments)
    from minibert.inference.classifier import load
    from minibert.inference.onnx import export, quantize
    from minibert.runtime.files import atomic, writing

    classifier = load(arguments.run, "cpu")
    with writing(output.parent):
        output.parent.mkdir(exist_ok=True)
    plain = output.with_name(f".{output.name}.fp32.{os.getpid()}.tmp")
    with atomic(output) as temporary:
        try:
            print(export(classifier, plain if arguments.int8 else temporary))
            if arguments.int8:
                quantize(plain, temporary)
                print(compare(classifier, plain, temporary, arguments))
        finally:
            plain.unlink(missing_ok=True)
    print(f"saved to {output}, {output.stat().st_size / 1e6:.1f} MB")


def output_path(arguments: argparse.Namespace) -> Path:
    """--output, or where transformers.js, optimum and text-embeddings-inference look in a model's folder."""
    if arguments.output:
        check_output_path(Path(arguments.output), arguments.file)
        return Path(arguments.output)
    folder = Path(os.path.expanduser(arguments.run))
    if not folder.is_dir():
        raise UserError(f"--output: is needed, as RUN is not a local folder ({arguments.run})")
    return folder / (ONNX_INT8 if arguments.int8 else ONNX)


def compare(classifier: Classifier, plain: Path, quantized: Path, arguments: argparse.Namespace) -> str:
    """What int8 changes: on the labelled --file in metrics too, else on the sample texts of the demonstration."""
    before, after, targets = logits_of_both(classifier, plain, quantized, arguments)
    rows = f"{len(before):,} {'sample texts' if targets is None else 'rows'}"
    lines = [f"int8 against fp32 on {rows}: {describe_change(classifier.problem, before, after)}"]
    if targets is not None:
        old, new = (classifier.problem.metrics(logits, targets) for logits in (before, after))
        for name, value in old.items():
            if isinstance(value, float) and isinstance(new[name], float):
                lines.append(f"  {name:<24} fp32 {value:.4f}   int8 {new[name]:.4f}   change {new[name] - value:+.4f}")
    return "\n".join(lines)


def logits_of_both(
    classifier: Classifier, plain: Path, quantized: Path, arguments: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """[n, L] logits of either file on the texts to compare on, and their targets if they are labelled."""
    import numpy as np

    from minibert.inference.onnx import open_session, session_logits

    sessions = [open_session(plain), open_session(quantized)]
    logits, targets = [], []
    for examples in comparison_texts(classifier, arguments):
        if not len(examples):  # all there is of a file without rows
            continue
        tokens = classifier.encode(examples.texts, examples.pairs)
        logits.append([session_logits(session, tokens) for session in sessions])
        if arguments.file:
            targets.append(classifier.problem.targets(examples.labels or []))
    if not logits:
        raise UserError(f"{arguments.file}: no rows to compare on")
    before, after = (np.concatenate(chunks) for chunks in zip(*logits, strict=True))
    return before, after, np.concatenate(targets) if targets else None


def describe_change(problem: Problem, before: np.ndarray, after: np.ndarray) -> str:
    """How many labels stay and how far probabilities move, from [n, L] logits."""
    old, new = problem.probabilities(before), problem.probabilities(after)
    largest = f"{abs(old - new).max():.4f}"
    if problem.kind == "regression":
        return f"largest change of a value {largest}"
    same = sum(a == b for a, b in zip(problem.decisions(old), problem.decisions(new), strict=True))
    return f"the same label on {same / len(old):.2%}, largest change of a probability {largest}"


def comparison_texts(classifier: Classifier, arguments: argparse.Namespace) -> Iterator[Examples]:
    from minibert.data.columns import trained_columns
    from minibert.inference.stream import stream_examples, stream_labelled
    from minibert.run import DEMO_DATA

    if arguments.file:
        trained = trained_columns(arguments.run)
        yield from stream_labelled(arguments.file, classifier.problem, column_config(arguments), trained)
    else:
        yield from stream_examples(str(DEMO_DATA), RunConfig())


if __name__ == "__main__":
    sys.exit(run_command(main))
