"""What is chosen for a device, and what cannot run there says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.runtime import device
from minibert.runtime.device import Hardware, choose, fit_attention

pytestmark = pytest.mark.usefixtures("references_of_kernels")

CPU = torch.device("cpu")


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
