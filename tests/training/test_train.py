"""The training loop: every saving of work gives what the plain way gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from minibert.batching.dataset import Dataset
from minibert.batching.tokens import Tokens, offsets_of
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.inference.logits import compute_logits
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import SINGLE, Problem
from minibert.runtime.device import Hardware
from minibert.training import frozen
from minibert.training.compact_vocabulary import CompactVocabulary
from minibert.training.loop import Training
from minibert.training.optimizer import freeze
from minibert.training.resume import load_checkpoint, save_checkpoint

CPU = Hardware(torch.device("cpu"), "fp32", "sdpa", "eager")
BASE = RunConfig(epochs=2, batch_size=8, learning_rate=1e-3, seed=3, quiet=True)


def texts(count: int, seed: int, vocabulary: int = 90) -> Dataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, count)
    labels = rng.integers(0, 2, count)
    offsets = offsets_of(lengths)
    ids = rng.integers(5, vocabulary, offsets[-1]).astype(np.int32)
    ids[offsets[:-1] + 1] = 5 + labels  # the second token tells the label
    return Dataset(Tokens(ids, offsets, None, np.zeros(count, np.int32)), labels)


def job(folder: Path, config: RunConfig, count: int = 50, **options: Any) -> Training:
    model, report = load_model(
        folder, BertForSequenceClassification, num_labels=2, seed=config.seed, dropout=config.dropout
    )
    freeze(model, config.freeze, report.new)
    data = {"train": texts(count, 0), "validation": texts(30, 1)}
    return Training(model, Problem(SINGLE, ["a", "b"]), data, config, CPU, **options)


def weights(training: Training) -> dict[str, torch.Tensor]:
    """The parameters, less the key biases: softmax cancels them, so their gradient is rounding that Adam blows up."""
    found = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for name in found:
        if name.endswith("qkv.bias"):
            query, _, value = found[name].chunk(3)
            found[name] = torch.cat([query, value])
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def train(training: Training, tmp_path: Path) -> Training:
    training.run(tmp_path / "train_log.jsonl", lambda: None)
    return training


def log_lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_learns_and_keeps_the_best_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, epochs=30, metric="accuracy")
    training = train(job(tiny(), config, count=200), tmp_path)
    lines = log_lines(tmp_path)
    accuracies = {line["step"]: line["validation_accuracy"] for line in lines if "validation_accuracy" in line}
    assert training.state.best_value == max(accuracies.values()) > 0.9
    assert training.state.best_step == min(s for s, value in accuracies.items() if value == training.state.best_value)
    data = training.data["validation"]
    accuracy = (compute_logits(training.model, data, CPU).argmax(1) == data.targets).mean()
    assert accuracy == training.state.best_value
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(lines[0])


def test_training_is_that_of_a_plain_loop_around_transformers(tiny: Callable[..., Path]) -> None:
    """Padding, loss, clipping, AdamW with its groups and the schedule, together and step after step; no dropout."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    folder = tiny("BertForSequenceClassification", **none)
    training = job(folder, dataclasses.replace(BASE, weight_decay=0.1, max_grad_norm=0.5))
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).train()
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    warm_up = int(np.ceil(0.1 * training.total_steps))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warm_up, training.total_steps)
    train = training.data["train"]
    for step in training.remaining_steps():
        ours = training.step(step)
        rows = [torch.from_numpy(train.tokens.ids[a:b].astype(np.int64)) for a, b in spans(train, step.batches[0])]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = torch.from_numpy(train.targets[step.batches[0]])
        loss = theirs(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        loss = loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert float(ours[0]) == pytest.approx(float(loss), abs=1e-4)
        assert float(ours[1]) == pytest.approx(float(norm), rel=1e-3)
    assert training.state.step == training.total_steps == 14


def spans(data: Dataset, rows: np.ndarray) -> list[tuple[int, int]]:
    return [(int(data.tokens.offsets[row]), int(data.tokens.offsets[row + 1])) for row in rows]


@pytest.mark.parametrize("buckets", [True, False])
def test_padding_is_that_of_the_groups_of_attention(tiny: Callable[..., Path], buckets: bool) -> None:
    training = job(tiny(), dataclasses.replace(BASE, length_buckets=buckets))
    train = training.data["train"]
    packings = [train.batch(rows).packing for step in training.steps_of_epoch(0) for rows in step.batches]
    slots = sum(chunk.num_texts * chunk.longest for packing in packings for chunk in packing.chunks)
    assert training.padding_fractions() == (pytest.approx(1 - train.lengths.sum() / slots), 0)
    training.body.hardware = dataclasses.replace(CPU, attention="flash")
    assert training.padding_fractions() == (0, 0)


def test_accumulation_equals_one_large_batch(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Also with class weights and a last step that holds fewer examples."""
    folder = tiny()
    class_weights = np.array([0.5, 3.0], dtype=np.float32)
    large = dataclasses.replace(BASE, dropout=0.0, batch_size=16)
    small = dataclasses.replace(large, batch_size=4, gradient_accumulation_steps=4)
    a = train(job(folder, large, class_weights=class_weights), tmp_path)
    b = train(job(folder, small, class_weights=class_weights), tmp_path)
    assert a.state.step == b.state.step == 8
    assert largest_difference(weights(a), weights(b)) < 2e-5


def test_batches_of_classes_without_weight_are_no_bad_steps(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, batch_size=1, epochs=1)
    training = train(job(tiny(), config, class_weights=np.array([0.0, 1.0], dtype=np.float32)), tmp_path)
    assert training.state.skipped == 0 and training.state.step == training.total_steps > 20


def test_equal_seeds_give_equal_bits_and_others_do_not(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny()
    runs = [train(job(folder, dataclasses.replace(BASE, seed=seed)), tmp_path) for seed in (1, 1, 2)]
    assert largest_difference(weights(runs[0]), weights(runs[1])) == 0
    assert largest_difference(weights(runs[0]), weights(runs[2])) > 0


def test_compact_vocabulary_equals_training_every_row(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny()
    config = dataclasses.replace(BASE, epochs=8, weight_decay=0.3, learning_rate=1e-3)
    dense = train(job(folder, config), tmp_path)
    compact = job(folder, config)
    vocabulary = CompactVocabulary(compact.model, [data.tokens for data in compact.data.values()])
    assert len(compact.model.encoder.embeddings.word_embeddings.weight) < 90
    compact = train(Training(compact.model, compact.problem, compact.data, config, CPU), tmp_path)
    vocabulary.expand()
    rows = dense.model.encoder.embeddings.word_embeddings.weight
    start = load_model(folder, BertForSequenceClassification, num_labels=2)[0].encoder.embeddings.word_embeddings.weight
    assert float((rows - start).detach()[100:].abs().max()) > 1e-4  # rows that no text holds have decayed
    difference = (rows - compact.model.encoder.embeddings.word_embeddings.weight).detach()
    assert float(difference[90:].abs().max()) < 1e-6
    assert largest_difference(weights(dense), weights(compact)) < 1e-5


@pytest.mark.parametrize("choice", ["1", "2", "all"])
def test_frozen_layers_computed_once_equal_computing_them_each_time(
    tiny: Callable[..., Path], tmp_path: Path, choice: str
) -> None:
    folder = tiny()
    config = dataclasses.replace(BASE, freeze=choice)
    plain, cached = job(folder, config), job(folder, config)
    layers = plain.model.encoder.frozen_layers
    for data in cached.data.values():
        data.frozen = frozen.compute(cached.model, data.tokens, layers, CPU, True)
    train(plain, tmp_path)
    train(cached, tmp_path)
    assert largest_difference(weights(plain), weights(cached)) < 2e-5
    logits = [compute_logits(t.model, t.data["validation"], CPU) for t in (plain, cached)]
    assert np.abs(logits[0] - logits[1]).max() < 2e-5


def test_frozen_activations_too_large_for_memory_go_to_a_file(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = job(tiny(), dataclasses.replace(BASE, freeze="1"))
    tokens = training.data["train"].tokens
    in_memory = frozen.compute(training.model, tokens, 1, CPU, True)
    monkeypatch.setattr(frozen, "MEMORY_FRACTION", 0)
    in_file = frozen.compute(training.model, tokens, 1, CPU, True)
    assert in_memory is not None and in_file is not None and isinstance(in_file.values, np.memmap)
    assert np.array_equal(in_memory.values, in_file.values)
    monkeypatch.setattr(frozen, "DISK_FRACTION", 0)
    assert frozen.compute(training.model, tokens, 1, CPU, True) is None


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop", [1, 9, 13])
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(
    tiny: Callable[..., Path], tmp_path: Path, stop: int, accumulate: int
) -> None:
    folder = tiny()
    config = dataclasses.replace(BASE, epochs=6, gradient_accumulation_steps=accumulate, eval_steps=4)
    if stop == 13:  # with many steps a line of the log is the mean of several, which a checkpoint may cut in two
        config = dataclasses.replace(config, epochs=40 * accumulate)
    whole = job(folder, config)
    whole.run(tmp_path / "whole.jsonl", lambda: None)

    class Stop(Exception):
        pass

    first = job(folder, dataclasses.replace(config, save_steps=1))

    def save_and_stop() -> None:
        if first.state.step == stop:
            save_checkpoint(tmp_path / "last", first, {"version": 1})
        if first.state.step == stop + 1:  # lost: after the checkpoint
            raise Stop

    with pytest.raises(Stop):
        first.run(tmp_path / "resumed.jsonl", save_and_stop)
    second = job(folder, config)
    load_checkpoint(tmp_path / "last", second, {"version": 1})
    assert second.state.step == stop
    second.run(tmp_path / "resumed.jsonl", lambda: None)
    assert largest_difference(weights(whole), weights(second)) == 0

    def without_speed(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]

    assert without_speed("whole.jsonl") == without_speed("resumed.jsonl")
    finished = weights(second)
    save_checkpoint(tmp_path / "done", second, {"version": 1})
    load_checkpoint(tmp_path / "done", second, {"version": 1})
    second.run(tmp_path / "resumed.jsonl", lambda: None)  # nothing is left to do
    assert largest_difference(finished, weights(second)) == 0
    with pytest.raises(UserError, match=r"changed: version \(was 1, is 2\). Undo that, or start anew without --resume"):
        load_checkpoint(tmp_path / "last", second, {"version": 2})


def test_early_stopping(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, epochs=50, learning_rate=1e-7, metric="accuracy", early_stopping_patience=2)
    told: list[str] = []
    training = train(job(tiny(), config, say=told.append), tmp_path)
    assert training.state.step == 3 * training.steps_per_epoch
    stopped = (
        f"stopped at step {training.state.step} of {training.total_steps}: 2 evaluations without a better accuracy"
    )
    assert stopped in told


def test_max_steps_and_part_of_an_epoch(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny()
    assert train(job(folder, dataclasses.replace(BASE, max_steps=5)), tmp_path).state.step == 5
    assert train(job(folder, dataclasses.replace(BASE, epochs=0.5)), tmp_path).state.step == 4
    more = train(job(folder, dataclasses.replace(BASE, epochs=0.5, max_steps=11)), tmp_path)
    assert more.state.step == 11 > more.steps_per_epoch


def test_an_unknown_metric_is_refused_before_training(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"--metric bleu: not a metric .* accuracy"):
        job(tiny(), dataclasses.replace(BASE, metric="bleu"))


def test_evaluation_does_not_depend_on_company(tiny: Callable[..., Path]) -> None:
    training = job(tiny(), BASE)
    data = training.data["validation"]
    together = compute_logits(training.model, data, CPU)
    for i in (0, 7, 29):
        start, stop = data.tokens.offsets[i : i + 2]
        alone = Tokens(data.tokens.ids[start:stop], np.array([0, stop - start]), None, np.zeros(1, np.int32))
        assert np.abs(compute_logits(training.model, Dataset(alone, data.targets[:1]), CPU) - together[i]).max() < 1e-5
