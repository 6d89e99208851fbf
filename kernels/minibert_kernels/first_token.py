"""Attention of each text's first token alone, which is all that a classifier reads of the last layer.

A program sees one text and one head: it holds one query and loops over blocks of keys, without tensor cores, as there
is but one row of scores. Every row of keys and values belongs to one text, so the backward pass writes each gradient
once, in one launch, with equal bits from run to run. Dropout is drawn again in the backward pass (see philox.py).

Shapes: T tokens, B texts, N heads, D head size (a power of 2 from 16).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minibert_kernels.attention import LOG2_E, load_rows, store_rows
from minibert_kernels.backend import jit, tl, use_triton
from minibert_kernels.philox import LEVELS, drop_threshold, keep_mask, keep_mask_kernel

BLOCK = 32  # keys at once
WARPS = 2


@jit()
def _load_row(pointer, HEAD_SIZE: tl.constexpr):
    return tl.load(pointer + tl.arange(0, HEAD_SIZE)).to(tl.float32)


@jit()
def _keep(rng_ptr, site, row, first_key, BLOCK_K: tl.constexpr, DROPPED: tl.constexpr):
    """Dropout mask [BLOCK_K] of one text and head."""
    return tl.reshape(
        keep_mask_kernel(rng_ptr, site, row + tl.arange(0, 1), first_key // 8, BLOCK_K, DROPPED), [BLOCK_K]
    )


@jit(do_not_specialize=("site",))
def forward_kernel(
    query_ptr,  # [B, N, D]
    key_value_ptr,  # [T, 2, N, D]
    cu_seqlens_ptr,  # [B + 1] int32
    out_ptr,  # [B, N, D]
    softmax_ptr,  # [B, N, 2] fp32: the highest score in base 2, and the denominator of the softmax below it
    rng_ptr,  # [2] int64, or None without dropout
    site,
    scale,  # of the scores, times log2(e)
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPPED: tl.constexpr,
):
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * HEAD_SIZE
    row = tl.program_id(0) * HEADS + head
    base = key_value_ptr + start.to(tl.int64) * 2 * width + head * HEAD_SIZE
    query = _load_row(query_ptr + row.to(tl.int64) * HEAD_SIZE, HEAD_SIZE)
    highest = tl.full([], float("-inf"), tl.float32)
    denominator = tl.zeros([], tl.float32)
    context = tl.zeros([HEAD_SIZE], tl.float32)
    for first_key in range(0, length, BLOCK_K):
        keys = first_key + tl.arange(0, BLOCK_K)
        key = load_rows(base, keys, length, 2 * width, HEAD_SIZE, True)
        value = load_rows(base + width, keys, length, 2 * width, HEAD_SIZE, True)
        scores = tl.where(keys < length, tl.sum(key * query[None, :], axis=1) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=0))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest)
        denominator = denominator * shrink + tl.sum(weights, axis=0)
        if DROPPED > 0:
            keep = _keep(rng_ptr, site, row, first_key, BLOCK_K, DROPPED)
            weights = tl.where(keep, weights, 0.0)
        context = context * shrink + tl.sum(weights[:, None] * value, axis=0)
        highest = new_highest
    denominator = tl.where(length > 0, denominator, 1.0)  # a text that only fills up has no keys, and 0 as its context
    context = context * ((65536.0 / (65536 - DROPPED)) / denominator)
    tl.store(out_ptr + row.to(tl.int64) * HEAD_SIZE + tl.arange(0, HEAD_SIZE), context.to(out_ptr.dtype.element_ty))
    tl.store(softmax_ptr + 2 * row, highest)
    tl.store(softmax_ptr + 2 * row + 1, denominator)


@jit(do_not_specialize=("site",))
def backward_kernel(
    grad_out_ptr,  # [B, N, D]
    query_ptr,
    key_value_ptr,
    cu_seqlens_ptr,
    out_ptr,
    softmax_ptr,
    grad_query_ptr,  # [B, N, D]
    grad_key_value_ptr,  # [T, 2, N, D]
    rng_ptr,
    site,
    scale,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPPED: tl.constexpr,
):
    start = tl.load(cu_seqlens_ptr + tl.program_id(0))
    length = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1) - start
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * HEAD_SIZE
    row = tl.program_id(0) * HEADS + head
    offset = start.to(tl.int64) * 2 * width + head * HEAD_SIZE
    of_query = row.to(tl.int64) * HEAD_SIZE
    query = _load_row(query_ptr + of_query, HEAD_SIZE)
    grad_out = _load_row(grad_out_ptr + of_query, HEAD_SIZE)
    delta = tl.sum(grad_out * _load_row(out_ptr + of_query, HEAD_SIZE), axis=0)
    highest, denominator = tl.load(softmax_ptr + 2 * row), tl.load(softmax_ptr + 2 * row + 1)
    grad_query = tl.zeros([HEAD_SIZE], tl.float32)
    for first_key in range(0, length, BLOCK_K):
        keys = first_key + tl.arange(0, BLOCK_K)
        key = load_rows(key_value_ptr + offset, keys, length, 2 * width, HEAD_SIZE, True)
        value = load_rows(key_value_ptr + offset + width, keys, length, 2 * width, HEAD_SIZE, True)
        scores = tl.where(keys < length, tl.sum(key * query[None, :], axis=1) * scale, float("-inf"))
        weights = tl.exp2(scores - highest) / denominator
        dropped = weights
        grad_weights = tl.sum(value * grad_out[None, :], axis=1)
        if DROPPED > 0:
            keep = _keep(rng_ptr, site, row, first_key, BLOCK_K, DROPPED)
            dropped = tl.where(keep, weights * (65536.0 / (65536 - DROPPED)), 0.0)
            grad_weights = tl.where(keep, grad_weights * (65536.0 / (65536 - DROPPED)), 0.0)
        grad_scores = weights * (grad_weights - delta) * (scale / 1.4426950408889634)
        grad_query += tl.sum(grad_scores[:, None] * key, axis=0)
        grad_key = grad_scores[:, None] * query[None, :]
        grad_value = dropped[:, None] * grad_out[None, :]
        store_rows(grad_key_value_ptr + offset, grad_key, keys, length, 2 * width, HEAD_SIZE)
        store_rows(grad_key_value_ptr + offset + width, grad_value, keys, length, 2 * width, HEAD_SIZE)
    tl.store(grad_query_ptr + of_query + tl.arange(0, HEAD_SIZE), grad_query.to(grad_query_ptr.dtype.element_ty))


class FirstTokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key_value, cu_seqlens, p, rng, site):
        query, key_value = query.contiguous(), key_value.contiguous()
        texts, heads, head_size = query.shape
        dropped = drop_threshold(p) if rng is not None else 0
        out = torch.empty_like(query)
        softmax = torch.empty(texts, heads, 2, dtype=torch.float32, device=query.device)
        scale = head_size**-0.5 * LOG2_E
        forward_kernel[(texts, heads)](
            *(query, key_value, cu_seqlens, out, softmax, rng, site, scale, heads, head_size, BLOCK, dropped),
            num_warps=WARPS,
        )
        ctx.save_for_backward(query, key_value, cu_seqlens, out, softmax, rng)
        ctx.site, ctx.scale, ctx.dropped = site, scale, dropped
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key_value, cu_seqlens, out, softmax, rng = ctx.saved_tensors
        texts, heads, head_size = query.shape
        grad_query, grad_key_value = torch.empty_like(query), torch.empty_like(key_value)
        backward_kernel[(texts, heads)](
            *(grad_out.contiguous(), query, key_value, cu_seqlens, out, softmax, grad_query, grad_key_value, rng),
            *(ctx.site, ctx.scale, heads, head_size, BLOCK, ctx.dropped),
            num_warps=WARPS,
        )
        return grad_query, grad_key_value, None, None, None, None


def first_token_attention(
    query: Tensor, key_value: Tensor, cu_seqlens: Tensor, *, p: float = 0.0, rng: Tensor | None = None, site: int = 0
) -> Tensor:
    """[B, N, D] queries, one a text, and [T, 2, N, D] keys and values -> [B, N, D]; 0 for a text without tokens.

    cu_seqlens: [B + 1] int32 on the device, from 0 to T: text b is rows cu_seqlens[b] to cu_seqlens[b + 1].
    """
    if use_triton(query):
        return FirstTokenAttention.apply(query, key_value, cu_seqlens, p, rng, site)
    return first_token_attention_reference(query, key_value, cu_seqlens, p=p, rng=rng, site=site)


def first_token_attention_reference(
    query: Tensor, key_value: Tensor, cu_seqlens: Tensor, *, p: float = 0.0, rng: Tensor | None = None, site: int = 0
) -> Tensor:
    """`first_token_attention` in plain torch, text by text."""
    heads, head_size = query.shape[1:]
    dropped = drop_threshold(p) if rng is not None else 0
    contexts = [query[:0]]
    for text, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        key, value = key_value[start:stop].permute(1, 2, 0, 3)  # each [N, S, D]
        scores = query[text][:, None] @ key.transpose(1, 2) * head_size**-0.5  # [N, 1, S]
        weights = torch.softmax(scores, -1)
        if rng is not None and dropped:
            rows = text * heads + torch.arange(heads, device=query.device)
            keep = keep_mask(rng, site, rows, stop - start, p)[:, None]
            weights = torch.where(keep, weights * (LEVELS / (LEVELS - dropped)), 0)
        contexts.append((weights @ value).transpose(0, 1))  # [1, N, D]
    return torch.cat(contexts)
