"""Captures of CUDA graphs, and the engine that replays them, without a GPU: a replay is the work, done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curves import CPU, made_tokens
from test_graph_step import assert_equal_bits, references, state, steps_of, training_of  # noqa: F401 (a fixture)

from minibert.batching.dataset import collate
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.problem.problem import MULTI, REGRESSION, Problem
from minibert.runtime.device import Hardware
from minibert.training import capture
from minibert.training import graph_step as engine
from minibert.training.graph_step import FixedSteps


class PlayedStream:
    """Work in it is done at once."""

    device = CPU

    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class PlayedGraph:
    """A replay is the recorded work, done again."""

    def __init__(self, work: Callable[[], None] = lambda: None) -> None:
        self.replay = work

    def pool(self) -> tuple[int, int]:
        return (0, 7)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.cuda without a GPU: what is asked of it, in order; its generator is torch's own."""
    noted: list[Any] = []
    current = PlayedStream()

    @contextmanager
    def noting(name: str, *arguments: object) -> Iterator[None]:
        noted.append((name, *arguments))
        yield
        noted.append(f"end of {name}")

    def graph(graph: object, pool: object, stream: object, capture_error_mode: str) -> Any:
        return noting("capture", pool)

    played = {
        "Stream": PlayedStream,
        "Event": lambda: type("Event", (), {"record": lambda self: None})(),
        "CUDAGraph": PlayedGraph,
        "graph": graph,
        "use_mem_pool": lambda pool: noting("pool", pool.id),
        "stream": lambda stream: noting("stream"),
        "current_stream": lambda *_: current,
        "set_stream": lambda stream: noted.append(("set_stream", stream is current)),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return noted


def noting_threads(calls: list[Any], name: str) -> None:
    calls.append((name, "threads" if torch._C._is_multithreading_enabled() else "one thread"))


def test_a_later_graph_warms_up_in_the_memory_of_the_others(calls: list[Any]) -> None:
    work, warm_up = (partial(noting_threads, calls, name) for name in ("work", "warm-up"))
    capture.capture(work, warm_up, PlayedStream(), None)
    warmed, recorded = [("warm-up", "one thread")] * capture.WARM_UP, [("work", "one thread"), "end of capture"]
    assert calls == [("stream",), *warmed, "end of stream", ("capture", None), *recorded]
    calls.clear()
    capture.capture(work, warm_up, PlayedStream(), PlayedGraph())
    pooled = [("pool", (0, 7)), *warmed, "end of pool"]
    assert calls == [("stream",), *pooled, "end of stream", ("capture", (0, 7)), *recorded]
    assert torch._C._is_multithreading_enabled()


def test_a_step_that_captures_draws_the_masks_of_one_that_replays(calls: list[Any]) -> None:
    drawn = []
    torch.manual_seed(5)
    torch.rand(3)  # of the batches before
    expected = torch.get_rng_state()
    capture.capture(lambda: None, lambda: drawn.append(torch.rand(3)), PlayedStream(), None)
    assert len(drawn) == capture.WARM_UP
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_capture_that_breaks_off_ends_with_one_line(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")

    def work() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Broken())
    with pytest.raises(UserError, match=r"recorded \(operation not permitted when .*\); use --engine eager$") as error:
        capture.capture(work, lambda: None, PlayedStream(), None)
    assert "\n" not in str(error.value)
    assert calls[-1] == ("set_stream", True)


# -- the engine, its graphs played ------------------------------------------------------------------------------------


def played_capture(work: Any, warm_up: Any, stream: Any, other: Any) -> PlayedGraph:
    for _ in range(capture.WARM_UP):
        warm_up()
    return PlayedGraph(work)


@pytest.fixture
def played(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "capture", played_capture)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_replays_train_with_the_bits_of_the_recorded_work(
    tiny: Callable[..., Path], played: None, precision: str, accumulation: int
) -> None:
    """Captures amid training, with an update due and with gradients of the step's first batch, change nothing."""
    folder, found = tiny("BertModel"), []
    for name in ("fixed", "graph"):
        hardware = Hardware(CPU, precision, "sdpa", name)
        training = training_of(folder, hardware, gradient_accumulation_steps=accumulation)
        for step in steps_of(training):
            training.step(step)
        found.append(state(training))
    static_batches = training.body.fixed.static_batches
    first_and_last = {key[1:] for key in static_batches}
    assert first_and_last >= ({(True, True)} if accumulation == 1 else {(True, False), (False, True)})
    assert len(static_batches) > 2 and all(static.graph is not None for static in static_batches.values())
    assert_equal_bits(*found)


@pytest.mark.parametrize("kind", [REGRESSION, MULTI])
def test_gradients_that_overflow_at_the_first_loss_scale_are_no_fault(
    tiny: Callable[..., Path], played: None, kind: str
) -> None:
    model, _ = load_model(tiny("BertModel"), BertForSequenceClassification, num_labels=1, dropout=0.1)
    hardware = Hardware(CPU, "fp16", "sdpa", "graph")
    steps = FixedSteps(model, Problem(kind, ["a"]), RunConfig(), hardware, 10, None)
    targets = torch.full((8,), 30.0) if kind == REGRESSION else torch.ones(8, 1)
    x = collate(made_tokens(8), np.arange(8))
    assert steps.self_check(x, targets) is None
    steps.step([(x, targets)], 0, 1.0)
    assert steps.optimizer.skipped == 1  # as in training, which lowers the scale


def test_a_graph_that_computes_something_else_is_found(tiny: Callable[..., Path], calls: list[Any]) -> None:
    """In fp16 too, where gradients that overflow are all alike."""

    def wrong(work: Any, warm_up: Any, stream: Any, other: Any) -> PlayedGraph:
        place = work.args[0]

        def replay() -> None:
            work()
            place.norm = place.norm * 1.5

        return PlayedGraph(replay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "capture", wrong)
        with pytest.raises(UserError, match="its graph gives another loss than the steps it recorded"):
            training_of(tiny("BertModel"), Hardware(CPU, "fp16", "sdpa", "graph"))


def test_a_capture_that_breaks_off_ends_the_run_whoever_chose_the_engine(
    tiny: Callable[..., Path], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise UserError("--engine graph: a step could not be recorded (no such driver); use --engine eager")

    monkeypatch.setattr(engine, "capture", broken)
    with pytest.raises(UserError, match="could not be recorded"):
        training_of(tiny("BertModel"), Hardware(CPU, "fp32", "sdpa", "graph"), engine="auto")


def test_the_backward_pass_waits_for_every_part_of_the_update(tiny: Callable[..., Path], played: None) -> None:
    training = training_of(tiny("BertModel"), Hardware(CPU, "fp32", "sdpa", "graph"))
    first, second, *_ = steps_of(training)
    training.step(first)
    current, update = torch.cuda.current_stream(), training.body.fixed.update
    for step in (second, second):  # that captures, that replays
        current.waited.clear()
        training.step(step)
        assert current.waited[-len(update.events) :] == update.events
