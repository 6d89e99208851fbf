"""Self-attention of packed texts, straight from the fused QKV projection and back into its gradient.

Texts lie one behind another without padding; `cu_seqlens` says where each begins. A program sees one text and one head
(and, in longer texts, one block of queries), so nothing is padded in memory and nothing is added up by atomics: results
have equal bits from run to run. Attention dropout is drawn again in the backward pass (see philox.py).

Texts of at most 128 tokens have all their keys on chip: the backward pass is one launch that needs neither the output
nor any statistics of the forward pass. Longer texts loop over blocks of keys (Dao et al. 2022, "FlashAttention"): the
forward pass keeps the log of each softmax's denominator, the backward pass takes a launch by queries and one by keys.

Rows at or past cu_seqlens[-1] are not written: a batch filled up to a fixed size gives the filling texts of its own.

In fp32 the products do without tensor cores ("ieee") and spill registers, up to 9 kB a thread: for checks, and training
does not offer it. Three products of tf32 parts each ("tf32x3") are no way out. Emulated with sums cut off after each
instruction, as tensor cores may cut them, errors of texts of 256 to 512 tokens are up to 3.5 times what the rule of
tests/kernel_cases.py allows (0.7 times with sums rounded to nearest); compiled for sm_90 the kernels still spill up to
848 bytes a thread, and the backward pass of 128 tokens with heads of 64 wants 240 kB of shared memory of 227.

Shapes: T tokens, B texts, N heads, D head size (32 or 64, or another power of 2 from 16).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minibert_kernels.backend import INTERPRET, cdiv, jit, tl, use_triton
from minibert_kernels.philox import LEVELS, drop_threshold, keep_mask, keep_mask_kernel

ON_CHIP = 128  # longest text whose keys all stay on chip
LOG2_E = 1.4426950408889634


@jit()
def load_rows(pointer, rows, length, stride, HEAD_SIZE: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, D] of a text, 0 past its end."""
    places = rows.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_SIZE)[None, :]
    tile = tl.load(pointer + places, mask=(rows < length)[:, None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@jit()
def store_rows(pointer, tile, rows, length, stride, HEAD_SIZE: tl.constexpr):
    places = rows.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_SIZE)[None, :]
    tl.store(pointer + places, tile.to(pointer.dtype.element_ty), mask=(rows < length)[:, None])


@jit()
def _scores(query, key, keys, length, scale):
    """Scores in base 2, -inf past the text's end."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    return tl.where((keys < length)[None, :], scores, float("-inf"))


@jit()
def _keep(
    rng_ptr, site, start, queries, head, first_key, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, DROPPED: tl.constexpr
):
    """Dropout mask [queries, BLOCK_K]: its row is token x heads + head, its column the key's place in the text."""
    return keep_mask_kernel(rng_ptr, site, (start + queries) * HEADS + head, first_key // 8, BLOCK_K, DROPPED)


@jit(do_not_specialize=("site", "num_tokens"))
def forward_kernel(
    qkv_ptr,  # [T, 3, N, D]
    cu_seqlens_ptr,  # [B + 1] int32
    out_ptr,  # [T, N, D]
    lse_ptr,  # [N, T] fp32, log2 of the softmax's denominator; None for short texts
    rng_ptr,  # [2] int64, or None without dropout
    site,
    num_tokens,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A program: one text, one head, BLOCK_Q queries; loops over the keys with the softmax renormalised on the way."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    first_query = tl.program_id(2) * BLOCK_Q
    if first_query < length:
        width: tl.constexpr = HEADS * HEAD_SIZE
        base = qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
        queries = first_query + tl.arange(0, BLOCK_Q)
        query = load_rows(base, queries, length, 3 * width, HEAD_SIZE, UPCAST)
        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        denominator = tl.zeros([BLOCK_Q], tl.float32)
        context = tl.zeros([BLOCK_Q, HEAD_SIZE], tl.float32)
        for first_key in range(0, length, BLOCK_K):
            keys = first_key + tl.arange(0, BLOCK_K)
            key = load_rows(base + width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
            value = load_rows(base + 2 * width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
            scores = _scores(query, key, keys, length, scale)
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            shrink = tl.exp2(highest - new_highest)
            weights = tl.exp2(scores - new_highest[:, None])
            denominator = denominator * shrink + tl.sum(weights, axis=1)
            if DROPPED > 0:
                keep = _keep(rng_ptr, site, start, queries, head, first_key, HEADS, BLOCK_K, DROPPED)
                weights = tl.where(keep, weights, 0.0)
            context = context * shrink[:, None]
            context += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            highest = new_highest
        context = context * ((65536.0 / (65536 - DROPPED)) / denominator)[:, None]
        store_rows(out_ptr + start.to(tl.int64) * width + head * HEAD_SIZE, context, queries, length, width, HEAD_SIZE)
        if lse_ptr is not None:
            lse = highest + tl.log2(denominator)
            tl.store(lse_ptr + head.to(tl.int64) * num_tokens + start + queries, lse, mask=queries < length)


@jit(do_not_specialize=("site",))
def short_backward_kernel(
    grad_out_ptr,  # [T, N, D]
    qkv_ptr,  # [T, 3, N, D]
    cu_seqlens_ptr,  # [B + 1] int32
    grad_qkv_ptr,  # [T, 3, N, D]
    rng_ptr,
    site,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A program: one text of at most BLOCK tokens, one head; queries in blocks of BLOCK_Q."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * HEAD_SIZE
    base = qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
    grad_base = grad_qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
    grad_out_base = grad_out_ptr + start.to(tl.int64) * width + head * HEAD_SIZE
    keys = tl.arange(0, BLOCK)
    key = load_rows(base + width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
    value = load_rows(base + 2 * width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
    grad_key = tl.zeros([BLOCK, HEAD_SIZE], tl.float32)
    grad_value = tl.zeros([BLOCK, HEAD_SIZE], tl.float32)
    for first_query in range(0, length, BLOCK_Q):
        queries = first_query + tl.arange(0, BLOCK_Q)
        query = load_rows(base, queries, length, 3 * width, HEAD_SIZE, UPCAST)
        grad_out = load_rows(grad_out_base, queries, length, width, HEAD_SIZE, UPCAST)
        scores = _scores(query, key, keys, length, scale)
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
        dropped = weights
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        if DROPPED > 0:
            keep = _keep(rng_ptr, site, start, queries, head, 0, HEADS, BLOCK, DROPPED)
            dropped = tl.where(keep, weights * (65536.0 / (65536 - DROPPED)), 0.0)
            grad_weights = tl.where(keep, grad_weights * (65536.0 / (65536 - DROPPED)), 0.0)
        grad_value += tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision="ieee")
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None])
        grad_scores = grad_scores.to(query.dtype)
        grad_query = tl.dot(grad_scores, key, input_precision="ieee") * (scale / 1.4426950408889634)
        store_rows(grad_base, grad_query, queries, length, 3 * width, HEAD_SIZE)
        grad_key += tl.dot(tl.trans(grad_scores), query, input_precision="ieee")
    grad_key = grad_key * (scale / 1.4426950408889634)
    store_rows(grad_base + width, grad_key, keys, length, 3 * width, HEAD_SIZE)
    store_rows(grad_base + 2 * width, grad_value, keys, length, 3 * width, HEAD_SIZE)


@jit(do_not_specialize=("site", "num_tokens"))
def query_backward_kernel(
    grad_out_ptr,
    out_ptr,
    qkv_ptr,
    cu_seqlens_ptr,
    lse_ptr,
    delta_ptr,  # [N, T] fp32: rowsum(grad_out * out), written here for the pass over keys
    grad_qkv_ptr,
    rng_ptr,
    site,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A program: the gradient of BLOCK_Q queries of one text and head."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    first_query = tl.program_id(2) * BLOCK_Q
    if first_query < length:
        width: tl.constexpr = HEADS * HEAD_SIZE
        base = qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
        grad_base = grad_qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
        out_offset = start.to(tl.int64) * width + head * HEAD_SIZE
        row_offset = head.to(tl.int64) * num_tokens + start
        queries = first_query + tl.arange(0, BLOCK_Q)
        query = load_rows(base, queries, length, 3 * width, HEAD_SIZE, UPCAST)
        grad_out = load_rows(grad_out_ptr + out_offset, queries, length, width, HEAD_SIZE, UPCAST)
        out = load_rows(out_ptr + out_offset, queries, length, width, HEAD_SIZE, UPCAST)
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
        tl.store(delta_ptr + row_offset + queries, delta, mask=queries < length)
        lse = tl.load(lse_ptr + row_offset + queries, mask=queries < length, other=0.0)
        grad_query = tl.zeros([BLOCK_Q, HEAD_SIZE], tl.float32)
        for first_key in range(0, length, BLOCK_K):
            keys = first_key + tl.arange(0, BLOCK_K)
            key = load_rows(base + width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
            value = load_rows(base + 2 * width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
            weights = tl.exp2(_scores(query, key, keys, length, scale) - lse[:, None])
            grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
            if DROPPED > 0:
                keep = _keep(rng_ptr, site, start, queries, head, first_key, HEADS, BLOCK_K, DROPPED)
                grad_weights = tl.where(keep, grad_weights * (65536.0 / (65536 - DROPPED)), 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            grad_query += tl.dot(grad_scores.to(key.dtype), key, input_precision="ieee")
        grad_query = grad_query * (scale / 1.4426950408889634)
        store_rows(grad_base, grad_query, queries, length, 3 * width, HEAD_SIZE)


@jit(do_not_specialize=("site", "num_tokens"))
def key_backward_kernel(
    grad_out_ptr,
    qkv_ptr,
    cu_seqlens_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    rng_ptr,
    site,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A program: the gradients of BLOCK_K keys and values of one text and head."""
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    first_key = tl.program_id(2) * BLOCK_K
    if first_key < length:
        width: tl.constexpr = HEADS * HEAD_SIZE
        base = qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
        grad_base = grad_qkv_ptr + start.to(tl.int64) * 3 * width + head * HEAD_SIZE
        grad_out_base = grad_out_ptr + start.to(tl.int64) * width + head * HEAD_SIZE
        row_offset = head.to(tl.int64) * num_tokens + start
        keys = first_key + tl.arange(0, BLOCK_K)
        key = load_rows(base + width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
        value = load_rows(base + 2 * width, keys, length, 3 * width, HEAD_SIZE, UPCAST)
        grad_key = tl.zeros([BLOCK_K, HEAD_SIZE], tl.float32)
        grad_value = tl.zeros([BLOCK_K, HEAD_SIZE], tl.float32)
        for first_query in range(0, length, BLOCK_Q):
            queries = first_query + tl.arange(0, BLOCK_Q)
            query = load_rows(base, queries, length, 3 * width, HEAD_SIZE, UPCAST)
            grad_out = load_rows(grad_out_base, queries, length, width, HEAD_SIZE, UPCAST)
            lse = tl.load(lse_ptr + row_offset + queries, mask=queries < length, other=0.0)
            delta = tl.load(delta_ptr + row_offset + queries, mask=queries < length, other=0.0)
            weights = tl.exp2(_scores(query, key, keys, length, scale) - lse[:, None])
            dropped = weights
            grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
            if DROPPED > 0:
                keep = _keep(rng_ptr, site, start, queries, head, first_key, HEADS, BLOCK_K, DROPPED)
                dropped = tl.where(keep, weights * (65536.0 / (65536 - DROPPED)), 0.0)
                grad_weights = tl.where(keep, grad_weights * (65536.0 / (65536 - DROPPED)), 0.0)
            grad_value += tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, input_precision="ieee")
            grad_scores = (weights * (grad_weights - delta[:, None])).to(query.dtype)
            grad_key += tl.dot(tl.trans(grad_scores), query, input_precision="ieee")
        grad_key = grad_key * (scale / 1.4426950408889634)
        store_rows(grad_base + width, grad_key, keys, length, 3 * width, HEAD_SIZE)
        store_rows(grad_base + 2 * width, grad_value, keys, length, 3 * width, HEAD_SIZE)


def short_blocks(max_seqlen: int) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK_K, warps) of the forward pass for texts of at most ON_CHIP tokens."""
    if max_seqlen <= 32:
        return 32, 32, 2
    return (64, 64, 4) if max_seqlen <= 64 else (64, 128, 8)


def short_backward_blocks(max_seqlen: int, head_size: int) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK, warps) of the backward pass: the largest that keep to registers (see compile.py)."""
    block_q, block, warps = short_blocks(max_seqlen)
    if block == 128:
        block_q = 16 if head_size < 64 else 32
    return block_q, block, warps


LONG_BLOCKS = (64, 64, 4)  # (BLOCK_Q, BLOCK_K, warps)
STAGES, LONG_STAGES = 1, 3  # of the software pipeline: none where the loop is short or registers are


class VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, p, rng, site):
        qkv = qkv.contiguous()
        num_tokens, _, heads, head_size = qkv.shape
        dropped = drop_threshold(p) if rng is not None else 0
        out = torch.empty(num_tokens, heads, head_size, dtype=qkv.dtype, device=qkv.device)
        short = max_seqlen <= ON_CHIP
        block_q, block_k, warps = short_blocks(max_seqlen) if short else LONG_BLOCKS
        lse = None if short else torch.empty(heads, num_tokens, dtype=torch.float32, device=qkv.device)
        scale = head_size**-0.5 * LOG2_E
        forward_kernel[(len(cu_seqlens) - 1, heads, cdiv(max_seqlen, block_q))](
            *(qkv, cu_seqlens, out, lse, rng, site, num_tokens, scale),
            *(heads, head_size, block_q, block_k, dropped, INTERPRET),
            num_warps=warps,
            num_stages=STAGES if short else LONG_STAGES,
        )
        ctx.save_for_backward(qkv, cu_seqlens, None if short else out, lse, rng)
        ctx.max_seqlen, ctx.site, ctx.scale, ctx.dropped = max_seqlen, site, scale, dropped
        return out

    @staticmethod
    def backward(ctx, grad_out):
        qkv, cu_seqlens, out, lse, rng = ctx.saved_tensors
        num_tokens, _, heads, head_size = qkv.shape
        texts, site, scale = len(cu_seqlens) - 1, ctx.site, ctx.scale
        grad_out, grad_qkv = grad_out.contiguous(), torch.empty_like(qkv)
        if lse is None:
            block_q, block, warps = short_backward_blocks(ctx.max_seqlen, head_size)
            short_backward_kernel[(texts, heads)](
                *(grad_out, qkv, cu_seqlens, grad_qkv, rng, site, scale),
                *(heads, head_size, block_q, block, ctx.dropped, INTERPRET),
                num_warps=warps,
                num_stages=STAGES,
            )
            return grad_qkv, None, None, None, None, None
        block_q, block_k, warps = LONG_BLOCKS
        delta = torch.empty_like(lse)
        sizes = (heads, head_size, block_q, block_k, ctx.dropped, INTERPRET)
        query_backward_kernel[(texts, heads, cdiv(ctx.max_seqlen, block_q))](
            *(grad_out, out, qkv, cu_seqlens, lse, delta, grad_qkv, rng, site, num_tokens, scale, *sizes),
            num_warps=warps,
            num_stages=LONG_STAGES,
        )
        key_backward_kernel[(texts, heads, cdiv(ctx.max_seqlen, block_k))](
            *(grad_out, qkv, cu_seqlens, lse, delta, grad_qkv, rng, site, num_tokens, scale, *sizes),
            num_warps=warps,
            num_stages=STAGES,
        )
        return grad_qkv, None, None, None, None, None


def varlen_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, p: float = 0.0, rng: Tensor | None = None, site: int = 0
) -> Tensor:
    """[T, 3, N, D] queries, keys and values -> [T, N, D]; no text may be longer than `max_seqlen`.

    cu_seqlens: [B + 1] int32 on the device, text b is rows cu_seqlens[b] to cu_seqlens[b + 1]; empty texts are fine.
    """
    if use_triton(qkv):
        return VarlenAttention.apply(qkv, cu_seqlens, max_seqlen, p, rng, site)
    return varlen_attention_reference(qkv, cu_seqlens, max_seqlen, p=p, rng=rng, site=site)


def varlen_attention_reference(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, p: float = 0.0, rng: Tensor | None = None, site: int = 0
) -> Tensor:
    """`varlen_attention` in plain torch, text by text."""
    heads, head_size = qkv.shape[2:]
    dropped = drop_threshold(p) if rng is not None else 0
    bounds = cu_seqlens.tolist()
    contexts = [qkv.new_zeros(0, heads, head_size)]
    for start, stop in pairwise(bounds):
        query, key, value = qkv[start:stop].permute(1, 2, 0, 3)  # each [N, S, D]
        weights = torch.softmax(query @ key.transpose(1, 2) * head_size**-0.5, -1)
        if rng is not None and dropped:
            tokens = torch.arange(start, stop, device=qkv.device)
            rows = tokens[None, :] * heads + torch.arange(heads, device=qkv.device)[:, None]  # [N, S]
            keep = keep_mask(rng, site, rows.flatten(), stop - start, p).view(weights.shape)
            weights = torch.where(keep, weights * (LEVELS / (LEVELS - dropped)), 0)
        contexts.append((weights @ value).transpose(0, 1))
    return torch.cat(contexts)
