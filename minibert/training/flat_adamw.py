"""AdamW over one buffer for all parameters, as the engines of fixed shapes need it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from minibert.config import RecipeSettings
from minibert.training.deferred import DeferredUpdate
from minibert.training.optimizer import (
    FIRST_LOSS_SCALE,
    learning_rate_factor,
    parameter_groups,
    shown_learning_rate,
    update_loss_scale_,
)
from minibert_kernels.adamw import BLOCK, FOUND_INF, NORM, FlatLayout, adamw_, prepare_update_
from minibert_kernels.gradients import Gradients


class FlatOptimizer:
    """The same updates as `minibert.training.optimizer.Optimizer`, from two launches over all parameters.

    The parameters of `model` become views of an fp32 buffer; in half precision the update also writes them to
    `compute_model`, the half-precision copy that computes, so that no step casts weights. Nothing is read back from the
    device, and a CUDA graph can hold a whole step.

    A step is `schedule`, gradients, `end_step` and `step_launched`; its update is carried out under the forward pass of
    the next (see `DeferredUpdate`), or by `flush`.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_model: nn.Module,
        config: RecipeSettings,
        total_steps: int,
        dtype: torch.dtype,
        unit: float = 1.0,
        kernels: bool = False,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """kernels: whether backward passes are those of minibert_kernels, by which matrices need no clearing.

        stream: for the update, beside the one that computes.
        """
        self.config, self.total_steps, self.learning_rate = config, total_steps, shown_learning_rate(config)
        groups = parameter_groups(model, config, unit)
        number_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}  # type: ignore[attr-defined]
        self.parameters = [p for p in model.parameters() if p.requires_grad]  # in the order in which layers use them
        number = [number_of[id(p)] for p in self.parameters]
        table = [(float(g["peak_lr"]), float(g["weight_decay"])) for g in groups]  # type: ignore[arg-type]
        device = self.parameters[0].device
        names = {parameter: name for name, parameter in model.named_parameters()}
        written_over = [kernels and p.dim() == 2 and ".embeddings." not in names[p] for p in self.parameters]
        shapes = [p.shape for p in self.parameters]
        layout = self.layout = FlatLayout.of(shapes, number, table, device, written_over)
        self.weights, self.exp_avg, self.exp_avg_sq = layout.buffer(), layout.buffer(), layout.buffer()
        self.grad = layout.buffer(dtype)
        self.half_copy = None if dtype == torch.float32 else layout.buffer(dtype)
        compute_parameters = {name: parameter for name, parameter in compute_model.named_parameters()}
        views = [layout.views(buffer) for buffer in (self.weights, self.grad)]
        half_copies = layout.views(self.weights if self.half_copy is None else self.half_copy)
        for parameter, weight, grad, half_copy in zip(self.parameters, *views, half_copies, strict=True):
            weight.copy_(parameter.detach())
            parameter.data = weight
            copy = compute_parameters[names[parameter]]
            copy.data, copy.grad = half_copy, grad
        self.gradients = Gradients(self.grad, [compute_parameters[names[p]] for p in self.parameters], views[1])
        moments = zip(layout.views(self.exp_avg), layout.views(self.exp_avg_sq), strict=True)
        self.moment_views = dict(zip(map(id, self.parameters), moments, strict=True))
        self.factor = torch.zeros((), device=device)  # of the peak learning rates, for the update that is due
        self.host_factor = 0.0  # and of the step under way
        self.control = torch.zeros(5, device=device)  # of the update that is due; at first one that is skipped
        self.control[FOUND_INF] = 1
        self.parts = self._parts([names[p] for p in self.parameters], len(model.encoder.layers))  # type: ignore[union-attr, arg-type]
        self.deferred = DeferredUpdate(self._update_part, [layer for layer, _, _ in self.parts], stream)
        self.steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.loss_scale = torch.full((), FIRST_LOSS_SCALE, device=device) if dtype == torch.float16 else None
        self.bad = torch.zeros((), device=device)  # 1 if the last step was skipped for another reason than fp16
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.refresh()

    def _parts(self, names: list[str], layers: int) -> list[tuple[int, int, int]]:
        """(layer, start, stop) of each layer's elements in the buffers; -1: embeddings, the head with the last one."""

        def layer_of(name: str) -> int:
            parts = name.split(".")  # encoder.layers.N....
            return -1 if parts[1] == "embeddings" else int(parts[2]) if parts[1] == "layers" else layers - 1

        of_layer = [(layer_of(name), start) for name, start in zip(names, self.layout.offsets, strict=True)]
        starts = {layer: start for layer, start in reversed(of_layer)}  # the first parameter's
        stops = [*sorted(starts.values()), self.layout.total][1:]
        return [(layer, starts[layer], stop) for layer, stop in zip(sorted(starts), stops, strict=True)]

    def schedule(self, step: int) -> None:
        """Set the learning rate of step number `step`; the one part of a step that the host decides."""
        self.host_factor = learning_rate_factor(step, self.total_steps, self.config)
        self.learning_rate = shown_learning_rate(self.config) * self.host_factor

    def end_step(self) -> Tensor:
        """All that follows from a step's gradients but the update itself; returns their norm."""
        limit = self.config.max_grad_norm
        control = self.control
        control.copy_(prepare_update_(self.grad, self.steps, max_norm=limit, loss_scale=self.loss_scale))
        self.skipped += control[FOUND_INF]
        at_fault = control[FOUND_INF] if self.loss_scale is None else control[FOUND_INF] * (self.loss_scale <= 1)
        self.bad.copy_(at_fault)
        if self.loss_scale is not None:
            update_loss_scale_(self.loss_scale, self.growth_tracker, control[FOUND_INF])
        return control[NORM]  # the next step writes there

    def step_launched(self) -> None:
        """All of a step is on its way; now its update is due."""
        self.factor.fill_(self.host_factor)
        self.deferred.due = True

    def _update_part(self, number: int) -> None:
        """Update the parameters of a part from their gradients, which it clears (or the next step writes over)."""
        _, start, stop = self.parts[number]
        buffers = (self.weights, self.exp_avg, self.exp_avg_sq, self.grad)
        weights, exp_avg, exp_avg_sq, grad = (buffer[start:stop] for buffer in buffers)
        half_copy = None if self.half_copy is None else self.half_copy[start:stop]
        layout = replace(self.layout, block_groups=self.layout.block_groups[start // BLOCK : stop // BLOCK])
        adamw_(weights, exp_avg, exp_avg_sq, grad, half_copy, layout, self.factor, self.control, zero_grad=True)

    def flush(self) -> None:
        """Carry out an update that is due: afterwards parameters and moments are those behind the last step."""
        self.deferred.flush()
        self.control[FOUND_INF].fill_(1)  # the next step begins with an update that changes nothing

    def refresh(self) -> None:
        """Write the parameters to `compute_model` again, after something other than a step has changed them."""
        if self.half_copy is not None:
            self.half_copy.copy_(self.weights)

    def counters(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the moments, by name."""
        if self.loss_scale is None:
            return {"skipped": self.skipped}
        return {"skipped": self.skipped, "loss_scale": self.loss_scale, "growth_tracker": self.growth_tracker}

    def drop_gradients(self) -> None:
        """Discard the gradients of a step that will be run again."""
        self.flush()  # by the gradients of the step before
        self.grad.zero_()
        self.gradients.forget()

    def reset(self) -> None:
        """Back to the state before the first step."""
        self.flush()
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
