"""`python -m minibert.export RUN --onnx [--int8] [--output FILE]`: a model for onnxruntime, checked against ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.cli import Parser, add_column_flags, column_config, run_command
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.filenames import ONNX, ONNX_INT8
from minibert.runtime.files import check_output_path

if TYPE_CHECKING:
    import numpy as np

    from minibert.batching.tokens import Tokens
    from minibert.data.examples import Examples
    from minibert.inference.classifier import Classifier
    from minibert.model.bert import BertForSequenceClassification
    from minibert.problem.problem import Problem

TOLERANCE = 1e-4  # of logits up to 1, or of their largest; fp32 against fp32
LARGEST = 2_000_000_000  # bytes that a protobuf, and so an ONNX file, may have
BATCH = 32


def parser() -> Parser:
    result = Parser(prog="python -m minibert.export", description="Write a trained model in another form.")
    result.add_argument("run", metavar="RUN", help="folder that finetune wrote, or any BERT classifier")
    result.add_argument("--onnx", action="store_true", help="as ONNX: padded ids, mask and types in, logits out")
    result.add_argument("--int8", action="store_true", help="weights as 8-bit integers (dynamic quantisation)")
    result.add_argument(
        "--output", type=os.path.expanduser, metavar="FILE", help=f"default RUN/{ONNX}, or RUN/{ONNX_INT8}"
    )
    result.add_argument(
        "--file",
        type=os.path.expanduser,
        metavar="F",
        help="labelled data on which to compare --int8 (default: sample texts)",
    )
    add_column_flags(result, labels=True)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    if not arguments.onnx:
        raise UserError("say which form to write: --onnx")
    if arguments.file and not arguments.int8:
        raise UserError("--file: is for --int8, whose predictions are compared on it; leave it out")
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    folder = Path(os.path.expanduser(arguments.run))
    output = Path(arguments.output or folder / (ONNX_INT8 if arguments.int8 else ONNX))
    if arguments.output:
        check_output_path(output, arguments.file)
    if not arguments.output and not folder.is_dir():
        raise UserError(f"--output: is needed where RUN is no folder here ({arguments.run})")
    from minibert.inference.classifier import load
    from minibert.runtime.files import atomic, writing

    classifier = load(arguments.run, "cpu")
    if not arguments.output:
        with writing(output.parent):
            output.parent.mkdir(exist_ok=True)
    plain = output.with_name(f".{output.name}.fp32.{os.getpid()}.tmp")
    with atomic(output) as temporary:
        try:
            print(export(classifier, plain if arguments.int8 else temporary))
            if arguments.int8:
                quantise(plain, temporary)
                print(compare(classifier, plain, temporary, arguments))
        finally:
            plain.unlink(missing_ok=True)
    print(f"saved to {output}, {output.stat().st_size / 1e6:.1f} MB")


def export(classifier: Classifier, path: Path) -> str:
    """Write the fp32 graph, run it in onnxruntime on several shapes, and say how far it is from our logits."""
    import onnx
    import onnxruntime

    from minibert.inference.onnx import build
    from minibert.version import __version__

    size = sum(p.numel() * 4 for p in classifier.model.parameters())
    if size > LARGEST:
        raise UserError(f"--onnx: the model has {size / 1e9:.1f} GB, more than one ONNX file can hold")
    problem = classifier.problem
    metadata = {
        "labels": problem.labels,
        "problem_type": problem.kind,
        "thresholds": problem.thresholds,
        "temperature": problem.temperature,
        "max_length": classifier.max_length,
        "minibert": __version__,
    }
    onnx.save_model(build(classifier.model, metadata), str(path))
    shapes, largest, difference = verify(classifier.model, path)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(f"--onnx: onnxruntime's logits differ from ours by {difference:.2g}; nothing was written")
    named = ", ".join(f"{batch}x{length}" for batch, length in shapes)
    return (
        f"checked in onnxruntime {onnxruntime.__version__} on {named} tokens: logits differ by {difference:.1g} at most"
    )


def verify(model: BertForSequenceClassification, path: Path) -> tuple[list[tuple[int, int]], float, float]:
    """(batch sizes and lengths tried, our largest logit, the largest difference), on random ids, padded and not."""
    import numpy as np
    import torch

    limit, types = model.config.max_position_embeddings, model.config.type_vocab_size
    shapes = [(1, 1), (1, limit), (2, 7), (3, min(33, limit)), (5, min(128, limit))]
    session, rng = open_session(path), np.random.default_rng(0)
    largest = difference = 0.0
    for batch, length in shapes:
        lengths = rng.integers(1, length + 1, batch)
        lengths[0] = length
        inputs = {
            "input_ids": rng.integers(0, model.config.vocab_size, (batch, length)),
            "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
            "token_type_ids": rng.integers(0, types, (batch, length)),
        }
        theirs = session.run(["logits"], inputs)[0]
        with torch.inference_mode():
            ours = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
        largest = max(largest, float(np.abs(ours).max()))
        difference = float(np.maximum(difference, np.abs(ours - theirs).max()))  # NaN stays
    return shapes, largest, difference


def quantise(source: Path, target: Path) -> None:
    """Weights of products as int8, one scale a column; activations are rounded as they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # it asks for a shape inference that these graphs do not need
    try:
        # 7 bits of range: sums of full 8-bit products overflow on CPUs without VNNI, silently
        quantize_dynamic(source, target, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
    finally:
        logger.setLevel(level)


def compare(classifier: Classifier, plain: Path, small: Path, arguments: Any) -> str:
    """What int8 changes: on the labelled --file in metrics too, else on the sample texts of the demonstration."""
    before, after, targets = _logits_of_both(classifier, plain, small, arguments)
    rows = f"{len(before):,} {'sample texts' if targets is None else 'rows'}"
    lines = [f"int8 against fp32 on {rows}: {_change(classifier.problem, before, after)}"]
    if targets is not None:
        old, new = (classifier.problem.metrics(logits, targets) for logits in (before, after))
        for name, value in old.items():
            if isinstance(value, float) and isinstance(new[name], float):
                lines.append(f"  {name:<24} fp32 {value:.4f}   int8 {new[name]:.4f}   change {new[name] - value:+.4f}")
    return "\n".join(lines)


def _logits_of_both(
    classifier: Classifier, plain: Path, small: Path, arguments: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """[n, L] logits of either file on the texts to compare on, and their targets if they are labelled."""
    import numpy as np

    sessions = [open_session(plain), open_session(small)]
    logits: list[list[np.ndarray]] = [[], []]
    targets: list[np.ndarray] = []
    for examples in _comparison_texts(classifier, arguments):
        if not len(examples):  # all there is of a file without rows
            continue
        tokens = classifier.encode(examples.texts, examples.pairs)
        for session, of_session in zip(sessions, logits, strict=True):
            of_session.append(session_logits(session, tokens))
        if arguments.file:
            targets.append(classifier.problem.targets(examples.labels or []))
    if not logits[0]:
        raise UserError(f"{arguments.file}: no rows to compare on")
    before, after = (np.concatenate(parts) for parts in logits)
    return before, after, np.concatenate(targets) if targets else None


def _change(problem: Problem, before: np.ndarray, after: np.ndarray) -> str:
    """How many labels stay and how far probabilities move, from [n, L] logits."""
    old, new = problem.probabilities(before), problem.probabilities(after)
    largest = f"{abs(old - new).max():.4f}"
    if problem.kind == "regression":
        return f"largest change of a value {largest}"
    same = sum(a == b for a, b in zip(problem.decisions(old), problem.decisions(new), strict=True))
    return f"the same label on {same / len(old):.2%}, largest change of a probability {largest}"


def _comparison_texts(classifier: Classifier, arguments: Any) -> Iterator[Examples]:
    from minibert.data.columns import trained_columns
    from minibert.inference.stream import stream_examples, stream_labelled
    from minibert.run import DEMO_DATA

    if arguments.file:
        trained = trained_columns(arguments.run)
        yield from stream_labelled(arguments.file, classifier.problem, column_config(arguments), trained)
    else:
        yield from stream_examples(str(DEMO_DATA), RunConfig())


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU that says nothing but errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def session_logits(session: Any, tokens: Tokens, *, by_length: bool = True) -> np.ndarray:
    """[texts, L] from onnxruntime, in batches of 32, of like length or as they come; of windows their mean."""
    import numpy as np

    order = np.argsort(-tokens.lengths, kind="stable") if by_length else np.arange(len(tokens))
    parts = [session.run(["logits"], padded(tokens, order[i : i + BATCH]))[0] for i in range(0, len(order), BATCH)]
    logits = np.concatenate(parts)
    result = np.empty_like(logits)
    result[order] = logits
    return tokens.mean_of_windows(result)


def padded(tokens: Tokens, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some texts as the [B, S] arrays that the exported graph takes."""
    import numpy as np

    lengths = tokens.lengths[rows]
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B, S]
    inputs = {"attention_mask": mask.astype(np.int64)}
    for name, flat in (("input_ids", tokens.ids), ("token_type_ids", tokens.type_ids)):
        inputs[name] = np.zeros(mask.shape, np.int64)
        if flat is not None:
            inputs[name][mask] = np.concatenate([flat[tokens.offsets[i] : tokens.offsets[i + 1]] for i in rows])
    return inputs


if __name__ == "__main__":
    sys.exit(run_command(main))
