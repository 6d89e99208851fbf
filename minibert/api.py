"""The Python API: train on lists and get a classifier, as `minibert.finetune(texts, labels, ...)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.errors import UserError

if TYPE_CHECKING:
    from minibert.inference.classifier import Classifier

FILE_SETTINGS = ("train", "text_column", "text_pair_column", "label_column", "no_header", "encoding", "check")


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
    from minibert.runtime.ambient import default_torch_state

    given = {"train": (texts, labels), "validation": validation, "test": test}
    with default_torch_state():
        return run_from_lists(config, {part: pair for part, pair in given.items() if pair is not None}, sample_weight)
