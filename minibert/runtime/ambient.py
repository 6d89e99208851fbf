"""torch's settings of the process that calls us: put aside while we compute, and made safe where that process forks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Gradients on, fp32, the CPU, no autocast: what the caller may have set otherwise, and has again afterwards.

    torch's random state goes on from where it was, too.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(no_autocast())
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(devices))
        if torch.get_default_device().type != "cpu":  # else it would cost something at every call of torch
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Without the caller's autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Start no thread pool: a process forked later could not use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def allow_fork() -> None:
    """From here on a forked child computes on one thread, as torch's own data loaders do.

    The threads of OpenMP's pool do not live on in a child, which would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
