"""Steps of fixed shapes train as plain steps do. Here on the CPU; `pytest -m gpu` adds graphs on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import skip_without_interpreter
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from minibert.batching.dataset import Dataset, collate
from minibert.batching.tokens import Tokens
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model
from minibert.model.dropout import DropoutMasks
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runtime import device
from minibert.runtime.device import Hardware, choose, fit_attention
from minibert.training import resume
from minibert.training.compiled import SELF_CHECK_LENGTHS
from minibert.training.deferred import DeferredUpdate
from minibert.training.flat_adamw import FlatOptimizer
from minibert.training.graph_step import Bucket, FixedSteps, fill_up
from minibert.training.loop import Training
from minibert.training.optimizer import freeze
from minibert_kernels import backend, gelu

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
SIZES = {SINGLE: 3, MULTI: 3, REGRESSION: 1}
# torch.compile looks at .grad of its inputs, and keeps the warning to itself by other means than a filter.
quiet_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def references(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' references stand in for them: Triton's interpreter takes a second where a GPU takes microseconds."""
    if "interpreter" in request.keywords:
        skip_without_interpreter()
    else:
        monkeypatch.setattr(backend, "INTERPRET", False)


def made_tokens(count: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(rng.integers(5, 200, offsets[-1]).astype(np.int32), offsets, None, np.zeros(count, dtype=np.int32))


def made_targets(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == SINGLE:
        return rng.integers(0, 3, count)
    return rng.random((count, 3) if kind == MULTI else count).round().astype(np.float32)


def curve(
    folder: Path, kind: str, hardware: Hardware, weights: np.ndarray | None = None, **flags: Any
) -> tuple[np.ndarray, dict[str, torch.Tensor], Training]:
    """Losses and gradient norms of some steps, and the weights behind them."""
    torch.manual_seed(0)
    model, _ = load_model(
        folder, BertForSequenceClassification, num_labels=SIZES[kind], dropout=flags.pop("dropout", 0)
    )
    data = Dataset(made_tokens(41), made_targets(kind, 41))
    labels = [str(i) for i in range(SIZES[kind])]
    flags = {"engine": "auto" if hardware.engine == "eager" else "graph", **flags}  # by name: a fault is an error
    freeze(model, str(flags.get("freeze", "none")), ())
    config = RunConfig(**{"batch_size": 8, "learning_rate": 1e-3, "epochs": 2, "quiet": True, **flags})
    training = Training(model, Problem(kind, labels), {"train": data}, config, hardware, weights, print)
    numbers = [torch.stack(training._step(step)) for _ in range(2) for step in training._steps_of_epoch(0)]
    training.optimizer.flush()
    weights_behind = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    return torch.stack(numbers).cpu().numpy(), weights_behind, training


def assert_same_training(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=tolerance, atol=tolerance)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=0, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("total", [1, 63, 64, 65, 800, 4097])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_a_bucket_holds_the_batch_and_what_fills_it_up(total: int, count: int) -> None:
    lengths = np.full(count, max(1, total // count))
    bucket = Bucket.of(lengths)
    tail = bucket.tokens - lengths.sum()
    assert 0 <= tail <= max(64, lengths.sum() // 8)
    assert (bucket.texts - count) * bucket.longest >= tail
    assert bucket.longest >= lengths.max()


def test_few_buckets_serve_an_epoch() -> None:
    rng = np.random.default_rng(0)
    buckets = {Bucket.of(np.sort(rng.integers(5, 60, 32))) for _ in range(2000)}
    assert len(buckets) < 25


def test_what_fills_up_changes_no_logit(tiny: Callable[..., Path]) -> None:
    model, _ = load_model(tiny("BertForSequenceClassification"), BertForSequenceClassification, num_labels=2)
    model.eval()
    x = collate(made_tokens(9), np.arange(9))
    expected = model.logits(x)
    bucket = Bucket.of(made_tokens(9).lengths)
    filled, targets, keep = fill_up(x, torch.ones(9, dtype=torch.int64), bucket, "sdpa")
    assert len(filled.input_ids) == bucket.tokens
    assert len(targets) == len(keep) == bucket.texts
    torch.testing.assert_close(model.logits(filled)[keep > 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fixed_shapes_train_as_plain_steps(tiny: Callable[..., Path], kind: str, accumulation: int) -> None:
    folder = tiny("BertModel")
    plain = Hardware(CPU, "fp32", "sdpa", "eager")
    weights = None if kind == REGRESSION else np.array([0.5, 1.0, 2.0], dtype=np.float32)
    smoothing = 0.0 if kind == REGRESSION else 0.1
    flags = {"gradient_accumulation_steps": accumulation, "label_smoothing": smoothing, "layer_lr_decay": 0.9}
    expected = curve(folder, kind, plain, weights, **flags)
    assert_same_training(curve(folder, kind, replace(plain, engine="fixed"), weights, **flags), expected)


def test_the_kernels_way_trains_the_same(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    plain = Hardware(CPU, "fp32", "sdpa", "eager")
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    assert_same_training(curve(folder, SINGLE, kernels), curve(folder, SINGLE, plain))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_reads_what_the_step_before_left_of_the_gradients_of_matrices(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Before a step's first backward pass, all that the update does not clear is spoiled."""
    folder, construct, finish = tiny("BertModel"), FlatOptimizer.__init__, DeferredUpdate.finish
    optimizers: list[FlatOptimizer] = []
    spoiled: list[int] = []

    def constructed(optimizer: FlatOptimizer, *given: Any, **named: Any) -> None:
        construct(optimizer, *given, **named)
        optimizers.append(optimizer)

    def finished(update: DeferredUpdate) -> None:
        finish(update)
        if optimizers[-1].gradients.first:
            matrices = [v for v in optimizers[-1].layout.views(optimizers[-1].grad) if v.any()]
            spoiled.append(len(matrices))
            for matrix in matrices:
                matrix.fill_(torch.nan)

    flags = {"gradient_accumulation_steps": accumulation}
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"), **flags)
    monkeypatch.setattr(FlatOptimizer, "__init__", constructed)
    monkeypatch.setattr(DeferredUpdate, "finish", finished)
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    assert_same_training(curve(folder, SINGLE, kernels, **flags), expected)
    assert 3 * 4 + 2 in spoiled  # the layers' matrices, the pooler's and the classifier's


def test_the_kernels_dropout_is_drawn_anew_each_step_and_again_from_the_seed(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    kernels = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    first = curve(folder, SINGLE, kernels, dropout=0.3)
    assert_same_training(curve(folder, SINGLE, kernels, dropout=0.3), first, tolerance=0)
    assert not np.allclose(curve(folder, SINGLE, kernels, dropout=0.3, seed=43)[0], first[0])


@pytest.mark.interpreter
def test_all_kernels_together_give_the_gradient_of_plain_torch(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel", hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=3, dropout=0.1)
    hardware = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    steps = FixedSteps(model, Problem(SINGLE, ["a", "b", "c"]), RunConfig(), hardware, 10, None)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert backend.use_triton(steps.rng)
    assert steps.fault(collate(made_tokens(2), np.arange(2)), torch.tensor([0, 2])) is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_what_fills_batches_up_counts_as_padding(tiny: Callable[..., Path], attention: str) -> None:
    *_, training = curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", attention, "fixed"))
    lengths = [training.data["train"].lengths[rows] for step in training._steps_of_epoch(0) for rows in step.batches]
    buckets = [Bucket.of(each) for each in lengths]
    packed, total = sum(bucket.tokens for bucket in buckets), sum(each.sum() for each in lengths)
    slots = sum(bucket.texts * bucket.longest for bucket in buckets)
    inside, elsewhere = training.padding_fractions()
    assert elsewhere == pytest.approx(1 - total / packed) and elsewhere > 0
    assert inside == pytest.approx(1 - total / (slots if attention == "sdpa" else packed))


@needs_compiler
@quiet_dynamo
@pytest.mark.parametrize(
    "flags",
    [{}, {"gradient_accumulation_steps": 2}, {"freeze": "1"}],
    ids=str,
)
def test_the_compiled_engine_trains_the_same_and_compiles_once(
    tiny: Callable[..., Path], flags: dict[str, Any]
) -> None:
    """With the same dropout, for all sizes of a batch: the last one is of one text."""
    folder, flags = tiny("BertModel"), {**flags, "dropout": 0.1}
    result = curve(folder, SINGLE, choose(RunConfig(engine="compile", device="cpu")), **flags)
    assert_same_training(result, curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"), **flags))
    regions = result[2].regions
    assert regions is not None and regions.report().endswith(", 0 recompilations")


@needs_compiler
@quiet_dynamo
def test_all_layers_and_sizes_share_one_compilation_a_region(tiny: Callable[..., Path]) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    curve(tiny("BertModel"), SINGLE, choose(RunConfig(engine="compile", device="cpu")), dropout=0.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # a layer's rest, and the head


@needs_compiler
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


def test_no_two_tensors_of_a_checkpoint_share_memory(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The flat optimizer counts its steps once for all parameters; safetensors refuses such a pair."""
    *_, training = curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", "sdpa", "fixed"))
    before = {name: tensor.clone() for name, tensor in resume._tensors(training).items()}
    resume.save_checkpoint(tmp_path / "last", training, {})
    training.optimizer.start_anew()
    resume.load_checkpoint(tmp_path / "last", training, {})
    after = resume._tensors(training)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.startswith("step.") and tensor > 0 for name, tensor in after.items())


def test_half_precision_stays_close_to_fp32(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"))
    result = curve(folder, SINGLE, Hardware(CPU, "bf16", "sdpa", "fixed"))
    np.testing.assert_allclose(result[0][:, 0], expected[0][:, 0], atol=0.1)
    assert {p.dtype for p in result[2].model.parameters()} == {torch.float32}
    assert {p.dtype for p in result[2].fixed.twin.parameters()} == {torch.bfloat16}


def test_a_gradient_that_overflows_changes_nothing_and_lowers_the_scale(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertModel")
    _, before, training = curve(folder, SINGLE, Hardware(CPU, "fp16", "sdpa", "fixed"))
    optimizer = training.fixed.optimizer
    skipped, scale = float(optimizer.skipped), float(optimizer.loss_scale)
    optimizer.grad.fill_(torch.inf)
    optimizer.end_step()
    optimizer.flush()
    assert float(optimizer.skipped) == skipped + 1
    assert float(optimizer.loss_scale) == scale / 2
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_masks_of_two_places_differ() -> None:
    masks = DropoutMasks(1, 0)
    like = torch.empty(())
    drawn = [masks.of_layer(layer).draw((64,), 0.5, like)[0] for layer in range(-1, 3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_signature_of_torchs_flash_attention_stands_still() -> None:
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    names = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask".split()
    assert [argument.name for argument in arguments[:10]] == names
    assert all(argument.has_default_value() for argument in arguments[10:])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"attention": "flash"}, "compute capability"),
        ({"attention": "triton"}, "GPU"),
        ({"engine": "graph"}, "CUDA graphs need"),
    ],
)
def test_what_cannot_run_here_says_why(flags: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose(RunConfig(device="cpu", **flags))


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_our_attention_is_refused_where_its_products_spill(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=f"made for --precision bf16 or fp16, not {precision}; use sdpa"):
        choose(RunConfig(attention="triton", engine="eager", precision=precision))
    assert choose(RunConfig(engine="eager", precision=precision)).attention == "sdpa"


def test_a_kernel_that_does_not_fit_the_model_is_refused_or_replaced() -> None:
    hardware = Hardware(CPU, "bf16", "flash", "eager")
    assert fit_attention(hardware, RunConfig(), 12, 512, 60).attention == "sdpa"
    with pytest.raises(UserError, match="multiple of 8"):
        fit_attention(hardware, RunConfig(attention="flash"), 12, 512, 60)
    with pytest.raises(UserError, match="heads of 32 or 64"):
        fit_attention(replace(hardware, attention="triton"), RunConfig(attention="triton"), 16, 512, 60)


def test_short_texts_take_our_attention_where_kernels_run() -> None:
    graph = Hardware(CPU, "bf16", "flash", "graph", kernels=True)
    chosen = {longest: fit_attention(graph, RunConfig(), 64, 512, longest).attention for longest in (60, 128, 129)}
    assert chosen == {60: "triton", 128: "triton", 129: "flash"}
    assert fit_attention(graph, RunConfig(attention="flash"), 64, 512, 60).attention == "flash"
    assert fit_attention(replace(graph, kernels=False), RunConfig(), 64, 512, 60).attention == "flash"


@pytest.fixture
def gpu_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says what it says on an A100 or later; nothing can be computed there."""
    answers = {"is_available": True, "get_device_capability": (9, 0), "is_bf16_supported": True}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    monkeypatch.setattr(device, "find_spec", lambda name: object())


def test_a_gpu_trains_eagerly_unless_graphs_are_asked_for(gpu_in_name: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert choose(RunConfig()) == Hardware(cuda, "bf16", "flash", "eager")
    graph = Hardware(cuda, "bf16", "flash", "graph", kernels=True)
    assert choose(RunConfig(engine="graph")) == graph
    monkeypatch.setattr(device, "GPU_ENGINE", "graph")
    assert choose(RunConfig()) == graph
    assert choose(RunConfig(kernels=False)).engine == "eager"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_that_works_is_kept(tiny: Callable[..., Path], precision: str) -> None:
    hardware = Hardware(CPU, precision, "triton" if precision == "fp32" else "sdpa", "fixed", kernels=True)
    training = curve(tiny("BertModel"), SINGLE, hardware, dropout=0.2)[2]
    assert training.fixed is not None and training.hardware == hardware


def test_a_wrong_kernel_is_found_before_the_first_step(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` then trains without it, as if nothing had been; asked for by name it is an error."""
    folder, tanh = tiny("BertModel"), partial(F.gelu, approximate="tanh")
    expected = curve(folder, SINGLE, Hardware(CPU, "fp32", "sdpa", "eager"))
    monkeypatch.setattr(gelu, "bias_gelu", lambda x, bias: 1.2 * tanh(x + bias))
    hardware = Hardware(CPU, "fp32", "triton", "fixed", kernels=True)
    result = curve(folder, SINGLE, hardware, engine="auto")
    assert_same_training(result, expected)
    assert (result[2].hardware.engine, result[2].hardware.attention) == ("eager", "sdpa")
    assert "away from plain torch's. Training is eager" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its gradient is .*% away from plain torch's; use eager"):
        curve(folder, SINGLE, hardware)


def test_an_engine_that_fails_is_a_fault_and_no_traceback(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such\ndriver")

    monkeypatch.setattr(gelu, "bias_gelu", fails)
    with pytest.raises(UserError, match="--engine fixed: RuntimeError: no such; use eager"):
        curve(tiny("BertModel"), SINGLE, Hardware(CPU, "fp32", "triton", "fixed", kernels=True))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash", "triton"])
@pytest.mark.parametrize("kernels", [False, True])
def test_graphs_train_as_eager_steps(tiny: Callable[..., Path], attention: str, kernels: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder = tiny("BertModel", hidden_size=64, num_attention_heads=2)
    gpu = torch.device("cuda")
    precision = "bf16" if attention == "flash" else "fp32"
    expected = curve(folder, SINGLE, Hardware(gpu, precision, attention, "fixed"))
    result = curve(folder, SINGLE, Hardware(gpu, precision, attention, "graph", kernels))
    np.testing.assert_allclose(result[0], expected[0], rtol=0.05 if precision == "bf16" else 1e-3)


@pytest.mark.gpu
def test_steps_that_capture_and_steps_that_replay_draw_the_masks_of_eager_ones(tiny: Callable[..., Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder, gpu = tiny("BertModel"), torch.device("cuda")
    expected = curve(folder, SINGLE, Hardware(gpu, "fp32", "sdpa", "fixed"), dropout=0.2)
    result = curve(folder, SINGLE, Hardware(gpu, "fp32", "sdpa", "graph"), dropout=0.2)
    np.testing.assert_allclose(result[0], expected[0], rtol=1e-3)
