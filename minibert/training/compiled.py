"""torch.compile for training steps: what follows attention in a layer, and the head, each compiled once.

Both see rows, T tokens or B texts, of which a batch may have any number; all layers share one compilation. Attention
stays outside: it works on groups of texts whose sizes change with every batch. So do the random bits of dropout, which
makes a step the same as an eager one but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification, Layer
from minibert.model.dropout import DropoutMasks
from minibert.model.packing import PackedInput, Packing
from minibert.runtime.device import TOLERANCE, Hardware

SELF_CHECK_LENGTHS = (16, 16, 12, 12, 9, 9, 5, 5)  # of the texts that regions are compiled and checked with


@contextmanager
def compile_errors(kind: type[Exception] = TorchDynamoException) -> Iterator[None]:
    """What torch.compile throws, as one line."""
    try:
        yield
    except kind as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else "")  # of a C++ compiler
        raise UserError(f"--engine compile: {type(error).__name__}: {reason[:200]}; use eager") from None


class GivenBits(DropoutMasks):
    """Masks from random bits that were drawn before, as compiled code cannot call numpy's generator."""

    def __init__(self, bits: tuple[Tensor, ...]) -> None:
        super().__init__(0, 0)
        self.remaining = list(bits)

    def draw(self, shape: Any, p: float, like: Tensor) -> tuple[Tensor, float]:
        threshold, scale = self.threshold(p)
        return torch.ge(self.remaining.pop(0), threshold).to(like.dtype), scale


def layer_rest(layer: Layer, context: Tensor, residual: Tensor, bits: tuple[Tensor, ...]) -> Tensor:
    return layer.after_attention(context, residual, GivenBits(bits))


def head(model: BertForSequenceClassification, first_tokens: Tensor, bits: tuple[Tensor, ...]) -> Tensor:
    return model.head(first_tokens, GivenBits(bits))


class CompiledRegions:
    """The compiled parts of one model, which it uses wherever it is given dropout masks, that is, in training."""

    errors = staticmethod(compile_errors)

    def __init__(self, model: BertForSequenceClassification) -> None:
        self.compiling = True
        self.seconds = 0.0  # until all was compiled and checked
        self.graphs = 0
        self._layer_rest, self._head = torch.compile(layer_rest), torch.compile(head)
        model.compiled_head = self.head
        for layer in model.encoder.layers:
            assert isinstance(layer, Layer)
            layer.compiled_rest = self.layer_rest

    def layer_rest(self, layer: Layer, context: Tensor, residual: Tensor, masks: DropoutMasks) -> Tensor:
        """`layer.after_attention`, compiled: two [T, H] -> [T, H]"""
        if not residual.requires_grad:  # behind frozen layers; it would be compiled once more for that
            residual = residual.detach().requires_grad_()
        bits = tuple(masks.bits(residual.shape, residual.device) for _ in range(2 if layer.dropout else 0))
        return self._run(self._layer_rest, layer_rest, layer, (context, residual), bits)

    def head(self, model: BertForSequenceClassification, first_tokens: Tensor, masks: DropoutMasks) -> Tensor:
        """`model.head`, compiled: [B, H] -> [B, L]"""
        widths = [first_tokens.shape[1], model.mlp_size] if model.mlp_size else [first_tokens.shape[1]]
        shapes = [(len(first_tokens), width) for width in widths if model.classifier.dropout]
        bits = tuple(masks.bits(shape, first_tokens.device) for shape in shapes)
        return self._run(self._head, head, model, (first_tokens,), bits)

    def _run(
        self,
        compiled: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        module: nn.Module,
        rows: tuple[Tensor, ...],
        bits: tuple[Tensor, ...],
    ) -> Tensor:
        if not self.compiling or len(rows[0]) == 1:  # torch.compile takes a size of 1 for a constant
            return plain(module, *rows, bits)
        for tensor in (*rows, *bits):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(module, *rows, bits)

    def report(self) -> str:
        """How long it took to get ready, and how often torch.compile had to work again since."""
        return f"ready in {self.seconds:.1f} s, {_graphs_compiled() - self.graphs} recompilations"


def compile_regions(model: BertForSequenceClassification, hardware: Hardware, seed: int) -> CompiledRegions:
    """Compile the regions of `model` and check their gradients; UserError where torch.compile fails or is wrong.

    The batch for that is always the same, as compiled code may depend on the sizes it is first asked for: so a
    resumed run computes with the same code as the run that was interrupted.
    """
    started = time.perf_counter()
    regions = CompiledRegions(model)
    with compile_errors(Exception), hardware.computing():
        expected, found = (_gradients(model, regions, hardware, seed, compiling) for compiling in (False, True))
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE[hardware.precision]:  # nor is NaN
        raise UserError(f"--engine compile: its gradient is {difference:.0%} away from plain torch's; use eager")
    regions.graphs, regions.seconds = _graphs_compiled(), time.perf_counter() - started
    return regions


def _gradients(
    model: BertForSequenceClassification, regions: CompiledRegions, hardware: Hardware, seed: int, compiling: bool
) -> Tensor:
    """The gradient of all trained parameters, in one row, for logits that count +1 and -1 in turns."""
    regions.compiling = compiling
    if hardware.device.type == "cuda":
        torch.cuda.manual_seed(seed)  # the bits of dropout come from there
    parameters = [p for p in model.parameters() if p.requires_grad]
    with hardware.autocast():
        logits = model.logits(_self_check_batch(model, hardware), DropoutMasks(seed, 0))
    signs = 1 - 2 * (torch.arange(logits.numel(), device=logits.device) % 2)
    gradients = torch.autograd.grad((logits.flatten() * signs).sum(), parameters, allow_unused=True)
    return torch.cat([g.flatten().float() for g in gradients if g is not None])


def _self_check_batch(model: BertForSequenceClassification, hardware: Hardware) -> PackedInput:
    lengths = np.minimum(SELF_CHECK_LENGTHS, model.config.max_position_embeddings)
    ids = torch.arange(int(lengths.sum())) * 7 % model.encoder.embeddings.word_embeddings.num_embeddings
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    return hardware.place(PackedInput(Packing.from_lengths(lengths), ids, positions))


def _graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])
