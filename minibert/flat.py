"""AdamW over one buffer for all parameters, as the engines of fixed shapes need it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minibert.config import RunConfig
from minibert.optim import (
    FIRST_LOSS_SCALE,
    learning_rate_factor,
    parameter_groups,
    shown_learning_rate,
    update_loss_scale_,
)
from minibert_kernels.adamw import FOUND_INF, NORM, FlatLayout, adamw_, prepare_update_


class FlatOptimizer:
    """The same updates as `minibert.optim.Optimizer`, from two launches over all parameters.

    The parameters of `model` become views of an fp32 buffer; in half precision the update also writes them to the
    `twin`, the copy of the model that computes, so that no step casts weights. Nothing is read back from the device,
    and a CUDA graph can hold `update`.
    """

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        config: RunConfig,
        total_steps: int,
        dtype: torch.dtype,
        unit: float = 1.0,
    ) -> None:
        self.config, self.total_steps, self.learning_rate = config, total_steps, config.learning_rate
        groups = parameter_groups(model, config, unit)
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        number = [i for i, group in enumerate(groups) for _ in group["params"]]  # type: ignore[attr-defined]
        table = [(float(g["peak_lr"]), float(g["weight_decay"])) for g in groups]  # type: ignore[arg-type]
        device = self.parameters[0].device
        layout = self.layout = FlatLayout.of([p.shape for p in self.parameters], number, table, device)
        self.weights, self.exp_avg, self.exp_avg_sq = layout.buffer(), layout.buffer(), layout.buffer()
        self.grad = layout.buffer(dtype)
        self.shadow = None if dtype == torch.float32 else layout.buffer(dtype)
        twins = {name: parameter for name, parameter in twin.named_parameters()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        views = [layout.views(buffer) for buffer in (self.weights, self.grad)]
        shadows = layout.views(self.weights if self.shadow is None else self.shadow)
        for parameter, weight, grad, shadow in zip(self.parameters, *views, shadows, strict=True):
            weight.copy_(parameter.detach())
            parameter.data = weight
            copy = twins[names[parameter]]
            copy.data, copy.grad = shadow, grad
            copy.main_grad = grad  # type: ignore[attr-defined]  # where kernels add by themselves, without autograd
        moments = zip(layout.views(self.exp_avg), layout.views(self.exp_avg_sq), strict=True)
        self.moment_views = dict(zip(map(id, self.parameters), moments, strict=True))
        self.factor = torch.zeros((), device=device)  # of the peak learning rates, by the schedule
        self.steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.loss_scale = torch.full((), FIRST_LOSS_SCALE, device=device) if dtype == torch.float16 else None
        self.bad = torch.zeros((), device=device)  # 1 if the last step was skipped for another reason than fp16
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.refresh()

    def schedule(self, step: int) -> None:
        """Set the learning rate of step number `step`; the one part of a step that the host decides."""
        factor = learning_rate_factor(step, self.total_steps, self.config)
        self.learning_rate = shown_learning_rate(self.config) * factor
        self.factor.fill_(factor)

    def update(self) -> Tensor:
        """One step from the gradients, which it clears; returns their norm."""
        limit = self.config.max_grad_norm
        control = prepare_update_(self.grad, self.steps, max_norm=limit, loss_scale=self.loss_scale)
        buffers = (self.weights, self.exp_avg, self.exp_avg_sq, self.grad, self.shadow)
        adamw_(*buffers, self.layout, self.factor, control, zero_grad=True)
        self.skipped += control[FOUND_INF]
        at_fault = control[FOUND_INF] if self.loss_scale is None else control[FOUND_INF] * (self.loss_scale <= 1)
        self.bad.copy_(at_fault)
        if self.loss_scale is not None:
            update_loss_scale_(self.loss_scale, self.growth_tracker, control[FOUND_INF])
        return control[NORM]

    def refresh(self) -> None:
        """Write the parameters to the twin again, after something else than a step has changed them."""
        if self.shadow is not None:
            self.shadow.copy_(self.weights)

    def drop_gradients(self) -> None:
        """Forget what was computed of a step that will be tried again."""
        self.grad.zero_()

    def start_anew(self) -> None:
        """As before the first step."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.grad, self.steps, self.skipped, self.bad):
            tensor.zero_()
        self.growth_tracker.zero_()
        if self.loss_scale is not None:
            self.loss_scale.fill_(FIRST_LOSS_SCALE)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """As AdamW keeps them; the step, which parameters share, as a copy: tensors in a file may not share memory."""
        exp_avg, exp_avg_sq = self.moment_views[id(parameter)]
        return {"step": self.steps.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def restore(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        exp_avg, exp_avg_sq = self.moment_views[id(parameter)]
        for tensor, key in ((exp_avg, "exp_avg"), (exp_avg_sq, "exp_avg_sq"), (self.steps, "step")):
            tensor.copy_(moments[key])
