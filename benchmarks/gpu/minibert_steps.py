"""minibert's own loop, `Training.run`, timed between the lines of its log: nothing is left out of it.

Building batches, the log, and the reading of flags every 50 steps all count. A window is what lies between two lines,
each of which has waited for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime.device import choose, fit_attention
from minibert.training.compact_vocabulary import CompactVocabulary
from minibert.training.loop import Training

from .clock import Windows, peak_gigabytes
from .workloads import Encoded, Setting, Workload, bert_config, encode, random_model, tflops

LOG_LINES = 100  # that `Training.run` writes


class Enough(Exception):
    """As many windows as needed were measured."""


def run_config(workload: Workload, **flags: Any) -> RunConfig:
    """The settings of a run that writes a line of its log after every window."""
    return RunConfig(
        **{
            "batch_size": workload.texts,
            "batch_tokens": workload.batch_tokens,
            "length_buckets": workload.buckets,
            "max_steps": LOG_LINES * workload.steps,
            "quiet": True,
            **flags,
        }
    )


def prepare(setting: Setting, size: str, workload: Workload, encoded: Encoded, flags: dict[str, Any]) -> Training:
    """A `Training` as the command makes it, on random weights."""
    config, sizes = run_config(workload, **flags), bert_config(setting, size)
    longest = int(encoded.tokens.lengths.max())
    head_size = sizes.hidden_size // sizes.num_attention_heads
    hardware = fit_attention(choose(config), config, head_size, longest, longest)
    model = random_model(setting, size)
    model.cls_only = config.cls_only
    tokens = replace(encoded.tokens)
    if config.compact_vocabulary:  # a few batches hold fewer words than a data set, which would flatter us
        CompactVocabulary(model, [tokens, one_text(encoded.occurring)])
    data = {"train": Dataset(tokens, encoded.labels)}
    return Training(model, Problem(SINGLE, ["0", "1"]), data, config, hardware)


def one_text(ids: np.ndarray) -> Tokens:
    return Tokens(ids.copy(), np.array([0, len(ids)]), None, np.zeros(1, np.int32))


def run_in_windows(
    setting: Setting, training: Training, windows: Windows, at_end: Callable[[int], object] = lambda number: None
) -> None:
    """`Training.run` until there are windows enough; `at_end` is given the number of windows so far."""

    def watch(line: dict[str, Any]) -> None:
        enough = windows.end(line["step"], training.state.tokens, line["loss"])
        at_end(len(windows.ends))
        if enough:
            raise Enough

    with suppress(Enough):
        training.run(setting.scratch / "log.jsonl", lambda: None, watch)


def train(setting: Setting, size: str, workload: Workload, **flags: Any) -> dict[str, Any]:
    """Figures of minibert's training; flags are those of the command."""
    workload = workload.tiny() if setting.smoke else workload
    encoded, windows = encode(setting, workload), Windows(setting.smoke)
    training = prepare(setting, size, workload, encoded, flags)
    run_in_windows(setting, training, windows)
    figures = windows.figures()
    return {
        **figures,
        "tflops": tflops(setting, size, encoded, figures["tokens_per_second"]),
        **peak_gigabytes(),
        # Where a batch does not fit into memory it is split in silence, so say what was measured.
        "micro_batch_tokens": training.state.most_tokens or "whole batches",
        "hardware": str(training.hardware),
        "engine_report": training.body.report(),
        "texts": setting.corpus().name,
    }
