"""AdamW (Loshchilov & Hutter 2019) as BERT's authors set it up, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from minibert.config import RecipeSettings
from minibert.errors import UserError
from minibert.training.recipe import HEAD_ALONE_LEARNING_RATE, USUAL_LEARNING_RATE

FIRST_LOSS_SCALE = 65536.0  # of fp16, as in torch's GradScaler


def parameter_groups(model: nn.Module, config: RecipeSettings, unit: float = 1.0) -> list[dict[str, object]]:
    """One group for each (peak learning rate, weight decay): no decay on biases and LayerNorm.

    unit: what the labels are counted in; the last layer's steps are, too, so that it learns as if labels were divided.
    """
    layers = len(model.encoder.layers)  # type: ignore[union-attr, arg-type]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim == 1 else config.weight_decay
            rate = peak_learning_rate(name, layers, config)
            if name.startswith("classifier.out."):
                rate, decay = rate * unit, decay / unit
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": ps, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def peak_learning_rate(name: str, layers: int, config: RecipeSettings) -> float:
    """Of a parameter, by its depth: the head's own, or the encoder's times layer_lr_decay for each layer below."""
    usual = HEAD_ALONE_LEARNING_RATE if config.freeze == "all" else USUAL_LEARNING_RATE
    if config.freeze == "all" and config.learning_rate is None:
        usual = config.head_learning_rate or usual
    rate = config.learning_rate or usual
    if name.startswith("classifier.") or (name.startswith("pooler.") and config.freeze == "all"):
        return config.head_learning_rate or rate
    if name.startswith("pooler."):
        return rate
    depth = 0 if ".embeddings." in name else int(name.split(".")[2]) + 1  # encoder.layers.N....
    return rate * config.layer_lr_decay ** (layers - depth)


def freeze(model: nn.Module, choice: str, new: Collection[str]) -> int:
    """--freeze: fix pretrained parameters and return how many layers stay as they are, -1 for not even embeddings.

    `all` fixes everything that came from the checkpoint; parameters in `new` and the head always train.
    """
    layers = len(model.encoder.layers)  # type: ignore[union-attr, arg-type]
    if choice == "none":
        return -1
    frozen = {"embeddings": 0, "all": layers}.get(choice)
    frozen = int(choice) if frozen is None else frozen
    if frozen > layers:
        raise UserError(f"--freeze {choice}: the model has {layers} layers")
    fixed = ["encoder.embeddings.", *(f"encoder.layers.{i}." for i in range(frozen))]
    if choice == "all":
        fixed.append("pooler.")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(fixed)) and name not in new:
            parameter.requires_grad_(False)
    model.encoder.frozen_layers = frozen  # type: ignore[union-attr]
    return frozen


def shown_learning_rate(config: RecipeSettings) -> float:
    """The peak that the log follows: the encoder's or, where that is frozen, the head's."""
    return peak_learning_rate("classifier.weight" if config.freeze == "all" else "pooler.weight", 0, config)


def learning_rate_factor(step: int, total: int, config: RecipeSettings) -> float:
    """Share of the peak learning rate at step 0, 1, ... of `total`: linear warm-up, then the schedule."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "linear":
        return max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def update_loss_scale_(loss_scale: Tensor, growth_tracker: Tensor, found_inf: Tensor) -> None:
    """Halve it after an overflow, double it after 2,000 steps without one."""
    torch._amp_update_scale_(loss_scale, growth_tracker, found_inf, 2.0, 0.5, 2000)


class Optimizer:
    """Fused AdamW with the schedule, clipping and loss scaling folded in: gradients are divided as they are used.

    A step whose gradients are not finite changes nothing and is counted in `skipped`.
    """

    def __init__(
        self, model: nn.Module, config: RecipeSettings, total_steps: int, scale_loss: bool = False, unit: float = 1.0
    ) -> None:
        self.config, self.total_steps, self.learning_rate = config, total_steps, shown_learning_rate(config)
        self.adamw = torch.optim.AdamW(parameter_groups(model, config, unit), betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.parameters: list[nn.Parameter] = [p for group in self.adamw.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.loss_scale = torch.full((), FIRST_LOSS_SCALE, device=device) if scale_loss else None
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), device=device)
        self.bad = torch.zeros((), device=device)  # 1 if the last step was skipped for another reason than fp16

    def step(self, step: int, loss: Tensor | None = None) -> Tensor:
        """Update the parameters as step number `step` and drop the gradients; returns their norm (a tensor).

        `loss`: of the step; one that is not finite is skipped too.
        """
        factor = learning_rate_factor(step, self.total_steps, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.learning_rate = shown_learning_rate(self.config) * factor
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        divisor = torch.ones_like(norm)
        if self.loss_scale is not None:
            norm, divisor = norm / self.loss_scale, self.loss_scale.clone()
        finite = torch.isfinite(norm)
        sound = finite  # a loss scale that was too large is no error: the step is skipped and the scale halved
        if self.loss_scale is not None:
            sound = finite | (self.loss_scale > 1)
        if loss is not None:
            finite, sound = finite & torch.isfinite(loss), sound & torch.isfinite(loss)
        bad, self.bad = (~finite).float(), (~sound).float()
        if self.config.max_grad_norm:
            # Fused AdamW divides by grad_scale in the pass it makes anyway; clip_grad_norm_ would make one more.
            divisor = divisor * ((norm + 1e-6) / self.config.max_grad_norm).clamp(min=1.0)
        self.adamw.grad_scale, self.adamw.found_inf = divisor, bad  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.skipped += bad
        if self.loss_scale is not None:
            update_loss_scale_(self.loss_scale, self.growth_tracker, bad)
        return norm

    def flush(self) -> None:
        """Nothing to do: a step's update is part of it, unlike that of `FlatOptimizer`."""

    def refresh(self) -> None:
        """Nothing to do: no copy of the parameters is kept."""

    def counters(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the moments, by name."""
        if self.loss_scale is None:
            return {"skipped": self.skipped}
        return {"skipped": self.skipped, "loss_scale": self.loss_scale, "growth_tracker": self.growth_tracker}

    def drop_gradients(self) -> None:
        """Forget what was computed of a step that will be tried again."""
        self.adamw.zero_grad(set_to_none=True)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """What AdamW remembers of a parameter: exp_avg, exp_avg_sq and step; nothing before its first step."""
        return dict(self.adamw.state.get(parameter, {}))

    def restore(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        self.adamw.state[parameter] = moments
