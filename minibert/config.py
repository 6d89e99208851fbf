"""What a run is: its settings in four groups, each setting a command-line flag.

A function takes the group that it needs; only what stands above the rooms sees all of `RunConfig`. Nothing here
imports torch, so `--help` and argument errors answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from minibert.errors import UserError

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
PATHS = ("model", "tokenizer", "train", "validation", "test", "class_weights")  # flags that may name files
TRUNCATIONS = ("head", "tail", "head_tail", "window")
TRACKERS = ("tensorboard", "wandb", "mlflow")
SECONDS_OF = {"s": 1, "m": 60, "h": 3600}  # the units of --search
KINDS = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": tuple}

# The values that a number may have: lowest, highest, and what the message asks for.
Limits = tuple[float, float, str]
TINY = math.ulp(0.0)  # the smallest number above 0
COUNT: Limits = (1, (1 << 31) - 1, "an integer of at least 1, below 2**31")
FRACTION: Limits = (0, math.nextafter(1, 0), "a number from 0 up to, not including, 1")
POSITIVE: Limits = (TINY, math.nextafter(math.inf, 0), "a positive number")
NOT_NEGATIVE: Limits = (0, (1 << 63) - 1, "a number of at least 0")


def auto_or_number(value: Any) -> float | None:
    """None stands for auto until the model and the rows are known."""
    return None if value == "auto" else float(value)


def count_or_percentage(value: Any) -> float:
    """1000 -> 1000, "10%" -> 0.1"""
    text = str(value).strip()
    number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if 0 < number < 1:
        return number
    if number.is_integer():
        return int(number)
    raise ValueError(value)


def flag(
    default: Any,
    help: str,
    *aliases: str,
    group: str,
    choices: tuple[str, ...] = (),
    limits: Limits | None = None,
    kind: Any = None,
) -> Any:
    """A setting and, from the same line, a command-line flag with its help, its other names and its values.

    group: the flag's group in --help; kind: what makes a value of text, if not the annotated type.
    """
    names = {"aliases": aliases, "group": group, "choices": choices, "limits": limits, "kind": kind}
    return field(default=default, metadata={"help": help, **names})


KIND_NAMES: dict[Any, str] = {
    auto_or_number: "auto or a number",
    count_or_percentage: "a number of rows or a percentage",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def kind_of(known: dataclasses.Field[Any]) -> Any:
    """What makes a value of a setting from text: int, str, ..."""
    return known.metadata["kind"] or KINDS[str(known.type).removesuffix(" | None")]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The rows: their files, columns and splits, and how much of a text is read."""

    train: str | None = flag(None, "training file", "train_file", group="data")
    validation: str | None = flag(None, "validation file", "validation_file", group="data")
    test: str | None = flag(None, "test file", "test_file", group="data")
    text_column: tuple[str, ...] = flag(
        (), "column(s) of the text, joined by a space; repeat or separate by commas", "text_column_names", group="data"
    )
    text_pair_column: str | None = flag(None, "column of the second text of a pair", group="data")
    label_column: tuple[str, ...] = flag(
        (), "column of the label; several 0/1 columns for multi-label", "label_column_name", group="data"
    )
    label_names: tuple[str, ...] = flag((), "names of the labels 0, 1, 2, ..., in their order", group="data")
    label_delimiter: str | None = flag(None, "separator of a row's labels, such as , (multi-label)", group="data")
    positive_label: str | None = flag(None, "which of two labels is positive (default the second)", group="data")
    delimiter: str | None = flag(None, "of CSV cells: one character, or tab (default by the first rows)", group="data")
    quote: str | None = flag(None, "of CSV cells: one character, or none (default by the first rows)", group="data")
    no_header: bool = flag(False, "the first row is data; columns are then called 0, 1, 2, ...", group="data")
    encoding: str | None = flag(None, "encoding of the files (default UTF-8, or what they look like)", group="data")
    on_bad_rows: str = flag(
        "error",
        "rows without text or label, or with the wrong number of cells",
        group="data",
        choices=("error", "skip"),
    )
    validation_split: float = flag(
        0.15, "fraction of the training file for validation, where no file is", group="data", limits=FRACTION
    )
    test_split: float = flag(
        0.0, "fraction of the training file for test, where no file is", group="data", limits=FRACTION
    )
    split_seed: int = flag(42, "seed of the split", group="data", limits=NOT_NEGATIVE)
    problem_type: str = flag(
        "auto", "what the labels are; auto: fractions are a regression", group="data", choices=("auto", *PROBLEM_TYPES)
    )
    max_train_samples: float | None = flag(
        None,
        "use only this many rows of the training file, or so much of it (10%), stratified, before others are split off",
        group="data",
        kind=count_or_percentage,
        limits=(TINY, (1 << 31) - 1, COUNT[2]),
    )
    max_length: int | None = flag(
        None,
        "longest text in tokens (default 512 or the model's limit)",
        "max_seq_length",
        group="tokens",
        limits=COUNT,
    )
    truncation: str = flag("head", "which part of a longer text is kept", group="tokens", choices=TRUNCATIONS)
    window_stride: int | None = flag(
        None,
        "tokens from one window's start to the next's (default half of --max-length)",
        group="tokens",
        limits=COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """What is trained, and how."""

    model: str | None = flag(
        None, "model folder or hub id (default: the demo's MiniLM)", "model_name_or_path", group="model"
    )
    tokenizer: str | None = flag(
        None, "folder or hub id of the tokenizer, if not the model's", "tokenizer_name", group="model"
    )
    head: str | None = flag(
        None,
        "linear, or mlp:N for a hidden layer of N units with ReLU (default linear, or what the model has)",
        group="model",
    )
    head_dropout: float | None = flag(
        None, "dropout before the classifier (default the model's)", group="model", limits=FRACTION
    )
    dropout: float | None = flag(
        None, "dropout in the encoder, attention included (default the model's)", group="model", limits=FRACTION
    )
    epochs: float = flag(
        None,
        "passes over the training rows, or auto: by their number",
        "num_train_epochs",
        group="recipe",
        kind=auto_or_number,
        limits=POSITIVE,
    )
    max_steps: int | None = flag(None, "number of steps, whatever --epochs says", group="recipe", limits=COUNT)
    batch_size: int = flag(32, "examples per batch", "per_device_train_batch_size", group="recipe", limits=COUNT)
    batch_tokens: int | None = flag(None, "tokens per batch, instead of examples", group="recipe", limits=COUNT)
    gradient_accumulation_steps: int = flag(1, "batches per step", group="recipe", limits=COUNT)
    learning_rate: float = flag(
        None,
        "peak learning rate, or auto: by the model's width",
        "lr",
        group="recipe",
        kind=auto_or_number,
        limits=POSITIVE,
    )
    head_learning_rate: float | None = flag(None, "of the head (default: the same)", group="recipe", limits=POSITIVE)
    weight_decay: float = flag(0.01, "AdamW's decay; none on biases and LayerNorm", group="recipe", limits=NOT_NEGATIVE)
    warmup_ratio: float = flag(0.1, "fraction of the steps that warm up", group="recipe", limits=FRACTION)
    schedule: str = flag(
        "linear",
        "learning rate schedule after the warm-up",
        "lr_scheduler_type",
        group="recipe",
        choices=("linear", "cosine", "constant"),
    )
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0: no clipping", group="recipe", limits=NOT_NEGATIVE)
    layer_lr_decay: float = flag(
        1.0, "factor of the learning rate from each layer to the one below", group="recipe", limits=POSITIVE
    )
    freeze: str = flag("none", "none, embeddings, N (embeddings and the first N layers) or all", group="recipe")
    class_weights: str = flag("none", "none, balanced, or JSON {label: weight}, itself or its file", group="recipe")
    label_smoothing: float = flag(0.0, "label smoothing", "label_smoothing_factor", group="recipe", limits=FRACTION)
    head_init: str = flag(
        "probe",
        "initialization of a new head: as a linear probe on the encoder's features, or random",
        group="recipe",
        choices=("probe", "random"),
    )
    temperature: bool = flag(True, "fit a temperature on validation, for calibrated probabilities", group="recipe")
    seed: int = flag(42, "seed of head, batches and dropout", group="recipe", limits=NOT_NEGATIVE)
    seeds: tuple[str, ...] = flag((), "train once with each of these seeds", group="recipe")
    search: str | None = flag(
        None,
        "try this many recipes (20), or as many as fit into a time (90s, 30m, 2h), and keep the best by validation",
        group="recipe",
    )
    length_buckets: bool = flag(
        False, "batch texts of similar length: hardly faster, and less accurate on some data", group="speed"
    )
    eval_steps: int | None = flag(
        None, "steps from one evaluation to the next (default: an epoch)", group="stopping", limits=COUNT
    )
    metric: str | None = flag(
        None,
        "validation metric that chooses the best weights (default macro_f1, micro_f1 or spearman)",
        "metric_for_best_model",
        group="stopping",
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this many evaluations without a better one", group="stopping", limits=COUNT
    )

    def mlp_size(self) -> int:
        """Hidden units of the head: 0 for `linear`, N for `mlp:N`."""
        if self.head in (None, "linear"):
            return 0
        kind, _, size = str(self.head).partition(":")
        if kind != "mlp" or not size.isdecimal() or not 0 < int(size) < 1 << 16:
            raise UserError(f"--head {self.head}: give linear, or mlp:N such as mlp:512")
        return int(size)

    def search_budget(self) -> tuple[int | None, float | None]:
        """--search as (trials, None) or (None, seconds); (None, None) without it."""
        if self.search is None:
            return None, None
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(s|m|h|)", self.search.strip(), re.ASCII)
        number = float(found[1]) if found else 0.0
        if not found or not number or (not found[2] and number % 1):
            raise UserError(f"--search {self.search}: give a number of trials, such as 20, or a time: 90s, 30m or 2h")
        return (None, number * SECONDS_OF[found[2]]) if found[2] else (int(number), None)


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """What computes. None of it changes what is learned, but for rounding."""

    device: str = flag("auto", "device to compute on", group="speed", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto", "precision of the encoder", group="speed", choices=("auto", "fp32", "tf32", "bf16", "fp16")
    )
    attention: str = flag("auto", "attention kernel", group="speed", choices=("auto", "sdpa", "flash", "triton"))
    engine: str = flag(
        "auto", "how a step is run (auto: eager)", group="speed", choices=("auto", "eager", "compile", "graph")
    )
    kernels: bool = flag(True, "with --engine graph: our Triton kernels (off: torch's own)", group="speed")
    onednn: bool = flag(
        True, "on a CPU: fp32 products by oneDNN where that is faster (same accuracy, other rounding)", group="speed"
    )
    cls_only: bool = flag(True, "compute the last layer for the [CLS] row only (exact)", group="speed")
    compact_vocabulary: bool = flag(True, "train only the embedding rows that occur (exact)", group="speed")
    cache_frozen: bool = flag(True, "compute frozen layers once for each text (exact)", group="speed")
    deterministic: bool = flag(False, "bitwise reproducible on a GPU too; slower there", group="speed")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where a run writes, and what it says."""

    output: str | None = flag(None, "folder to write (default runs/<time>)", "output_dir", group="other")
    overwrite: bool = flag(False, "write into a folder that has files", "overwrite_output_dir", group="other")
    check: bool = flag(False, "look at data, model and memory; train nothing", group="other")
    push_to_hub: str | None = flag(
        None,
        "upload model, card and metrics, but no texts, to this repository of the Hugging Face Hub",
        group="other",
    )
    save_steps: int | None = flag(None, "steps from one checkpoint to the next", group="stopping", limits=COUNT)
    resume: bool = flag(
        False, "continue the run in --output, with its flags", "resume_from_checkpoint", group="stopping"
    )
    keep_checkpoint: bool = flag(
        False, "keep the checkpoint of a finished run (twice the model's size)", group="stopping"
    )
    report_to: tuple[str, ...] = flag(
        (), "trackers: tensorboard, wandb, mlflow; several by commas", group="watching", choices=("none", *TRACKERS)
    )
    run_name: str | None = flag(None, "the run's name in the tracker", group="watching")
    quiet: bool = flag(False, "print nothing but errors", group="watching")


@dataclass(frozen=True, kw_only=True)
class RunConfig(OutputSettings, HardwareSettings, RecipeSettings, DataSettings):  # fields in reverse order
    """One fine-tuning run. Each field is a flag (`max_length` is `--max-length`) and a key of the TOML file."""

    def __post_init__(self) -> None:
        for name in (*PATHS, "output"):
            if (getattr(self, name) or "").startswith("~"):  # no shell has seen a --config file
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))  # it is frozen
        if self.metric:
            object.__setattr__(self, "metric", self.metric.removeprefix("eval_"))  # as Trainer spells it
        if "none" in self.report_to:
            object.__setattr__(self, "report_to", ())
        for known in dataclasses.fields(self):
            check_value(known, getattr(self, known.name))
        self.mlp_size()
        if self.freeze not in ("none", "embeddings", "all") and not self.freeze.isdecimal():
            raise UserError(f"--freeze {self.freeze}: give none, embeddings, a number of layers, or all")
        if self.validation_split + self.test_split >= 1:
            raise UserError("--validation-split and --test-split together leave no training rows; give less than 1")
        if self.delimiter not in (None, "tab", "\\t") and len(self.delimiter or "") != 1:
            raise UserError(f"--delimiter {self.delimiter!r}: give one character, or tab")
        if self.quote not in (None, "none") and len(self.quote or "") != 1:
            raise UserError(f"--quote {self.quote!r}: give one character, or none")
        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) == 1:
            raise UserError(f"--label-names {','.join(self.label_names)}: give two or more, all different")
        seeds = [int(seed) if seed.isdecimal() else -1 for seed in self.seeds]
        if len({*seeds}) < len(seeds) or not all(0 <= seed < 1 << 63 for seed in seeds):
            raise UserError(f"--seeds {','.join(self.seeds)}: give different integers, such as 1,2,3")
        self.search_budget()
        for name, why in (("seeds", "one seed chooses"), ("check", "it trains nothing")):
            if self.search is not None and getattr(self, name):
                raise UserError(f"--search with --{name}: {why}; leave one of the two out")
        if self.window_stride is not None and self.truncation != "window":
            raise UserError("--window-stride: has an effect only with --truncation window; add that or leave it out")

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def check_value(known: dataclasses.Field[Any], value: Any) -> None:
    """UserError for a value that is empty, none of the choices, or out of its limits."""
    name, choices, limits = flag_name(known.name), known.metadata["choices"], known.metadata["limits"]
    if value == "":
        raise UserError(f"{name}: is empty; give a value, or leave it out")
    for one in value if isinstance(value, tuple) else (value,):
        if choices and one not in choices:
            raise UserError(f"{name} {one}: give one of {', '.join(choices)}")
    if limits and value is not None and not limits[0] <= value <= limits[1]:
        raise UserError(f"{name} {value}: give {limits[2]}")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")
