"""The Python API: `minibert.finetune(texts, labels, ...)` trains on what is in memory or in files, like the command."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_type_hints

from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.messages import messages_in_python

if TYPE_CHECKING:
    from minibert.inference.classifier import Classifier


class Settings(TypedDict, total=False):
    """What `finetune` takes as further keywords: the flags of the command, each of them optional."""

    model: str | PathLike[str] | None
    tokenizer: str | PathLike[str] | None
    head: str | None
    head_dropout: float | None
    dropout: float | None
    text_column: str | Sequence[str]
    text_pair_column: str | None
    label_column: str | Sequence[str]
    label_delimiter: str | None
    label_names: str | Sequence[str]
    positive_label: str | None
    delimiter: str | None
    quote: str | None
    no_header: bool
    encoding: str | None
    on_bad_rows: Literal["error", "skip"]
    validation_split: float
    test_split: float
    split_seed: int
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"]
    max_train_samples: float | str | None  # a number of rows, or "10%"
    max_length: int | None
    truncation: Literal["head", "tail", "head_tail", "window"]
    window_stride: int | None
    epochs: float | Literal["auto"]
    max_steps: int | None
    batch_size: int
    batch_tokens: int | None
    gradient_accumulation_steps: int
    learning_rate: float | Literal["auto"]
    head_learning_rate: float | None
    weight_decay: float
    warmup_ratio: float
    schedule: Literal["linear", "cosine", "constant"]
    max_grad_norm: float
    layer_lr_decay: float
    freeze: str | int
    class_weights: str | PathLike[str] | Mapping[Any, float]
    label_smoothing: float
    head_init: Literal["probe", "random"]
    temperature: bool
    seed: int
    seeds: str | Sequence[int]
    search: str | int | None
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    attention: Literal["auto", "sdpa", "flash", "triton"]
    engine: Literal["auto", "eager", "compile", "graph"]
    kernels: bool
    onednn: bool
    length_buckets: bool
    cls_only: bool
    compact_vocabulary: bool
    cache_frozen: bool
    deterministic: bool
    eval_steps: int | None
    metric: str | None
    early_stopping_patience: int | None
    save_steps: int | None
    resume: bool
    keep_checkpoint: bool
    report_to: str | Sequence[str]  # tensorboard, wandb, mlflow
    run_name: str | None
    quiet: bool
    output: str | PathLike[str] | None
    overwrite: bool
    push_to_hub: str | None


def finetune(
    texts: Any,
    labels: Iterable[Any] | None = None,
    *,
    validation: Any = None,
    test: Any = None,
    sample_weight: Iterable[float] | None = None,
    **settings: Unpack[Settings],
) -> Classifier:
    """Fine-tune on texts and labels, on a table or on a file, and return the classifier.

    What the user can fix is a `minibert.errors.UserError`.

    texts: strings, or pairs of strings, in a list, an array or a column. Without labels: a table of both (a DataFrame,
        or a Dataset or DatasetDict of Hugging Face), or the path of a file.
    labels: one for each text; a list or set of labels each, or a table with a column of 0 and 1 for each label.
    validation: what the best weights are chosen by: (texts, labels), or a table or path, as for training. Without it a
        part of the training rows.
    test: what the finished model is judged by, in the same forms.
    sample_weight: what each text's loss counts in training; metrics count all rows alike.
    """
    given = {"train": texts if labels is None else (texts, labels), "validation": validation, "test": test}
    if labels is None and isinstance(texts, Mapping) and "train" in texts:  # a DatasetDict
        given = {split: texts.get(split) if split == "train" or own is None else own for split, own in given.items()}
    with messages_in_python():
        return _finetune(checked_values(dict(settings), "minibert.finetune"), given, sample_weight)


def _finetune(settings: dict[str, Any], given: dict[str, Any], sample_weight: Iterable[float] | None) -> Classifier:
    for name in ("train", "check"):
        if name in settings:
            raise UserError(f"minibert.finetune: {name} is for the command line; the data is the first argument")
    for name in ("validation", "test"):
        if name in settings:  # by the name that transformers' scripts have for it
            raise UserError(f"minibert.finetune: give {name}=, (texts, labels) or what else holds the training data")
    config = RunConfig(**settings)
    from minibert.run import run_from_files, run_in_memory
    from minibert.runtime.ambient import default_torch_state

    given = {split: data for split, data in given.items() if data is not None}
    with default_torch_state():
        if not isinstance(given.get("train"), str | PathLike):
            return run_in_memory(config, given, sample_weight)
        if sample_weight is not None:
            raise UserError("sample_weight: is for texts in memory, not for files")
        if others := [split for split, data in given.items() if not isinstance(data, str | PathLike)]:
            raise UserError(f"{others[0]}: expected the path of a file, as for training")
        paths = {split: str(path) for split, path in given.items()}
        classifier = run_from_files(settings | paths, ["minibert.finetune(...)"])
    assert classifier is not None  # as only --check gives none
    return classifier


def _spell_out(function: Any) -> None:
    """Let `help`, completion and `inspect.signature` see each setting, with its default and what it does."""
    own, hints = inspect.signature(function), get_type_hints(Settings)
    fields = [field for field in dataclasses.fields(RunConfig) if field.name in hints]
    named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    for field in fields:
        options = {"default": field.default, "annotation": hints[field.name]}
        named.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **options))
    function.__signature__ = own.replace(parameters=named)
    told = [f"    {field.name}: {field.metadata['help']}" for field in fields]
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__), "", "Settings, as the command's flags:", *told])


_spell_out(finetune)
