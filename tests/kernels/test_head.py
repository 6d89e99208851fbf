"""The head with its loss in one kernel each way."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import compare, large, random, rng_on

from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert_kernels import (
    head,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(
    "kind, rows, size, labels, p, smoothing, weighted, filled",
    [
        (SINGLE, 4, 100, 77, 0.1, 0.1, True, True),
        (SINGLE, 5, 40, 2, 0.0, 0.0, False, False),
        (SINGLE, 2, 384, 128, 0.3, 0.0, True, False),
        (MULTI, 5, 40, 3, 0.1, 0.0, False, True),
        (MULTI, 3, 24, 6, 0.0, 0.2, True, False),
        (REGRESSION, 5, 40, 1, 0.1, 0.0, False, True),
        large(SINGLE, 300, 768, 77, 0.1, 0.1, True, True),
        large(MULTI, 34, 1024, 28, 0.1, 0.1, True, True),
    ],
)
@pytest.mark.slow
def test_head_loss(
    device: str,
    dtype: torch.dtype,
    kind: str,
    rows: int,
    size: int,
    labels: int,
    p: float,
    smoothing: float,
    weighted: bool,
    filled: bool,
) -> None:
    """Loss and gradients as `Problem.loss_sum` has them."""
    shapes = {"x": (rows, size), "pooler_bias": (size,), "weight": (labels, size), "bias": (labels,)}
    tensors = {name: random(shape, dtype, device, i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["x"][0] *= 1e-3  # where tanh is next to nothing
    options = {"kind": kind, "smoothing": smoothing, "p": p, "rng": rng_on(device), "site": 3, "unit": 2.5}
    options["denominator"] = torch.tensor(3.0, device=device)
    options["class_weights"] = random((labels,), torch.float32, device, 5).abs() if weighted else None
    options["keep"] = (torch.arange(rows, device=device) != 1).float() if filled else None
    options["targets"] = {
        SINGLE: torch.arange(rows, device=device) * 5 % labels,
        MULTI: (random((rows, labels), torch.float32, device, 6) > 0).float(),
        REGRESSION: random((rows,), torch.float32, device, 7, 3.0),
    }[kind]
    for output in (0, 1):
        compare(
            lambda output=output, **t: head.head_loss(**t, **options)[output],
            lambda output=output, **t: head.head_loss_reference(**t, **options)[output],
            tensors,
        )
    loss, logits = head.head_loss(**tensors, **options)
    problem = Problem(kind, [str(i) for i in range(labels)], target_scale=2.5)
    total = problem.loss_sum(logits, options["targets"], options["class_weights"], smoothing, options["keep"])
    torch.testing.assert_close(loss, total / 3)
