"""AdamW over flat buffers, with clipping, against torch's."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_close, random
from torch import Tensor

from minibert_kernels import (
    adamw,
)

SHAPES = [torch.Size(s) for s in ((3, 700), (5,), (1, 1024), (1030,))]

GROUPS, TABLE = [0, 1, 2, 1], [(1.0, 0.1), (1.0, 0.0), (0.25, 0.01)]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def torch_adamw(dtype: torch.dtype, start: list[Tensor], grads: list[list[Tensor]], lrs: list[float], scale: float):
    """torch.optim.AdamW with clipping over the same steps; steps with infinite gradients are left out."""
    parameters = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in start]
    groups = [
        {"params": [p for p, g in zip(parameters, GROUPS, strict=True) if g == i], "weight_decay": TABLE[i][1]}
        for i in range(3)
    ]
    optimizer = torch.optim.AdamW(groups)
    norms = []
    for step_grads, lr in zip(grads, lrs, strict=True):
        for p, g in zip(parameters, step_grads, strict=True):
            p.grad = g.to(dtype) / scale
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        for group, (factor, _) in zip(optimizer.param_groups, TABLE, strict=True):
            group["lr"] = lr * factor
        if norms[-1].isfinite():
            optimizer.step()
    return [p.detach() for p in parameters], torch.stack(norms)


@pytest.mark.parametrize("scaled", [False, True])
def test_adamw_is_torchs(device: str, dtype: torch.dtype, scaled: bool) -> None:
    """Gradients and half_copy in `dtype`; three groups, clipping, and with loss scaling a skipped step."""
    layout = adamw.FlatLayout.of(SHAPES, GROUPS, TABLE, device)
    scale, lrs = (8.0 if scaled else 1.0), [1e-2, 2e-2, 3e-2, 1e-2]
    start = [random(s, torch.float32, device, i) for i, s in enumerate(SHAPES)]
    grads = [[random(s, dtype, device, 10 * t + i, 0.2) for i, s in enumerate(SHAPES)] for t in range(4)]
    if scaled:
        grads[1][2][0, 7] = float("inf")
    param, exp_avg, exp_avg_sq = (layout.buffer() for _ in range(3))
    grad, half_copy = layout.buffer(dtype), layout.buffer(dtype)
    for view, value in zip(layout.views(param), start, strict=True):
        view.copy_(value)
    half_copy.copy_(param)
    step = torch.zeros((), dtype=torch.int64, device=device)
    loss_scale = torch.tensor(scale, device=device) if scaled else None
    norms = []
    for step_grads, lr in zip(grads, lrs, strict=True):
        for view, value in zip(layout.views(grad), step_grads, strict=True):
            view.copy_(value)
        control = adamw.prepare_update_(grad, step, max_norm=1.0, loss_scale=loss_scale)
        norms.append(control[adamw.NORM])
        lr_now = torch.tensor(lr, device=device)
        adamw.adamw_(param, exp_avg, exp_avg_sq, grad, half_copy, layout, lr_now, control, zero_grad=True)
        assert not grad.any()
        assert torch.equal(half_copy, param.to(dtype))
    assert int(step) == (3 if scaled else 4)
    plain, plain_norms = torch_adamw(torch.float32, start, grads, lrs, scale)
    exact, exact_norms = torch_adamw(torch.float64, start, grads, lrs, scale)
    for ours, p, e in zip(layout.views(param), plain, exact, strict=True):
        assert_close("param", ours, p, e)
    finite = exact_norms.isfinite()
    assert torch.equal(torch.stack(norms).isfinite(), finite)
    assert_close("norm", torch.stack(norms)[finite], plain_norms[finite], exact_norms[finite])
    gaps = torch.ones(layout.total, dtype=torch.bool)
    for shape, offset in zip(SHAPES, layout.offsets, strict=True):
        gaps[offset : offset + shape.numel()] = False
    assert not param.cpu()[gaps].any()


def test_the_reference_of_adamw_agrees(device: str) -> None:
    layout = adamw.FlatLayout.of(SHAPES, GROUPS, TABLE, device)
    results = []
    for prepare, update in (
        (adamw.prepare_update_, adamw.adamw_),
        (adamw.prepare_update_reference_, adamw.adamw_reference_),
    ):
        buffers = [random((layout.total,), torch.float32, device, i).abs() for i in range(4)]
        step, lr = torch.tensor(3.0, device=device), torch.tensor(1e-2, device=device)
        for _ in range(2):
            control = prepare(buffers[3], step, max_norm=0.5)
            update(*buffers, None, layout, lr, control)
        results.append([*buffers, step, control])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_the_norm_has_equal_bits_from_run_to_run(device: str) -> None:
    grad = random((50_000,), torch.float32, device, 0)
    norms = {float(adamw.prepare_update_(grad, torch.zeros((), device=device))[adamw.NORM]) for _ in range(3)}
    assert len(norms) == 1
