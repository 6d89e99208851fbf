"""Dropout and attention against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minibert.model import packing as packing_module
from minibert.model.attention import first_token_attention, self_attention
from minibert.model.dropout import DropoutMasks, dropout, dropout_add
from minibert.model.packing import Packing

HEADS, SIZE = 4, 8
LENGTHS = [[5], [5, 5, 5], [1, 2, 3, 9, 9, 10, 31], [7, 1, 30, 2], [40] * 3 + [41] * 2 + [64]]


def plain_attention(qkv: Tensor, lengths: list[int], keep: list[Tensor] | None = None) -> Tensor:
    """One text at a time, no packing, no padding: the definition."""
    outputs = []
    for i, rows in enumerate(qkv.split(lengths)):
        query, key, value = rows.view(len(rows), 3, HEADS, SIZE).permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.transpose(-1, -2) / SIZE**0.5, -1)
        if keep is not None:
            weights = weights * keep[i]
        outputs.append((weights @ value).transpose(0, 1).reshape(len(rows), HEADS * SIZE))
    return torch.cat(outputs)


def drawn_masks(lengths: list[int], p: float) -> list[Tensor]:
    """The masks that the attention of this packing will draw, scale included, text by text."""
    masks, result = DropoutMasks(9, 4), []
    for chunk in Packing.from_lengths(lengths).chunks:
        shape = (chunk.num_texts * HEADS, chunk.longest, chunk.longest)
        mask, scale = masks.draw(shape, p, torch.empty(0))
        texts = mask.view(chunk.num_texts, HEADS, chunk.longest, chunk.longest) * scale
        for text in texts:
            length = lengths[len(result)]
            result.append(text[:, :length, :length])
    return result


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["fused", "dropout"])
def test_attention_equals_plain_torch_forward_and_backward(lengths: list[int], p: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * HEADS * SIZE, requires_grad=True)
    reference = qkv.detach().clone().requires_grad_()
    upstream = torch.randn(sum(lengths), HEADS * SIZE)
    masks = DropoutMasks(9, 4) if p else None
    ours = self_attention(qkv, Packing.from_lengths(lengths), HEADS, p, masks)
    theirs = plain_attention(reference, lengths, drawn_masks(lengths, p) if p else None)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert torch.allclose(ours, theirs, atol=2e-6)
    assert qkv.grad is not None and reference.grad is not None
    assert torch.allclose(qkv.grad, reference.grad, atol=5e-6)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_first_token_attention_is_the_first_rows_of_attention(lengths: list[int]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * HEADS * SIZE)
    packing = Packing.from_lengths(lengths)
    hidden = HEADS * SIZE
    ours = first_token_attention(qkv[packing.first_rows, :hidden], qkv[:, hidden:], packing, HEADS, 0.0, None)
    assert torch.allclose(ours, self_attention(qkv, packing, HEADS, 0.0, None)[packing.first_rows], atol=2e-6)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_chunks_cover_every_token_once_and_hide_padding(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths)
    assert packing.cu_seqlens.tolist() == [0, *np.cumsum(lengths)] and packing.max_seqlen == max(lengths)
    covered = [row for chunk in packing.chunks for row in range(chunk.rows.start, chunk.rows.stop)]
    assert covered == list(range(sum(lengths)))
    assert sum(chunk.num_texts for chunk in packing.chunks) == len(lengths)
    for chunk in packing.chunks:
        tokens = chunk.rows.stop - chunk.rows.start
        if chunk.slots is None:
            assert tokens == chunk.num_texts * chunk.longest
        else:
            assert chunk.source is not None and chunk.key_bias is not None
            assert chunk.source[chunk.slots].tolist() == list(range(tokens))
            assert int((chunk.key_bias == 0).sum()) == tokens


def test_long_texts_are_cut_into_chunks_that_stay_small() -> None:
    chunks = Packing.from_lengths([512] * 8).chunks
    assert len(chunks) > 1
    assert all(chunk.num_texts * 512**2 <= max(packing_module.CHUNK_AREA, 512**2) for chunk in chunks)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.013])
def test_dropout_keeps_the_expectation(p: float) -> None:
    x = torch.ones(1000, 1000)
    out = dropout(x, p, DropoutMasks(1, 0))
    kept = float((out > 0).float().mean())
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / DropoutMasks.LEVELS
    assert abs(float(out.mean()) - 1) < 0.002
    assert len(out.unique()) == 2


def test_masks_depend_on_seed_step_and_draw_alone() -> None:
    x = torch.ones(64, 64)
    first = dropout(x, 0.1, DropoutMasks(3, 5))
    assert torch.equal(first, dropout(x, 0.1, DropoutMasks(3, 5)))
    assert not torch.equal(first, dropout(x, 0.1, DropoutMasks(3, 6)))
    assert not torch.equal(first, dropout(x, 0.1, DropoutMasks(4, 5)))
    masks = DropoutMasks(3, 5)
    assert not torch.equal(dropout(x, 0.1, masks), dropout(x, 0.1, masks))


def test_each_batch_of_a_step_draws_masks_of_its_own() -> None:
    x = torch.ones(64, 64)

    def dropped(number: int) -> torch.Tensor:
        masks = DropoutMasks(3, 5, torch.tensor([3, 5])).of_batch(number)
        assert masks.rng is not None and masks.rng.tolist() == [masks.seed, 5]
        return dropout(x, 0.1, masks.of_layer(0))

    assert torch.equal(dropped(0), dropout(x, 0.1, DropoutMasks(3, 5).of_layer(0)))
    assert not torch.equal(dropped(0), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    assert DropoutMasks((1 << 63) - 1, 5).of_batch(DropoutMasks.MOST_BATCHES - 1).seed < 1 << 63


def test_mask_elements_are_independent() -> None:
    mask, _ = DropoutMasks(0, 0).draw((1 << 20,), 0.5, torch.empty(0))
    centred = mask - 0.5
    for lag in (1, 2, 3, 4, 7, 64, 384):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 0.0015


def test_dropout_add_equals_its_parts() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(50, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    out = dropout_add(x, residual, 0.2, DropoutMasks(7, 1))
    mask, scale = DropoutMasks(7, 1).draw(x.shape, 0.2, x)
    assert torch.allclose(out, residual + x * mask * scale, atol=1e-6)
    out.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, mask * scale)
    assert torch.equal(dropout_add(x, residual, 0.2, None), x + residual)


def test_dropout_attention_passes_gradcheck() -> None:
    lengths = [3, 4, 4]
    qkv = torch.randn(sum(lengths), 3 * HEADS * 2, dtype=torch.float64, requires_grad=True)
    packing = Packing.from_lengths(lengths)
    assert torch.autograd.gradcheck(lambda x: self_attention(x, packing, HEADS, 0.3, DropoutMasks(1, 1)), (qkv,))


def test_attention_with_dropout_matches_torch_in_the_mean() -> None:
    """Averaged over many masks the output is the output without dropout, as with torch's own dropout."""
    torch.manual_seed(0)
    lengths = [6, 6]
    qkv = torch.randn(12, 3 * HEADS * SIZE)
    packing = Packing.from_lengths(lengths)
    mean = torch.stack([self_attention(qkv, packing, HEADS, 0.2, DropoutMasks(0, s)) for s in range(3000)]).mean(0)
    assert torch.allclose(mean, self_attention(qkv, packing, HEADS, 0.0, None), atol=0.06)
    assert F.cosine_similarity(mean.flatten(), plain_attention(qkv, lengths).flatten(), 0) > 0.999
