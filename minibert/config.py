"""What a run is: the settings, each of them a command-line flag.

Nothing here imports torch, so `--help` and argument errors answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from minibert.errors import UserError

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
PATHS = ("model", "tokenizer", "train", "validation", "test", "class_weights")  # flags that may name files
TRUNCATIONS = ("head", "tail", "head_tail", "window")
FLAG = re.compile(r"--(?P<name>[a-z][a-z-]*[a-z])(?P<rest>(?: (?P<value>[^\s:;,]+))?:?)")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
IN_MEMORY = re.compile(r"(train|validation|test) (list|table), ")  # where a message begins with the place
IN_MEMORY_ROW = {"list": "text ", "table": "row "}
SECONDS_OF = {"s": 1, "m": 60, "h": 3600}  # the units of --search


def auto_or_number(value: Any) -> float | None:
    """None stands for auto until the model and the rows are known."""
    return None if value == "auto" else float(value)


def flag(default: Any, help: str, *aliases: str, group: str, choices: tuple[str, ...] = (), kind: Any = None) -> Any:
    """A field of `RunConfig` and, from the same line, a command-line flag with its help and its other names."""
    metadata = {"help": help, "aliases": aliases, "group": group, "choices": choices, "kind": kind or type(default)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run. Each field is a flag (`max_length` is `--max-length`) and a key of the TOML file."""

    # model
    model: str | None = flag(
        None, "model folder or hub id (default: the demo's MiniLM)", "model_name_or_path", group="model", kind=str
    )
    tokenizer: str | None = flag(
        None, "folder or hub id of the tokenizer, if not the model's", "tokenizer_name", group="model", kind=str
    )
    head: str | None = flag(
        None,
        "linear, or mlp:N for a hidden layer of N units with ReLU (default linear, or what the model has)",
        group="model",
        kind=str,
    )
    head_dropout: float | None = flag(
        None, "dropout before the classifier (default the model's)", group="model", kind=float
    )
    dropout: float | None = flag(
        None, "dropout in the encoder, attention included (default the model's)", group="model", kind=float
    )

    # data
    train: str | None = flag(None, "training file", "train_file", group="data", kind=str)
    validation: str | None = flag(None, "validation file", "validation_file", group="data", kind=str)
    test: str | None = flag(None, "test file", "test_file", group="data", kind=str)
    text_column: tuple[str, ...] = flag(
        (), "column(s) of the text, joined by a space; repeat or separate by commas", "text_column_names", group="data"
    )
    text_pair_column: str | None = flag(None, "column of the second text of a pair", group="data", kind=str)
    label_column: tuple[str, ...] = flag(
        (), "column of the label; several 0/1 columns for multi-label", "label_column_name", group="data"
    )
    label_delimiter: str | None = flag(
        None, "what separates the labels of one row, such as , (multi-label)", group="data", kind=str
    )
    label_names: tuple[str, ...] = flag((), "names of the labels 0, 1, 2, ..., in their order", group="data")
    no_header: bool = flag(False, "the first row is data; columns are then called 0, 1, 2, ...", group="data")
    encoding: str | None = flag(
        None, "encoding of the files (default UTF-8, or what they look like)", group="data", kind=str
    )
    on_bad_rows: str = flag(
        "error",
        "rows without text or label, or with the wrong number of cells",
        group="data",
        choices=("error", "skip"),
    )
    validation_split: float = flag(0.15, "share of the training file for validation, where no file is", group="data")
    test_split: float = flag(0.0, "share of the training file for test, where no file is", group="data")
    split_seed: int = flag(42, "seed of the split", group="data")
    problem_type: str = flag(
        "auto", "what the labels are; auto: fractions are a regression", group="data", choices=("auto", *PROBLEM_TYPES)
    )
    max_train_samples: int | None = flag(
        None,
        "use only so many rows of the training file, stratified, before others are split off",
        group="data",
        kind=int,
    )

    # tokens
    max_length: int | None = flag(
        None, "longest text in tokens (default 512 or the model's limit)", "max_seq_length", group="tokens", kind=int
    )
    truncation: str = flag("head", "which part of a longer text is kept", group="tokens", choices=TRUNCATIONS)

    window_stride: int | None = flag(
        None,
        "tokens from one window's start to the next's (default half of --max-length)",
        group="tokens",
        kind=int,
    )

    # recipe
    epochs: float = flag(
        None,
        "passes over the training rows, or auto: by their number",
        "num_train_epochs",
        group="recipe",
        kind=auto_or_number,
    )
    max_steps: int | None = flag(None, "train for so many steps, whatever --epochs", group="recipe", kind=int)
    batch_size: int = flag(32, "examples a batch", "per_device_train_batch_size", group="recipe")
    batch_tokens: int | None = flag(None, "tokens a batch, instead of examples", group="recipe", kind=int)
    gradient_accumulation_steps: int = flag(1, "batches a step", group="recipe")
    learning_rate: float = flag(
        None, "peak learning rate, or auto: by the model's width", "lr", group="recipe", kind=auto_or_number
    )
    head_learning_rate: float | None = flag(None, "of the head (default: the same)", group="recipe", kind=float)
    weight_decay: float = flag(0.01, "AdamW's decay; none on biases and LayerNorm", group="recipe")
    warmup_ratio: float = flag(0.1, "share of the steps that warm up", group="recipe")
    schedule: str = flag(
        "linear",
        "learning rate after the warm-up",
        "lr_scheduler_type",
        group="recipe",
        choices=("linear", "cosine", "constant"),
    )
    max_grad_norm: float = flag(1.0, "clip gradients to this norm; 0 does not", group="recipe")
    layer_lr_decay: float = flag(1.0, "each layer below learns slower by this factor", group="recipe")
    freeze: str = flag("none", "none, embeddings, N (embeddings and the first N layers) or all", group="recipe")
    class_weights: str = flag("none", "none, balanced, or JSON {label: weight}, itself or its file", group="recipe")
    label_smoothing: float = flag(0.0, "label smoothing", "label_smoothing_factor", group="recipe")
    head_init: str = flag(
        "probe",
        "how a new head starts: as the best linear one on the encoder's features, or at random",
        group="recipe",
        choices=("probe", "random"),
    )
    temperature: bool = flag(True, "fit a temperature on validation, for honest probabilities", group="recipe")
    seed: int = flag(42, "seed of head, batches and dropout", group="recipe")
    seeds: tuple[str, ...] = flag((), "train once with each of these seeds", group="recipe")
    search: str | None = flag(
        None,
        "try so many recipes (20), or as many as fit into a time (90s, 30m, 2h), and keep the best by validation",
        group="recipe",
        kind=str,
    )

    # speed
    device: str = flag("auto", "where to compute", group="speed", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto", "arithmetic of the encoder", group="speed", choices=("auto", "fp32", "tf32", "bf16", "fp16")
    )
    attention: str = flag("auto", "attention kernel", group="speed", choices=("auto", "sdpa", "flash", "triton"))
    engine: str = flag(
        "auto", "how a step runs (auto: eager)", group="speed", choices=("auto", "eager", "compile", "graph")
    )
    kernels: bool = flag(True, "with --engine graph: our Triton kernels (off: torch's own)", group="speed")
    onednn: bool = flag(
        True, "on a CPU: fp32 products by oneDNN where that is faster (same accuracy, other rounding)", group="speed"
    )
    length_buckets: bool = flag(
        False, "batches of texts of similar length: hardly faster, and less accurate on some data", group="speed"
    )
    cls_only: bool = flag(True, "compute the last layer for the [CLS] row only (exact)", group="speed")
    compact_vocabulary: bool = flag(True, "train only the embedding rows that occur (exact)", group="speed")
    cache_frozen: bool = flag(True, "compute frozen layers once for each text (exact)", group="speed")
    deterministic: bool = flag(False, "equal bits from run to run on a GPU too; slower there", group="speed")

    # stopping
    eval_steps: int | None = flag(
        None, "evaluate every so many steps (default: each epoch)", group="stopping", kind=int
    )
    metric: str | None = flag(
        None,
        "validation metric that chooses the best weights (default macro_f1, micro_f1 or spearman)",
        "metric_for_best_model",
        group="stopping",
        kind=str,
    )
    early_stopping_patience: int | None = flag(
        None, "stop after so many evaluations without a better one", group="stopping", kind=int
    )
    save_steps: int | None = flag(None, "checkpoint every so many steps", group="stopping", kind=int)
    resume: bool = flag(
        False, "continue the run in --output, with its flags", "resume_from_checkpoint", group="stopping"
    )
    keep_checkpoint: bool = flag(
        False, "keep the checkpoint of a finished run (twice the model's size)", group="stopping"
    )

    # watching
    report_to: str = flag("none", "tracker", group="watching", choices=("none", "tensorboard", "wandb", "mlflow"))
    run_name: str | None = flag(None, "the run's name in the tracker", group="watching", kind=str)
    quiet: bool = flag(False, "print nothing but errors", group="watching")

    # other
    output: str | None = flag(None, "folder to write (default runs/<time>)", "output_dir", group="other", kind=str)
    overwrite: bool = flag(False, "write into a folder that has files", "overwrite_output_dir", group="other")
    push_to_hub: str | None = flag(
        None,
        "upload model, card and metrics, but no texts, to this repository of the Hugging Face Hub",
        group="other",
        kind=str,
    )
    check: bool = flag(False, "look at data, model and memory; train nothing", group="other")

    def __post_init__(self) -> None:
        for name in (*PATHS, "output"):
            if (getattr(self, name) or "").startswith("~"):  # no shell has seen a --config file
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))  # it is frozen
        if self.metric:
            object.__setattr__(self, "metric", self.metric.removeprefix("eval_"))  # as Trainer spells it
        self._check_choices()
        self._check_ranges()
        self.mlp_size()
        if self.freeze not in ("none", "embeddings", "all") and not self.freeze.isdecimal():
            raise UserError(f"--freeze {self.freeze}: give none, embeddings, a number of layers, or all")
        if self.validation_split + self.test_split >= 1:
            raise UserError("--validation-split and --test-split together leave no training rows; give less than 1")
        seeds = [int(seed) if seed.isdecimal() else -1 for seed in self.seeds]
        if len({*seeds}) < len(seeds) or not all(0 <= seed < 1 << 63 for seed in seeds):
            raise UserError(f"--seeds {','.join(self.seeds)}: give different whole numbers, such as 1,2,3")

        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) == 1:
            raise UserError(f"--label-names {','.join(self.label_names)}: give two or more, all different")
        self.search_budget()
        for name, why in (("seeds", "one seed chooses"), ("check", "it trains nothing")):
            if self.search is not None and getattr(self, name):
                raise UserError(f"--search with --{name}: {why}; leave one of the two out")
        if self.window_stride is not None and self.truncation != "window":
            raise UserError("--window-stride: has an effect only with --truncation window; add that or leave it out")

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if getattr(self, f.name) == "":
                raise UserError(f"{flag_name(f.name)}: is empty; give a value, or leave it out")
            if choices and getattr(self, f.name) not in choices:
                raise UserError(f"{flag_name(f.name)} {getattr(self, f.name)}: give one of {', '.join(choices)}")

    def _check_ranges(self) -> None:
        at_least_one = ["max_train_samples", "max_length", "window_stride", "max_steps", "batch_size", "batch_tokens"]
        at_least_one += ["gradient_accumulation_steps", "eval_steps", "early_stopping_patience", "save_steps"]
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and not 1 <= value < 1 << 31:
                raise UserError(f"{flag_name(name)} {value}: give an integer of at least 1, below 2**31")
        shares = ("dropout", "head_dropout", "validation_split", "test_split", "warmup_ratio", "label_smoothing")
        for name in shares:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{flag_name(name)} {value}: give a number from 0 up to, not including, 1")
        for name in ("epochs", "learning_rate", "head_learning_rate", "layer_lr_decay"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{flag_name(name)} {value}: give a positive number")
        for name in ("weight_decay", "max_grad_norm", "seed", "split_seed"):
            value = getattr(self, name)
            if not 0 <= value < 1 << 63:
                raise UserError(f"{flag_name(name)} {value}: give a number of at least 0")

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

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def messages_in_python() -> Iterator[None]:
    """Messages of the command line as a caller of `minibert.finetune` reads them."""
    try:
        yield
    except UserError as error:
        raise UserError(in_python(str(error))) from None


def in_python(message: str) -> str:
    """overwrite=True for --overwrite, max_length=5 for --max-length 5, and rows instead of lines."""
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}

    def named(found: re.Match[str]) -> str:
        name, value, rest = found["name"].replace("-", "_"), found["value"] or "", found["rest"]
        field = fields.get(name) or fields.get(name.removeprefix("no_"))
        if field is None:
            return found[0]
        if field.metadata["kind"] is bool:
            return f"{field.name}={name in fields}{rest}"
        is_number = NUMBER.fullmatch(value) is not None
        if not value or not (is_number or rest.endswith(":") or value in field.metadata["choices"]):
            return f"{name}{rest}"
        return f"{name}={value if is_number else repr(value)}" + ":" * rest.endswith(":")

    message = FLAG.sub(named, message)
    in_memory = IN_MEMORY.match(message)
    return re.sub(r"\bline (?=\d)", IN_MEMORY_ROW[in_memory[2]], message) if in_memory else message
