"""Which examples share a batch.

Any examples may share a batch, as their tokens are packed; batches of similar length are hardly faster to compute, and
some tasks learn less from them (figures: benchmarks). Batches by tokens hold as many examples as fit a budget.
Every plan is a pure function of (lengths, sizes, seed, epoch).
"""

from __future__ import annotations

import heapq

import numpy as np

POOL = 16  # batches of similar length come from so many batches of random examples

Batch = np.ndarray  # [B] int64, row numbers of the examples


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    buckets: bool = False,
    seed: int = 0,
    epoch: int = 0,
) -> list[Batch]:
    """Every example once, in batches of random examples, or with `buckets` of random ones of similar length.

    Only pools of random examples are sorted: of all texts sorted, the longest would meet in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if buckets and len(order):
        pool = POOL * (max(1, int(batch_tokens / lengths.mean())) if batch_tokens else batch_size)
        order = np.concatenate([by_length(order[i : i + pool], lengths) for i in range(0, len(order), pool)])
    batches = cut_into_batches(order, lengths, None if batch_tokens else batch_size, batch_tokens)
    batches = [by_length(rows, lengths) for rows in batches]  # the order that attention works best on
    return [batches[i] for i in rng.permutation(len(batches))] if buckets else batches


def by_length(rows: Batch, lengths: np.ndarray) -> Batch:
    """The rows in order of length; ties stay as they are."""
    return rows[np.argsort(lengths[rows], kind="stable")]


def plan_evaluation(lengths: np.ndarray, *, batch_tokens: int, batch_size: int = 256) -> list[Batch]:
    """Every example once, sorted by length, longest first so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return cut_into_batches(order, lengths, batch_size, batch_tokens)


def cut_into_batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int | None, batch_tokens: int | None
) -> list[Batch]:
    """Cut `order` into batches of at most `batch_size` examples and `batch_tokens` tokens, one example at least."""
    ends = np.cumsum(lengths[order])
    batches, start, before = [], 0, 0
    while start < len(order):
        stop = len(order) if batch_size is None else start + batch_size
        if batch_tokens is not None:
            stop = min(stop, max(int(np.searchsorted(ends, before + batch_tokens, side="right")), start + 1))
        stop = min(stop, len(order))
        batches.append(order[start:stop])
        start, before = stop, int(ends[stop - 1])
    return batches


def split_by_tokens(rows: Batch, lengths: np.ndarray, parts: int) -> list[Batch]:
    """Cut a batch into parts of about equal tokens, some empty if it has fewer rows: each keeps the order of `rows`.

    The longest text first, each goes to the part with the fewest tokens so far.
    """
    if parts == 1:
        return [rows]
    loads = [(0, part) for part in range(parts)]
    owner = np.empty(len(rows), dtype=np.int64)
    for i in np.argsort(-lengths[rows], kind="stable").tolist():
        load, part = loads[0]
        owner[i] = part
        heapq.heapreplace(loads, (load + int(lengths[rows[i]]), part))
    return [rows[owner == part] for part in range(parts)]
