"""What a training step starts on a GPU, counted and compiled where there is none (see launches.py).

Gains are predicted for an H200 at 32 texts of 25 tokens: about 2 microseconds for each small launch of a graph.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launches import SHAPES, SHARED_MEMORY, Recording, step_of

from minibert.problem.problem import MULTI, REGRESSION, SINGLE

if os.environ.get("CI") != "true":  # which installs it
    pytest.importorskip("triton")

WAYS = ("forward", "backward")
ROOT = Path(__file__).resolve().parents[2]
LAYERS = 12
KERNELS = {
    *(f"{file}.{way}_kernel" for file in ("embedding", "first_token", "gelu", "head", "layer_norm") for way in WAYS),
    *("attention.forward_kernel", "attention.short_backward_kernel", "embedding.scatter_kernel"),
    *("linear.column_sums_kernel", "gradients.add_all_partials_kernel"),
    *("adamw.sum_of_squares_kernel", "adamw.control_kernel", "adamw.adamw_kernel"),
}


@pytest.fixture(scope="module")
def step() -> Recording:
    return step_of("base", 32, 25)


def test_a_step_of_bert_base_has_few_launches(step: Recording) -> None:
    """393 before what the tests below count; the rest are 151 matrix products, and kernels of some use each."""
    assert step.total <= 306  # 13 of them by the update in 14 parts, which lies under the next step's forward pass
    assert sum(name in ("mm", "addmm", "addmm_") for name in step.torch_ops) == 151


def test_partial_sums_are_added_up_once(step: Recording) -> None:
    """Predicted: 55 us. Of 37 launches (80 us) one is left, which reads 90 MB of partial sums in some 20 us."""
    count = Counter(step.names())
    assert count["gradients.add_all_partials_kernel"] == 1
    assert count["backend.add_partials_kernel"] == 0


def test_long_batches_have_more_partial_sums_than_are_kept() -> None:
    """There a launch is nothing beside the work, and kernels run as many programs as fill the device."""
    count = Counter(step_of("minilm", 256, 128).names())
    assert count["backend.add_partials_kernel"] == 5 * (2 + 1) + 1  # norms and GELUs below the last layer; embeddings
    assert 0 < count["gradients.add_all_partials_kernel"] <= 4


def test_matrices_are_written_by_the_first_batch_of_a_step_and_added_to_by_the_next(step: Recording) -> None:
    """Predicted: 60 to 80 us, of 2 bytes read and 2 cleared for each of 85 million weights."""
    weights = 4 * LAYERS + 3  # the last layer's query apart from key and value; pooler; classifier
    first = Counter(step.torch_ops)
    second = Counter(step_of("base", 32, 25, micro_batches=2).torch_ops) - first
    assert first["mm"] - second["mm"] == weights
    assert second["addmm_"] - first["addmm_"] == weights


def test_gradients_of_residuals_take_no_launch(step: Recording) -> None:
    """Predicted: 50 us, of an addition in each half of a layer."""
    count = Counter(step.torch_ops)
    assert count["add"] == 1  # the last layer's [CLS] rows and all rows
    assert count["addmm_"] == 2 * LAYERS


def test_the_gradient_of_the_qkv_bias_is_one_launch(step: Recording) -> None:
    """Predicted: 25 us, of a second launch in each layer."""
    count = Counter(step.names())
    assert count["linear.column_sums_kernel"] == LAYERS + 1
    assert count["sum"] == 3  # of the losses, of the batches' losses, and of the rows' gradients for token type 0


@pytest.mark.parametrize(
    ("kind", "labels", "smoothing", "weighted"),
    [(SINGLE, 2, 0.0, False), (SINGLE, 77, 0.1, True), (MULTI, 6, 0.1, True), (REGRESSION, 1, 0.0, False)],
)
def test_the_head_and_its_loss_are_one_launch_each_way(
    kind: str, labels: int, smoothing: float, weighted: bool
) -> None:
    """Predicted: 50 us, of 28 launches of torch's (one label of two, no weights)."""
    weights = np.ones(labels, dtype=np.float32) if weighted else None
    record = step_of("minilm", 32, 25, kind=kind, labels=labels, label_smoothing=smoothing, class_weights=weights)
    count = Counter(record.names())
    assert count["head.forward_kernel"] == count["head.backward_kernel"] == 1
    left = set(record.torch_ops) - {"mm", "addmm", "addmm_"}
    assert left <= set(
        "add add_ clone copy_ fill_ index_add index_select new_zeros ones_like searchsorted sort stack sum".split()
    )


@pytest.mark.parametrize("changes", [{"labels": 500}, {"mlp_size": 64}])
def test_other_heads_take_torchs_operations(changes: dict[str, int]) -> None:
    record = step_of("minilm", 32, 25, **changes)
    assert "head.forward_kernel" not in record.names() and "_log_softmax" in record.torch_ops


# Bytes of stack a thread where no block size that was tried does without: for A100, attention's backward pass of texts
# of 65 to 128 tokens with heads of 64 (184 to 4616 bytes with 4 to 16 warps; the way of longer texts spills too).
KNOWN_SPILLS = {(80, "attention.short_backward_kernel"): 208}


@pytest.mark.parametrize(("arch", "shapes"), [(90, SHAPES), (80, SHAPES[:2])])
@pytest.mark.benchmarks
def test_every_kernel_of_a_step_compiles_without_spilling(arch: int, shapes: list[object]) -> None:
    """With the ptxas of Triton's wheel, for the argument types, alignments and block sizes that the steps have."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests" / "launches.py"), "--arch", str(arch)]
    command += [word for number in range(len(shapes)) for word in ("--shape", str(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]
    assert {name for name, *_ in rows} == KERNELS
    for name, _, _, stack, shared in rows:
        assert int(stack) <= KNOWN_SPILLS.get((arch, name), 0), f"{name} spills {stack} bytes"
        assert int(shared) <= SHARED_MEMORY[arch], f"{name} wants {shared} bytes of shared memory"
