"""Checkpoints of a run under way: one safetensors file with weights, optimiser moments and the state as JSON.

Batches and dropout are pure functions of seed and step, so no generator needs saving.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minibert.checkpoint import write_tensors
from minibert.errors import UserError
from minibert.files import one_line
from minibert.train import State, Training

STATE_FILE = "state.safetensors"


def save_checkpoint(folder: Path, training: Training, fingerprint: dict[str, Any]) -> None:
    """Write all that `load_checkpoint` needs; the file is replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"state": json.dumps(dataclasses.asdict(training.state)), "fingerprint": json.dumps(fingerprint)}
    write_tensors(folder / STATE_FILE, _tensors(training), metadata)


def load_checkpoint(folder: Path, training: Training, fingerprint: dict[str, Any]) -> None:
    """Put a run back where its checkpoint stood; UserError if data, flags or version are not the same."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint to resume; leave --resume out to start anew")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            saved = json.loads(metadata["fingerprint"])
            state = State(**json.loads(metadata["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint of minibert ({one_line(error)})") from None
    changed = sorted(key for key in fingerprint | saved if fingerprint.get(key) != saved.get(key))
    if changed:
        what = ", ".join(f"{key} (was {saved.get(key)}, is {fingerprint.get(key)})" for key in changed[:4])
        raise UserError(f"--resume: this is not the run that was begun; changed: {what}")
    _restore(training, tensors)
    training.state = state


def _tensors(training: Training) -> dict[str, Tensor]:
    tensors = {f"best.{name}": tensor for name, tensor in training.best.items()}
    for name, parameter in training.trained_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in training.optimizer.moments(parameter).items():  # exp_avg, exp_avg_sq, step
            tensors[f"{key}.{name}"] = value
    if training.optimizer.loss_scale is not None:
        tensors["loss_scale"] = training.optimizer.loss_scale
        tensors["growth_tracker"] = training.optimizer.growth_tracker
    tensors["skipped"] = training.optimizer.skipped
    if training.recent_losses:
        tensors["recent_losses"] = torch.stack(training.recent_losses)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _restore(training: Training, tensors: dict[str, Tensor]) -> None:
    optimizer = training.optimizer
    device = training.hardware.device
    with torch.no_grad():
        for name, parameter in training.trained_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            if f"exp_avg.{name}" in tensors:
                keys = ("exp_avg", "exp_avg_sq", "step")
                optimizer.restore(parameter, {key: tensors[f"{key}.{name}"].to(device) for key in keys})
            if f"best.{name}" in tensors:
                training.best[name] = tensors[f"best.{name}"].to(device)
        if training.fixed is not None:
            training.fixed.optimizer.refresh()
        optimizer.skipped.copy_(tensors["skipped"])
        training.recent_losses = list(tensors.get("recent_losses", torch.empty(0)).to(device))
        if optimizer.loss_scale is not None:
            optimizer.loss_scale.copy_(tensors["loss_scale"])
            optimizer.growth_tracker.copy_(tensors["growth_tracker"])
