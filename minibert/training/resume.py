"""Checkpoints of a run under way: one safetensors file with weights, optimiser moments and the state as JSON.

Batches and dropout are pure functions of seed and step, so no generator needs saving.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.filenames import CHECKPOINTS
from minibert.model.checkpoint import write_tensors
from minibert.runtime import distributed
from minibert.runtime.files import check_regular_file, one_line, writing
from minibert.training.loop import Training
from minibert.training.state import State

STATE_FILE = "state.safetensors"


def save_checkpoint(folder: Path, training: Training, fingerprint: dict[str, Any]) -> None:
    """Write all that `load_checkpoint` needs; the file is replaced whole or not at all."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
    metadata = {"state": json.dumps(training.state.to_dict()), "fingerprint": json.dumps(fingerprint)}
    write_tensors(folder / STATE_FILE, host_tensors(training), metadata)


def remove_checkpoint(folder: Path) -> None:
    """Take away the checkpoint of a finished run, of which nothing can be resumed; the last act of a run."""
    with suppress(OSError):  # one that cannot be removed takes space, no more
        (folder / CHECKPOINTS / STATE_FILE).unlink(missing_ok=True)
        (folder / CHECKPOINTS).rmdir()
        (folder / CHECKPOINTS).parent.rmdir()


def code_digest() -> str:
    """A hash of minibert's own source, kernels included: two versions may compute differently under one number."""
    digest = hashlib.sha256()
    kernels = find_spec("minibert_kernels")
    for folder in (Path(__file__).parents[1], *map(Path, (kernels and kernels.submodule_search_locations) or ())):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def weights_digest(model: nn.Module) -> str:
    """A hash of all parameters: what training starts from, new head and frozen layers included."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]


def load_checkpoint(folder: Path, training: Training, fingerprint: dict[str, Any]) -> None:
    """Put a run back where its checkpoint stood; UserError if data, flags or version are not the same."""
    path = folder / STATE_FILE
    try:
        check_regular_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            saved = dict(json.loads(metadata["fingerprint"]))
            state = State.from_dict(json.loads(metadata["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: not a checkpoint of minibert ({one_line(error)})") from None
    check_same_run(saved, fingerprint)
    if state.step > training.total_steps:
        raise UserError(f"{path}: not a checkpoint of this run (step {state.step} of {training.total_steps})")
    _check_tensors(path, training, tensors)
    training.restore(state, tensors)


def check_same_run(saved: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """UserError that names what is not as it was in the run that was begun."""
    changed = sorted(key for key in fingerprint | saved if fingerprint.get(key) != saved.get(key))
    if changed:
        named = [key for key in changed if key in fingerprint][:4] or changed[:1]
        what = ", ".join(
            f"{key[:40]} (was {_short(saved.get(key))}, is {_short(fingerprint.get(key))})" for key in named
        )
        of_flags = set(changed) <= {field.name for field in dataclasses.fields(RunConfig)}
        own = "With --resume and --output alone it goes on with its own flags"
        advice = own if of_flags else "Undo that, or start anew without --resume"
        raise UserError(f"--resume: this is not the run that was begun; changed: {what}. {advice}")


def _short(value: object) -> str:
    return one_line(value)[:40]


def _check_tensors(path: Path, training: Training, tensors: dict[str, Tensor]) -> None:
    """Every tensor that belongs to this run, of its shape, and no other: `copy_` would stretch a smaller one."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(training.optimizer.counters(), ())
    shapes |= {f"model.{name}": tuple(p.shape) for name, p in training.trained_parameters()}
    required = set(shapes)
    for name, p in training.trained_parameters():
        shapes |= {f"{key}.{name}": tuple(p.shape) for key in ("exp_avg", "exp_avg_sq", "best")}
        shapes[f"step.{name}"] = ()
        group = {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step")}
        required |= group if group & set(tensors) else set()
    wrong = sorted(required - set(tensors))
    for name, tensor in tensors.items():
        right = tensor.ndim == 1 if name == "recent_losses" else shapes.get(name) == tuple(tensor.shape)
        right = right and tensor.dtype == (torch.int32 if name == "growth_tracker" else torch.float32)
        if not right or (name in ("skipped", "loss_scale") and not torch.isfinite(tensor)):
            wrong.append(name)
    if wrong:
        raise UserError(f"{path}: not a checkpoint of this run ({wrong[0]} is missing or does not fit)")


def share_checkpoint(training: Training) -> None:
    """Put every process where the first one stands: its folder need not be seen by the others."""
    state = distributed.broadcast(training.state)
    tensors = distributed.broadcast_tensors(host_tensors(training))
    if not distributed.is_main_process():
        training.restore(state, tensors)


def host_tensors(training: Training) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in training.tensors().items()}
