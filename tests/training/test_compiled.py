"""Steps whose parts torch.compile has made train as plain steps do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import assert_same_training, curve
from torch._dynamo.exc import TorchDynamoException

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.problem.problem import SINGLE
from minibert.runtime.device import Hardware, choose
from minibert.training.compiled import SELF_CHECK_LENGTHS

pytestmark = pytest.mark.usefixtures("references_of_kernels")

CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


# torch.compile looks at .grad of its inputs, and keeps the warning to itself by other means than a filter.
quiet_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@needs_compiler
@quiet_dynamo
@pytest.mark.parametrize(
    "flags",
    [{}, {"gradient_accumulation_steps": 2}, {"freeze": "1"}],
    ids=str,
)
@pytest.mark.slow
def test_the_compiled_engine_trains_the_same_and_compiles_once(
    tiny: Callable[..., Path], flags: dict[str, Any]
) -> None:
    """With the same dropout, for all sizes of a batch: the last one is of one text."""
    folder, flags = tiny("BertModel"), {**flags, "dropout": 0.1}
    result = curve(folder, SINGLE, choose(RunConfig(engine="compile", device="cpu")), **flags)
    assert_same_training(result, curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"), **flags))
    regions = result[2].body.regions
    assert regions is not None and regions.report().endswith(", 0 recompilations")


@needs_compiler
@quiet_dynamo
def test_all_layers_and_sizes_share_one_compilation_a_region(tiny: Callable[..., Path]) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    curve(tiny("BertModel"), SINGLE, choose(RunConfig(engine="compile", device="cpu")), dropout=0.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # a layer's rest, and the head


@needs_compiler
@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(film_model: Path, films: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = ["--train", str(films), "--model", str(film_model), "--output", str(output), "--device", "cpu", "--quiet"]
    changes = {"CXX": shutil.which("false") or "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "minibert.finetune", *flags, "--engine", "compile"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **changes})
    assert done.returncode == 2 and not output.exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --engine compile: "), done.stderr
    assert "No working C++ compiler" in done.stderr and done.stderr.endswith("; use eager\n")


def test_compiled_code_that_is_wrong_is_an_error(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda *given: 1.1 * function(*given))
    with pytest.raises(UserError, match=r"--engine compile: its gradient is .*% away from plain torch's; use eager"):
        curve(tiny("BertModel"), SINGLE, choose(RunConfig(engine="compile", device="cpu")))


def test_compiling_again_that_fails_amid_a_run_is_one_line(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(module: Any, rows: torch.Tensor, *others: Any) -> torch.Tensor:
            if len(rows) > sum(SELF_CHECK_LENGTHS):
                raise TorchDynamoException("no space\nleft")
            return function(module, rows, *others)

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(UserError, match="--engine compile: TorchDynamoException: no space; use eager"):
        curve(tiny("BertModel"), SINGLE, choose(RunConfig(engine="compile", device="cpu")))
