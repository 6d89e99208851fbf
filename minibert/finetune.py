"""`python -m minibert.finetune`: a data file in, a trained model folder out. With no arguments, a demonstration.

The same from Python, on two lists: `minibert.finetune(texts, labels, model=..., output=...)`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minibert.cli import checked_values, given_settings, run_command
from minibert.config import RunConfig
from minibert.errors import UserError

if TYPE_CHECKING:
    from minibert.inference.classifier import Classifier

FILE_SETTINGS = ("train", "text_column", "text_pair_column", "label_column", "no_header", "encoding", "check")


def main(argv: Sequence[str]) -> None:
    try:
        given = given_settings(argv)
        RunConfig(**given)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # started by torchrun beside another that says the same
            time.sleep(2)
            raise SystemExit(2) from None
        raise
    from minibert.run import run_from_files  # torch loads here, after the flags have been checked

    run_from_files(given, ["python", "-m", "minibert.finetune", *argv])


def finetune(
    texts: Iterable[Any],
    labels: Iterable[Any],
    *,
    validation: tuple[Iterable[Any], Iterable[Any]] | None = None,
    test: tuple[Iterable[Any], Iterable[Any]] | None = None,
    sample_weight: Iterable[float] | None = None,
    **flags: Any,
) -> Classifier:
    """Fine-tune on texts and labels (lists, arrays, pandas columns) and return the classifier.

    A text may be a pair, (first, second); `validation` and `test` are (texts, labels). `sample_weight` is what each
    text's loss counts in training; metrics count all rows alike. `flags` are the command's, in snake_case. What the
    user can fix is a `minibert.errors.UserError`.
    """
    settings = checked_values(flags, "minibert.finetune")
    for part in ("validation", "test"):
        if part in settings:
            raise UserError(f"minibert.finetune: give {part}=(texts, labels); files are for the command line")
    if of_files := [name for name in FILE_SETTINGS if name in settings]:
        raise UserError(f"minibert.finetune: {of_files[0]} is for data files on the command line; leave it out")
    config = RunConfig(**settings)
    from minibert.run import run_from_lists

    given = {"train": (texts, labels), "validation": validation, "test": test}
    return run_from_lists(config, {part: pair for part, pair in given.items() if pair is not None}, sample_weight)


class _CallableModule(ModuleType):
    """`minibert.finetune` is this module, which `python -m` runs, and a function, which people call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Classifier:
        return finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(run_command(main))
