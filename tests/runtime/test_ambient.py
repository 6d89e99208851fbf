"""What the caller has set in torch neither disturbs us nor changes, and a loaded classifier answers after a fork."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minibert

TEXTS = [f"a film was {'good' if i % 2 else 'bad'} {i}" for i in range(60)]
LABELS = ["good" if i % 2 else "bad" for i in range(60)]


def finetuned(model: Path, output: Path, **settings: Any) -> minibert.Classifier:
    given = {"epochs": 1, "output": output, "overwrite": True, "quiet": True, "device": "cpu", **settings}
    return minibert.finetune(TEXTS, LABELS, model=model, **given)


@pytest.fixture(scope="module")
def folder(film_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "film"
    finetuned(film_model, output, epochs=3, learning_rate=2e-3)
    return output


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        assert torch.get_default_device().type == "meta"
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": float64,
    "meta": meta,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("recipe", [{"head_init": "random"}, {"head": "mlp:8"}], ids=["random", "mlp"])
def test_training_is_the_same(film_model: Path, tmp_path: Path, state: str, recipe: dict[str, str]) -> None:
    plain = finetuned(film_model, tmp_path / "plain", **recipe).logits(TEXTS)
    with STATES[state]():
        trained = finetuned(film_model, tmp_path / "other", **recipe)
    assert np.array_equal(trained.logits(TEXTS), plain)
    assert not any(p.is_inference() for p in trained.model.parameters())


@pytest.mark.parametrize("state", STATES)
def test_predictions_are_the_same(folder: Path, state: str) -> None:
    known = minibert.load(folder)
    logits, vectors = known.logits(TEXTS), known.embed(TEXTS)
    with STATES[state]():
        loaded = minibert.load(folder)
        found = [(each.logits(TEXTS), each.embed(TEXTS)) for each in (known, loaded)]
    for of_logits, of_vectors in found:
        assert np.array_equal(of_logits, logits) and np.array_equal(of_vectors, vectors)
    assert not any(p.is_inference() for p in loaded.model.parameters())


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_outlasts_a_training(film_model: Path, tmp_path: Path, deterministic: bool) -> None:
    def state() -> tuple[Any, ...]:
        drawn = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
        cuda, mkldnn, cudnn = torch.backends.cuda, torch.backends.mkldnn, torch.backends.cudnn
        attention = cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()
        switches = cuda.matmul.allow_tf32, mkldnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        settings = torch.get_default_dtype(), torch.get_num_threads(), csv.field_size_limit(), dict(os.environ)
        return torch.get_rng_state().tolist(), drawn, random.getstate(), attention, switches, handlers, settings

    before = state()
    finetuned(film_model, tmp_path / "run", deterministic=deterministic).predict(TEXTS)
    assert state() == before


FORKED = """
import json, multiprocessing, os, sys, threading

import minibert
import minibert.inference.classifier  # torch and numpy, whose OpenBLAS has threads from the start and survives a fork

folder, when, how = sys.argv[1:]
texts = json.load(sys.stdin)
count = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
threads = count()
classifier = minibert.load(folder, "cpu")
assert count() == threads, f"loading has started {count() - threads} threads"
if when == "warm":
    classifier.predict(texts)

def answer(pipe):
    pipe.send([prediction.label for prediction in classifier.predict(texts)])

if how == "multiprocessing":
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=answer, args=(theirs,))
    child.start()
    labels = ours.recv()
    child.join()
else:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        labels = [prediction.label for prediction in classifier.predict(texts)]
        os.write(writer, json.dumps(labels).encode())
        os._exit(0)
    labels = json.loads(os.read(reader, 1 << 16))
    os.waitpid(pid, 0)
assert labels == [prediction.label for prediction in classifier.predict(texts)]
print(json.dumps(labels))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.parametrize("when", ["cold", "warm"])
@pytest.mark.parametrize("how", ["multiprocessing", "os"])
def test_a_forked_child_answers(folder: Path, when: str, how: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(folder), when, how]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    texts = TEXTS * 5
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [p.label for p in minibert.load(folder).predict(texts)]
