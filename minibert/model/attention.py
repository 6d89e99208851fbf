"""Attention of packed texts, by the kernel that their packing names; padding exists in here alone, if at all.

Shapes: T tokens in the batch, B texts, S the longest text's tokens, N attention heads, D = H / N, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.model.dropout import DropoutMasks, dropout
from minibert.model.packing import Chunk, Packing


def self_attention(qkv: Tensor, packing: Packing, heads: int, p: float, masks: DropoutMasks | None) -> Tensor:
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
        half = qkv.dtype == torch.bfloat16  # whose softmax is taken in fp32, as autocast does on a GPU
        saved = []
        for chunk in chunks:
            packed = qkv[chunk.rows]
            padded = packed if chunk.source is None else packed.index_select(0, chunk.source)
            split = _split_heads(padded, chunk.num_texts, 3, heads)  # [3, n * N, S, D]
            query, key, value = split
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(query.shape[-1] ** -0.5)  # [n * N, S, S]
            if chunk.key_bias is not None:
                scores.view(chunk.num_texts, heads, chunk.longest, chunk.longest).add_(chunk.key_bias)
            weights = torch.softmax(scores, -1, dtype=torch.float32 if half else None).to(scores.dtype)
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
