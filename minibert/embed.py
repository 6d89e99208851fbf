"""`python -m minibert.embed RUN_OR_MODEL --file F --output emb.npy`: a vector for each text."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minibert.cli import Parser, add_column_flags, column_config, run_command
from minibert.errors import UserError
from minibert.runtime.files import atomic, check_output_path


def parser() -> Parser:
    result = Parser(prog="python -m minibert.embed", description="Sentence embeddings of a data file's texts.")
    result.add_argument("model", metavar="RUN_OR_MODEL", help="folder that finetune wrote, or any BERT")
    result.add_argument(
        "--file", type=os.path.expanduser, metavar="F", required=True, help="data file with a text column"
    )
    result.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="NPY",
        required=True,
        help="where to write the array [texts, hidden]",
    )
    result.add_argument("--pooling", choices=("mean", "cls", "pooler"), default="mean")
    result.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens (default the model's)")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_column_flags(result)
    return result


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(list(argv))
    output = Path(arguments.output)
    check_output_path(output, arguments.file)
    import numpy as np

    from minibert.data.columns import trained_columns
    from minibert.inference.classifier import load_encoder
    from minibert.inference.stream import stream_examples

    encoder = load_encoder(arguments.model, arguments.device, arguments.max_length)
    trained = trained_columns(arguments.model)
    parts = [
        encoder.embed(examples.texts, examples.pairs, pooling=arguments.pooling)
        for examples in stream_examples(arguments.file, column_config(arguments), trained=trained, same_kind=False)
    ]
    if not sum(map(len, parts)):
        raise UserError(f"{arguments.file}: no rows")
    vectors = np.concatenate(parts)
    with atomic(output) as temporary, open(temporary, "wb") as file:
        np.save(file, vectors)
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers written to {output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
