"""Data-parallel training in several processes, on one node or several, started by torchrun.

Every process holds the whole model and all texts, computes its part of each batch, and all-reduces gradients before
the optimiser, so all take the same step. The main process (rank 0) alone writes and prints. Without torchrun, every
function here returns its input or does nothing.
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
EXIT_GRACE_SECONDS = 2.0  # torchrun kills all processes once one exits: time for the one that prints the error

_store: Store | None = None  # torchrun's, which outlives every process of the run


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def local_world_size() -> int:
    """Processes on this node, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which alone writes and prints."""
    return rank() == 0


def join(config: HardwareSettings) -> None:
    """Join the process group. On GPUs gradients go through NCCL, everything else through gloo on the host."""
    global _store
    if not launched() or is_initialized():
        return
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if cuda:
        _select_gpu()
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    with _peer_errors("the other processes did not join"):
        _store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=_store, rank=number, world_size=count, timeout=TIMEOUT
        )
    atexit.register(_destroy_process_group)


def _select_gpu() -> None:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if count > gpus:
        if local:
            exit_silently(2)
        raise UserError(f"{count} processes on a node with {gpus} GPUs; start one per GPU, or use --device cpu")
    torch.cuda.set_device(local)


def _destroy_process_group() -> None:
    with suppress(RuntimeError):  # the others may be gone
        dist.destroy_process_group()


@contextmanager
def processes(config: HardwareSettings) -> Iterator[None]:
    """Run the block in the process group. An error is printed once per node, Ctrl-C once in all."""
    try:
        join(config)
        yield
    except UserError:
        if is_initialized() and _error_printed_on_node():
            exit_silently(2)
        raise
    except KeyboardInterrupt:
        if not is_main_process():
            exit_silently(130)
        raise


def _error_printed_on_node() -> bool:
    """Whether another process of this node has failed before this one, and printed why."""
    with suppress(RuntimeError):  # the store is gone with its node
        return _store is not None and _store.add(f"failed on node {os.environ.get('GROUP_RANK', 0)}", 1) > 1
    return False


def exit_silently(code: int) -> NoReturn:
    """Exit without a message, after the process that prints the error."""
    time.sleep(EXIT_GRACE_SECONDS)
    raise SystemExit(code)


@contextmanager
def _peer_errors(what: str = "another process has died or does not answer") -> Iterator[None]:
    """Turn what torch raises when other processes do not answer into a UserError."""
    try:
        yield
    except RuntimeError as error:
        where = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        reason = one_line(error).split("] ", 1)[-1][:160]  # without the place in torch's source
        raise UserError(f"{where}: {what} ({reason}); continue from the last checkpoint with --resume") from None


def barrier() -> None:
    if is_initialized():
        with _peer_errors():
            dist.all_reduce(torch.zeros(1))


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace every gradient by its sum over all processes and return the sum of their losses: one all-reduce.

    A process without rows in this step has no gradients and adds 0.
    """
    if not is_initialized():
        return loss
    flat_gradients = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([*flat_gradients, loss.reshape(1)])
    with _peer_errors():
        dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for parameter, gradient in zip(parameters, flat[:-1].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    return flat[-1].clone()  # a view would keep all gradients in memory


def all_reduce_array(values: np.ndarray) -> np.ndarray:
    """Sum a host array over all processes, in place. Where each has filled its rows and left 0, that is exact."""
    if is_initialized() and values.size:
        rows = max(1, SLICE // max(1, values[0].size))
        for start in range(0, len(values), rows):
            with _peer_errors():
                dist.all_reduce(torch.from_numpy(values[start : start + rows]))
    return values


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    if not is_initialized():
        return yes
    noes = torch.tensor(float(not yes))
    with _peer_errors():
        dist.all_reduce(noes)
    return not noes.item()


def broadcast(value: Any) -> Any:
    """The value of rank 0, in every process."""
    if not is_initialized():
        return value
    box = [value]
    with _peer_errors():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of rank 0 (on the CPU), in every process; those of other ranks are ignored."""
    described = broadcast([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
    if not is_main_process():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in described}
    if is_initialized():
        with _peer_errors():
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0)
    return tensors


def broadcast_parameters(model: nn.Module) -> None:
    """Copy the parameters of rank 0 into every process, whatever weights its node has."""
    tensors = broadcast_tensors({name: p.detach().cpu() for name, p in model.named_parameters()})
    if not is_main_process():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])


def check_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """UserError where a process has other data or flags than rank 0, as gradients would not belong together."""
    if not is_initialized():
        return
    everyones: list[dict[str, Any]] = [{} for _ in range(world_size())]
    with _peer_errors():
        dist.all_gather_object(everyones, facts)
    for number, others in enumerate(everyones):
        unlike = sorted(key for key in facts | others if others.get(key) != everyones[0].get(key))
        if unlike:
            raise UserError(
                f"process {number} differs from process 0 in {', '.join(unlike)}; "
                "give every node the same files and flags"
            )


class StopRequest:
    """Whether any process was asked to stop: an asynchronous all-reduce per step, read at the next one."""

    def __init__(self) -> None:
        self.asked: tuple[Work, Tensor] | None = None

    def anywhere(self, here: bool) -> bool:
        """To be called by every process in every step: all get the same answer at the same step."""
        if not is_initialized():
            return here
        before, answer = self.asked, torch.tensor(float(here))
        with _peer_errors():
            self.asked = dist.all_reduce(answer, async_op=True), answer
            if before is None:
                return False
            before[0].wait()
        return bool(before[1].item())

    def close(self) -> None:
        """Wait for the last answer, so that no exchange is under way when the process ends."""
        if self.asked is not None:
            with _peer_errors():
                self.asked[0].wait()
            self.asked = None
