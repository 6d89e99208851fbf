"""The operations of the encoder that are not plain matrix products: dropout and attention on packed tokens.

Packed means that the texts of a batch stand one behind another with no padding between them, so every other
operation of the network runs on real tokens only. Attention alone needs to know where one text ends.

Shapes: T tokens in the batch, B texts, S the longest text's tokens, N attention heads, D = H / N, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from minibert_kernels.gradients import SharedGradient

# Texts whose attention is computed at once on the CPU: so many that a score matrix of all heads stays in the cache,
# and of so like length that little is padded. benchmarks/bench_step.py times it beside torch.
CHUNK_AREA = 1 << 18  # texts x S x S
CHUNK_SPREAD = 1.25  # longest over shortest


@dataclass
class Chunk:
    """Texts next to each other whose attention is computed together, padded to the longest of them."""

    rows: slice  # of the packed batch
    num_texts: int  # n
    longest: int  # S
    slots: Tensor | None  # [tokens] each token's place among n x S padded slots; None when nothing is padded
    source: Tensor | None  # [n * S] the chunk's token in each slot (any token in a padded one); None likewise
    key_bias: Tensor | None  # [n, 1, 1, S] 0, or -inf on padding; None likewise

    @classmethod
    def of(cls, lengths: np.ndarray, start: int, longest: int | None = None) -> Chunk:
        """`longest` makes the shapes those of any texts up to that length, some of which may be empty."""
        total = int(lengths.sum())
        rows = slice(start, start + total)
        if longest is None:
            longest = int(lengths.max())
            if len(lengths) * longest == total:
                return cls(rows, len(lengths), longest, None, None, None)
        position = np.arange(longest)
        real = position < lengths[:, None]  # [n, S]
        first = np.cumsum(lengths) - lengths
        source = np.where(real, first[:, None] + position, 0)
        seen = position < np.maximum(lengths, 1)[:, None]  # an empty text has nothing to read, yet softmax needs a key
        bias = np.where(seen, np.float32(0), np.float32(-np.inf))[:, None, None, :]
        tensors = (torch.from_numpy(array) for array in (np.flatnonzero(real), source.reshape(-1), bias))
        return cls(rows, len(lengths), longest, *tensors)

    def to(self, device: torch.device) -> Chunk:
        tensors = (None if t is None else t.to(device, non_blocking=True) for t in self._tensors())
        return Chunk(self.rows, self.num_texts, self.longest, *tensors)

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.slots, self.source, self.key_bias


@dataclass
class Packing:
    """Where each text lies in a packed batch. Made on the host from the lengths, so a step never asks the device."""

    cu_seqlens: Tensor  # [B + 1] int32: text b is rows cu_seqlens[b] to cu_seqlens[b + 1]
    max_seqlen: int  # S
    first_rows: Tensor  # [B] the rows of [CLS]
    kernel: str = "sdpa"  # or flash, triton: what computes the attention
    made_chunks: list[Chunk] | None = None  # empty where a kernel works from cu_seqlens alone

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray) -> Packing:
        """Build on the CPU from the token count of each text; no text may be empty. Best in order of length."""
        counts = np.asarray(lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        cu_seqlens, first_rows = torch.from_numpy(offsets.astype(np.int32)), torch.from_numpy(offsets[:-1].copy())
        return cls(cu_seqlens, int(counts.max()), first_rows)

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each text; only where the batch still lies on the host."""
        return np.diff(self.cu_seqlens.numpy()).astype(np.int64)

    @property
    def chunks(self) -> list[Chunk]:
        """For the padded path: on the host made when first asked for, as a GPU wants others or none."""
        if self.made_chunks is None:
            lengths, offsets = self.lengths, self.cu_seqlens.tolist()
            self.made_chunks = [Chunk.of(lengths[a:b], offsets[a]) for a, b in chunk_bounds(lengths)]
        return self.made_chunks

    @classmethod
    def fixed(cls, lengths: np.ndarray, longest: int, kernel: str) -> Packing:
        """On the CPU, with shapes that depend on the sums alone: texts may be empty, none is over `longest`."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first_rows = np.minimum(offsets[:-1], offsets[-1] - 1)  # an empty text at the end has no row of its own
        chunks = [Chunk.of(lengths, 0, longest)] if kernel == "sdpa" else []
        cu_seqlens = torch.from_numpy(offsets.astype(np.int32))
        return cls(cu_seqlens, longest, torch.from_numpy(first_rows), kernel, chunks)

    def to(self, device: torch.device, kernel: str = "sdpa") -> Packing:
        if device.type == "cpu":
            return replace(self, kernel=kernel)
        chunks = self.made_chunks
        if kernel != "sdpa":
            chunks = []
        elif chunks is None or len(chunks) > 1:
            chunks = [Chunk.of(self.lengths, 0)]  # a GPU wants one large launch
        return Packing(
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.first_rows.to(device, non_blocking=True),
            kernel,
            [chunk.to(device) for chunk in chunks],
        )


def chunk_bounds(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut texts into chunks [start, stop) that keep CHUNK_AREA and CHUNK_SPREAD."""
    bounds, start = [], 0
    shortest = longest = int(lengths[0])
    for i, length in enumerate(lengths.tolist()):
        low, high = min(shortest, length), max(longest, length)
        if ((i + 1 - start) * high * high > CHUNK_AREA and i > start) or high > CHUNK_SPREAD * low + 4:
            bounds.append((start, i))
            start, low, high = i, length, length
        shortest, longest = low, high
    return [*bounds, (start, len(lengths))]


class DropoutMasks:
    """The dropout masks of one training step, a pure function of (seed, step, number of the draw).

    Random bits come in bulk from the counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3"), 16 for each element: several times faster than torch's bernoulli_, which draws one by one.

    `rng`, an int64 tensor [seed, step] on a GPU, is for the kernels of minibert_kernels, which draw the same way and
    never store a mask. `plain` keeps to torch's operations and generator, as torch.compile and a GPU without kernels
    need: then only our attention reads `rng`, where it is asked for.
    """

    LEVELS = 1 << 16
    DRAWS_A_LAYER = 1 << 16  # more than a layer has places with dropout, chunks of attention counted
    MOST_BATCHES = 1 << 10  # of a step, that draw differently; their number stands in the high bits of the seed

    def __init__(self, seed: int, step: int, rng: Tensor | None = None, plain: bool = False, draws: int = 0) -> None:
        self.seed, self.step, self.draws = seed, step, draws
        self.rng, self.plain = rng, plain

    def of_batch(self, number: int) -> DropoutMasks:
        """The masks of one of the batches that a step adds up, each with bits of its own; `self` for the first."""
        if number == 0:
            return self
        rng = self.rng
        if rng is not None:
            rng = rng.clone()
            rng[0] ^= self.bits_of_batch(number)
        return DropoutMasks(self.seed ^ self.bits_of_batch(number), self.step, rng, self.plain)

    @classmethod
    def bits_of_batch(cls, number: int) -> int:
        """The bits of a step's seed to turn for one of its batches; none for the first."""
        return number % cls.MOST_BATCHES << 52

    def of_layer(self, layer: int) -> DropoutMasks:
        """The masks of one layer (-1: the embeddings; behind the last: the head), however often it is computed."""
        return DropoutMasks(self.seed, self.step, self.rng, self.plain, (layer + 1) * self.DRAWS_A_LAYER)

    @property
    def kernels(self) -> bool:
        """Whether layers run as kernels of minibert_kernels."""
        return self.rng is not None and not self.plain

    def next_site(self) -> int:
        """The number of the next place with dropout."""
        self.draws += 1
        return self.draws

    def draw(self, shape: Sequence[int], p: float, like: Tensor) -> tuple[Tensor, float]:
        """Return (mask of 0 and 1 in `like`'s dtype and device, factor that keeps the expectation) for drop rate p."""
        threshold, scale = self.threshold(p)
        if self.plain or like.device.type != "cpu":
            self.next_site()
            mask = torch.rand(tuple(shape), device=like.device).ge_((threshold + self.LEVELS // 2) / self.LEVELS)
            return mask.to(like.dtype), scale
        mask = torch.empty(tuple(shape), dtype=like.dtype)
        return torch.ge(self.bits(shape, like.device), threshold, out=mask), scale

    @classmethod
    def threshold(cls, p: float) -> tuple[int, float]:
        """(the least of the 16-bit numbers that keep an element, factor that keeps the expectation) for drop rate p."""
        dropped = round(p * cls.LEVELS)
        return dropped - cls.LEVELS // 2, cls.LEVELS / (cls.LEVELS - dropped)

    def bits(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """16 random bits for each element of the next place with dropout, as int16."""
        site, count = self.next_site(), math.prod(shape)
        if self.plain or device.type != "cpu":
            half = self.LEVELS // 2
            return torch.empty(tuple(shape), dtype=torch.int16, device=device).random_(-half, half)
        generator = np.random.Philox(key=self.seed, counter=[0, 0, site, self.step])
        return torch.from_numpy(generator.random_raw(-(-count // 4)).view(np.int16)[:count]).view(tuple(shape))


def dropout(x: Tensor, p: float, masks: DropoutMasks | None) -> Tensor:
    """Zero each element with probability p and scale the rest, or do nothing outside training (masks None)."""
    if masks is None or p == 0:
        return x
    mask, scale = masks.draw(x.shape, p, x)
    return x * mask.mul_(scale)


def dropout_add(x: Tensor, residual: Tensor, p: float, masks: DropoutMasks | None) -> Tensor:
    """dropout(x) + residual, in one pass over the data."""
    if masks is None or p == 0:
        return x + residual
    mask, scale = masks.draw(x.shape, p, x)
    return torch.addcmul(residual, x, mask, value=scale)


def shared_gradient(masks: DropoutMasks | None) -> SharedGradient | None:
    """For the kernels, of a tensor that a linear layer reads and that is the residual behind it, too."""
    if masks is None or not masks.kernels:
        return None
    from minibert_kernels.gradients import SharedGradient

    return SharedGradient()


def linear(
    x: Tensor,
    layer: nn.Linear,
    masks: DropoutMasks | None,
    rows: slice | None = None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """layer(x), or some of its outputs; for the kernels in a form that adds weight gradients up in place."""
    if masks is not None and masks.kernels:
        from minibert_kernels.linear import linear as in_place

        return in_place(x, layer.weight, layer.bias, rows, shared)
    return layer(x) if rows is None else F.linear(x, layer.weight[rows], layer.bias[rows])


def linear_dropout_add_norm(
    x: Tensor,
    layer: nn.Linear,
    residual: Tensor,
    norm: nn.LayerNorm,
    p: float,
    masks: DropoutMasks | None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """LayerNorm(dropout(layer(x)) + residual): what stands behind attention and behind the feed-forward network.

    The kernel adds the layer's bias in its own pass, and its gradient to that of the norm.
    """
    if masks is not None and masks.kernels:
        from minibert_kernels.layer_norm import dropout_add_layer_norm
        from minibert_kernels.linear import linear as in_place

        product, site = in_place(x, layer.weight), masks.next_site()
        return dropout_add_layer_norm(
            product,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            linear_bias=layer.bias,
            p=p,
            rng=masks.rng,
            site=site,
            shared=shared,
        )
    return norm(dropout_add(layer(x), residual, p, masks))


def linear_activation(
    x: Tensor,
    layer: nn.Linear,
    activation: Callable[[Tensor], Tensor],
    masks: DropoutMasks | None,
    shared: SharedGradient | None = None,
) -> Tensor:
    """activation(layer(x)); the kernel adds the bias to erf-GELU's own pass, and its gradient to the backward's."""
    if masks is not None and masks.kernels and activation is F.gelu:
        from minibert_kernels.gelu import bias_gelu
        from minibert_kernels.linear import linear as in_place

        return bias_gelu(in_place(x, layer.weight, shared=shared), layer.bias)
    return activation(linear(x, layer, masks, shared=shared))


def attention(qkv: Tensor, packing: Packing, heads: int, p: float, masks: DropoutMasks | None) -> Tensor:
    """Self-attention of packed texts.

    qkv: [T, 3H], queries, keys and values of each token; returns [T, H]. Padding exists only inside `sdpa`, and not
    at all among texts of one length.
    """
    p = p if masks else 0.0
    if packing.kernel == "flash":
        query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)  # each [T, N, D]
        cu, longest = packing.cu_seqlens, packing.max_seqlen
        return flash_attention(query, key, value, cu, cu, longest, longest, p).flatten(1)
    if packing.kernel == "triton":
        return _triton_attention(qkv, packing, heads, p, masks)
    if masks is not None and p > 0 and qkv.device.type == "cpu" and not masks.plain:
        # torch's fused CPU kernel has no dropout, and falls back to a path that is slower than this one.
        return _DropoutAttention.apply(qkv, packing.chunks, heads, p, masks)  # type: ignore[no-untyped-call]
    contexts = [_fused_attention(qkv[chunk.rows], chunk, heads, p) for chunk in packing.chunks]
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int, p: float
) -> Tensor:
    """torch's own varlen flash attention, with dropout, which `torch.nn.attention.varlen` leaves out.

    query [Tq, N, D], key and value [Tk, N, D] in fp16 or bf16 on a GPU -> [Tq, N, D]. A private operator: its first
    ten arguments have are the same in torch 2.11 and 2.14, and a test pins them.
    """
    flash = torch.ops.aten._flash_attention_forward
    return flash(query, key, value, cu_query, cu_key, max_query, max_key, p, False, False)[0]


def _triton_attention(qkv: Tensor, packing: Packing, heads: int, p: float, masks: DropoutMasks | None) -> Tensor:
    from minibert_kernels.attention import varlen_attention

    rng, site = _kernel_dropout(masks)
    split = qkv.view(len(qkv), 3, heads, -1)
    return varlen_attention(split, packing.cu_seqlens, packing.max_seqlen, p=p, rng=rng, site=site).flatten(1)


def _kernel_dropout(masks: DropoutMasks | None) -> tuple[Tensor | None, int]:
    """([seed, step], number of the place) for a kernel; no dropout outside training."""
    return (None, 0) if masks is None else (masks.rng, masks.next_site())


def _fused_attention(qkv: Tensor, chunk: Chunk, heads: int, p: float) -> Tensor:
    """torch's own kernel on the padded texts of a chunk: [tokens, 3H] -> [tokens, H]"""
    padded = _pad(qkv, chunk).view(chunk.num_texts, chunk.longest, 3, heads, -1)
    query, key, value = padded.permute(2, 0, 3, 1, 4)  # each [n, N, S, D]
    bias = None if chunk.key_bias is None else chunk.key_bias.to(qkv.dtype)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=p)
    return _unpad(context.transpose(1, 2).reshape(chunk.num_texts * chunk.longest, -1), chunk)


def first_token_attention(
    query: Tensor, key_value: Tensor, packing: Packing, heads: int, p: float, masks: DropoutMasks | None
) -> Tensor:
    """Attention of each text's first token alone: query [B, H], key_value [T, 2H]; returns [B, H]."""
    if packing.kernel == "flash":
        key, value = key_value.view(len(key_value), 2, heads, -1).unbind(1)  # each [T, N, D]
        each = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)  # every text asks once
        asked = query.view(len(query), heads, -1)
        p = p if masks else 0.0
        return flash_attention(asked, key, value, each, packing.cu_seqlens, 1, packing.max_seqlen, p).flatten(1)
    if packing.kernel == "triton":
        from minibert_kernels import first_token

        rng, site = _kernel_dropout(masks)
        asked, keys_values = query.view(len(query), heads, -1), key_value.view(len(key_value), 2, heads, -1)
        cu = packing.cu_seqlens
        return first_token.first_token_attention(asked, keys_values, cu, p=p, rng=rng, site=site).flatten(1)
    contexts, start = [], 0
    for chunk in packing.chunks:
        of_chunk = query[start : start + chunk.num_texts].view(chunk.num_texts, heads, 1, -1)  # [n, N, 1, D]
        padded = _pad(key_value[chunk.rows], chunk).view(chunk.num_texts, chunk.longest, 2, heads, -1)
        key, value = padded.permute(2, 0, 3, 1, 4)  # each [n, N, S, D]
        scores = (of_chunk * of_chunk.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [n, N, 1, S]
        if chunk.key_bias is not None:
            scores = scores + chunk.key_bias.to(scores.dtype)
        weights = dropout(torch.softmax(scores, -1), p, masks)
        contexts.append((weights @ value).view(chunk.num_texts, -1))
        start += chunk.num_texts
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _pad(x: Tensor, chunk: Chunk) -> Tensor:
    """[tokens, ...] -> [n * S, ...]; a padded slot holds some token's row, which the key bias hides."""
    return x if chunk.slots is None else _Pad.apply(x, chunk.slots, chunk.source)  # type: ignore[no-untyped-call]


def _unpad(x: Tensor, chunk: Chunk) -> Tensor:
    """[n * S, ...] -> [tokens, ...]"""
    return x if chunk.slots is None else _Unpad.apply(x, chunk.slots)  # type: ignore[no-untyped-call]


class _Pad(torch.autograd.Function):
    """Plain row copies both ways: autograd's own backward of indexing adds rows up one by one."""

    @staticmethod
    def forward(ctx, x, slots, source):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        ctx.padded_rows = len(x)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _spread(grad, ctx.saved_tensors[0], ctx.padded_rows), None


def _spread(x: Tensor, slots: Tensor | None, padded_rows: int) -> Tensor:
    """[tokens, ...] -> [padded_rows, ...] with 0 in padded slots."""
    return x if slots is None else x.new_zeros(padded_rows, *x.shape[1:]).index_copy_(0, slots, x)


class _DropoutAttention(torch.autograd.Function):
    """Attention with dropout on the CPU, forward and backward written out, chunk by chunk.

    With weights P, dropped weights M = mask * P and scale c, the output is O = c M V, and the gradient of the scores
    is c M * (dO V') - P * rowsum(dO * O), so the mask itself need not be kept.
    """

    @staticmethod
    def forward(ctx, qkv, chunks, heads, p, masks):  # type: ignore[no-untyped-def]
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        saved = []
        for chunk in chunks:
            packed = qkv[chunk.rows]
            padded = packed if chunk.source is None else packed.index_select(0, chunk.source)
            split = _split_heads(padded, chunk.num_texts, 3, heads)  # [3, n * N, S, D]
            query, key, value = split
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(query.shape[-1] ** -0.5)  # [n * N, S, S]
            if chunk.key_bias is not None:
                scores.view(chunk.num_texts, heads, chunk.longest, chunk.longest).add_(chunk.key_bias)
            weights = torch.softmax(scores, -1)
            mask, scale = masks.draw(weights.shape, p, weights)
            dropped = torch.mul(weights, mask, out=mask)
            output = _join_heads(torch.bmm(dropped, value)[None], chunk.num_texts).mul_(scale)  # [n * S, H]
            context[chunk.rows] = output if chunk.slots is None else output.index_select(0, chunk.slots)
            saved += [split, weights, dropped]
        ctx.save_for_backward(context, *saved)
        ctx.chunks, ctx.heads, ctx.scale = chunks, heads, scale
        return context

    @staticmethod
    def backward(ctx, grad_context):  # type: ignore[no-untyped-def]
        context, *saved = ctx.saved_tensors
        heads = ctx.heads
        row_sums = (grad_context * context).view(len(context), heads, -1).sum(-1)  # [T, N]
        grad_qkv = grad_context.new_empty(len(context), 3 * context.shape[1])
        for i, chunk in enumerate(ctx.chunks):
            split, weights, dropped = saved[3 * i : 3 * i + 3]
            query, key, value = split
            texts, slots = chunk.num_texts, chunk.num_texts * chunk.longest
            grad = _spread(grad_context[chunk.rows], chunk.slots, slots)
            grad = _split_heads(grad, texts, 1, heads)[0] * ctx.scale  # [n * N, S, D]
            sums = _spread(row_sums[chunk.rows], chunk.slots, slots).view(texts, -1, heads)
            sums = sums.transpose(1, 2).reshape(texts * heads, chunk.longest, 1)
            grads = torch.empty_like(split)
            torch.bmm(dropped.transpose(1, 2), grad, out=grads[2])
            grad_scores = torch.bmm(grad, value.transpose(1, 2)).mul_(dropped)
            grad_scores.addcmul_(weights, sums, value=-1).mul_(query.shape[-1] ** -0.5)
            torch.bmm(grad_scores, key, out=grads[0])
            torch.bmm(grad_scores.transpose(1, 2), query, out=grads[1])
            joined = _join_heads(grads, texts)
            grad_qkv[chunk.rows] = joined if chunk.slots is None else joined.index_select(0, chunk.slots)
        return grad_qkv, None, None, None, None


def _split_heads(x: Tensor, texts: int, parts: int, heads: int) -> Tensor:
    """[n * S, parts * H] -> [parts, n * N, S, D]"""
    x = x.view(texts, -1, parts, heads, x.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)
    return x.reshape(parts, texts * heads, *x.shape[3:])


def _join_heads(x: Tensor, texts: int) -> Tensor:
    """[parts, n * N, S, D] -> [n * S, parts * H]"""
    parts, _, longest, _ = x.shape
    x = x.view(parts, texts, -1, longest, x.shape[-1]).permute(1, 3, 0, 2, 4)
    return x.reshape(texts * longest, -1)
