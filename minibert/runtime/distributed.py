"""Several processes that train as one, on one machine or on many: torchrun starts them, here they share and agree.

Every process holds the whole model and all texts, computes its part of each batch, and adds up gradients with the
others before the optimiser, so all take the same step. The first process alone writes and prints. In a single process
nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minibert.config import HardwareSettings
from minibert.errors import UserError
from minibert.runtime.files import one_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store, Work

TIMEOUT = timedelta(minutes=10)  # longest wait for another process before it counts as lost
SLICE = 1 << 24  # elements of a host array that are added up at a time
LAST_WORDS = 2.0  # seconds: torchrun ends all processes when one has ended, so the silent ones wait for the speaker

_store: Store | None = None  # torchrun's, which outlives every process of the run


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if joined() else 0


def world() -> int:
    return dist.get_world_size() if joined() else 1


def on_this_machine() -> int:
    """Processes that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if joined() else 1


def is_first() -> bool:
    """Of all processes; it alone writes and prints."""
    return rank() == 0


def join(config: HardwareSettings) -> None:
    """Meet the other processes. On GPUs gradients go through NCCL, all else through gloo on the host."""
    global _store
    if not launched() or joined():
        return
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if cuda:
        _take_own_gpu()
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    with _others_needed("the other processes did not come"):
        _store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=_store, rank=number, world_size=count, timeout=TIMEOUT
        )
    atexit.register(_part)


def _take_own_gpu() -> None:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if count > gpus:
        if local:
            leave_quietly(2)
        raise UserError(f"{count} processes on a machine with {gpus} GPUs; start one for each GPU, or use --device cpu")
    torch.cuda.set_device(local)


def _part() -> None:
    with suppress(RuntimeError):  # the others may be gone
        dist.destroy_process_group()


@contextmanager
def processes(config: HardwareSettings) -> Iterator[None]:
    """Run the block together with the others. A mistake is told once on each machine, Ctrl-C once in all."""
    try:
        join(config)
        yield
    except UserError:
        if joined() and _told_already():
            leave_quietly(2)
        raise
    except KeyboardInterrupt:
        if not is_first():
            leave_quietly(130)
        raise


def _told_already() -> bool:
    """Whether a process of this machine has failed before this one, and told why."""
    with suppress(RuntimeError):  # the store went with its machine
        return _store is not None and _store.add(f"failed on machine {os.environ.get('GROUP_RANK', 0)}", 1) > 1
    return False


def leave_quietly(code: int) -> NoReturn:
    """End this process without a word, after the one that has something to say."""
    time.sleep(LAST_WORDS)
    raise SystemExit(code)


@contextmanager
def _others_needed(what: str = "another process has died or does not answer") -> Iterator[None]:
    """What torch says when the others do not answer, as a line."""
    try:
        yield
    except RuntimeError as error:
        where = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        reason = one_line(error).split("] ", 1)[-1][:160]  # without the place in torch's source
        raise UserError(f"{where}: {what} ({reason}); continue from the last checkpoint with --resume") from None


def wait_for_all() -> None:
    if joined():
        with _others_needed():
            dist.all_reduce(torch.zeros(1))


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace every gradient by its sum over all processes and return the sum of their losses: one all-reduce.

    A process whose share of the step was empty has no gradients and adds 0.
    """
    if not joined():
        return loss
    pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([*pieces, loss.reshape(1)])
    with _others_needed():
        dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for parameter, piece in zip(parameters, flat[:-1].split(sizes), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat[-1].clone()  # a view would keep all gradients in memory


def sum_array(values: np.ndarray) -> np.ndarray:
    """Add up a host array over all processes, in place. Where each has filled its rows and left 0, that is exact."""
    if joined() and values.size:
        rows = max(1, SLICE // max(1, values[0].size))
        for start in range(0, len(values), rows):
            with _others_needed():
                dist.all_reduce(torch.from_numpy(values[start : start + rows]))
    return values


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    if not joined():
        return yes
    noes = torch.tensor(float(not yes))
    with _others_needed():
        dist.all_reduce(noes)
    return not noes.item()


def from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if not joined():
        return value
    box = [value]
    with _others_needed():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def tensors_from_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors (on the CPU), in every process; the others' own are ignored."""
    described = from_first([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
    if not is_first():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in described}
    if joined():
        with _others_needed():
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0)
    return tensors


def same_weights(model: nn.Module) -> None:
    """Let every process start from the first one's parameters, whatever its own machine holds."""
    tensors = tensors_from_first({name: p.detach().cpu() for name, p in model.named_parameters()})
    if not is_first():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])


def refuse_unlike(facts: dict[str, Any]) -> None:
    """UserError where a process has other data or flags than the first: together they would train nonsense."""
    if not joined():
        return
    everyones: list[dict[str, Any]] = [{} for _ in range(world())]
    with _others_needed():
        dist.all_gather_object(everyones, facts)
    for number, others in enumerate(everyones):
        unlike = sorted(key for key in facts | others if others.get(key) != everyones[0].get(key))
        if unlike:
            raise UserError(
                f"process {number} differs from process 0 in {', '.join(unlike)}; "
                "give every machine the same files and flags"
            )


class StopRequest:
    """Whether any process was asked to stop. A question put in one step is answered in the next, so nobody waits."""

    def __init__(self) -> None:
        self.asked: tuple[Work, Tensor] | None = None

    def anywhere(self, here: bool) -> bool:
        """To be called by every process in every step: all get the same answer at the same step."""
        if not joined():
            return here
        before, answer = self.asked, torch.tensor(float(here))
        with _others_needed():
            self.asked = dist.all_reduce(answer, async_op=True), answer
            if before is None:
                return False
            before[0].wait()
        return bool(before[1].item())

    def close(self) -> None:
        """Wait for the last answer, so that no exchange is under way when the process ends."""
        if self.asked is not None:
            with _others_needed():
                self.asked[0].wait()
            self.asked = None
