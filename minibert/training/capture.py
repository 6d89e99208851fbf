"""Recording work on the device as a CUDA graph, so that nothing comes of it but the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace

import torch

from minibert.errors import UserError

WARM_UP = 2  # runs before a capture, in which kernels compile and cuBLAS takes its workspace


def capture(
    work: Callable[[], None], warm_up: Callable[[], None], stream: torch.cuda.Stream, other: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph:
    """Run `warm_up` a few times and record `work`, both on `stream`; `other` is a graph whose memory this one shares.

    The generator behind torch's dropout is left as it was, so that a step that captures its graph draws the same masks
    as one that finds it there. UserError where the capture breaks off: torch 2.11 then counts it as going on for ever,
    and its allocator and generator fail later, at some other call.
    """
    generator_state = torch.cuda.get_rng_state(stream.device)
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream), _in_one_thread(), _memory_of(other):
        for _ in range(WARM_UP):
            warm_up()
    before.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), None if other is None else other.pool()
    try:
        with _in_one_thread(), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            work()
    except Exception as error:  # whatever torch, Triton or the driver may throw
        torch.cuda.set_stream(before)
        first = error.__context__ or error  # ending a capture that is broken fails again
        reason = str(first).strip().partition("\n")[0] or type(first).__name__
        raise UserError(f"--engine graph: a step could not be recorded ({reason}); use --engine eager") from error
    torch.cuda.set_rng_state(generator_state, stream.device)
    return graph


def _memory_of(other: torch.cuda.CUDAGraph | None) -> AbstractContextManager[None]:
    """Allocate where `other` does, whose activations nobody reads between two replays.

    Beside them, a warm-up would take as much memory again. Without another graph there is nothing to be shared, and
    what the warm-up leaves is given back before the capture.
    """
    if other is None:
        return nullcontext()
    return torch.cuda.use_mem_pool(SimpleNamespace(id=other.pool()))  # type: ignore[arg-type]  # only its id is read


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Backward passes in the thread that asks for them: `use_mem_pool` and cuBLAS's workspaces are a thread's own."""
    with torch.autograd.grad_mode.set_multithreading_enabled(False):
        yield
