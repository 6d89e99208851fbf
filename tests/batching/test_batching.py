"""Plans and packed batches."""

from __future__ import annotations

import numpy as np
import pytest

from minibert.batching.dataset import collate
from minibert.batching.plans import plan_epoch, plan_evaluation
from minibert.batching.tokens import Tokens, offsets_of

LENGTHS = np.random.default_rng(0).integers(3, 120, 1003)


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("budget", [None, 700])
def test_every_example_once_an_epoch(buckets: bool, budget: int | None) -> None:
    batches = plan_epoch(LENGTHS, batch_size=32, batch_tokens=budget, buckets=buckets, seed=1, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    if budget is None:
        assert sorted(map(len, batches))[1:] == [32] * 31
    else:
        assert max(int(LENGTHS[rows].sum()) for rows in batches) <= budget
        assert np.mean([LENGTHS[rows].sum() for rows in batches]) > 0.85 * budget


def test_a_plan_is_a_function_of_seed_and_epoch() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return [rows.tolist() for rows in plan_epoch(LENGTHS, batch_size=32, seed=seed, epoch=epoch)]

    assert plan(1, 1) == plan(1, 1)
    assert plan(1, 1) != plan(1, 2) and plan(1, 1) != plan(2, 1)


def test_buckets_hold_like_lengths_in_random_order() -> None:
    for sizes in ({"batch_size": 32}, {"batch_size": 1, "batch_tokens": 32 * 60}):
        batches = plan_epoch(LENGTHS, **sizes, buckets=True, seed=0, epoch=0)
        spreads = [int(LENGTHS[rows].max() - LENGTHS[rows].min()) for rows in batches]
        assert np.median(spreads) < 10 and np.mean(spreads) < 15
        means = [float(LENGTHS[rows].mean()) for rows in batches]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5


def test_batches_are_random_by_default_and_in_order_of_length() -> None:
    batches = plan_epoch(LENGTHS, batch_size=32, seed=0, epoch=0)
    assert all(np.all(np.diff(LENGTHS[rows]) >= 0) for rows in batches)
    assert min(int(LENGTHS[rows].max() - LENGTHS[rows].min()) for rows in batches[:-1]) > 80


@pytest.mark.parametrize("buckets", [True, False])
def test_the_longest_texts_change_company_from_epoch_to_epoch(buckets: bool) -> None:
    longest = int(LENGTHS.argmax())
    plans = [plan_epoch(LENGTHS, batch_size=32, buckets=buckets, seed=0, epoch=epoch) for epoch in (0, 1)]
    first, second = (next(set(rows.tolist()) for rows in plan if longest in rows) for plan in plans)
    assert len(first & second) < 16


def test_a_text_longer_than_the_budget_has_a_batch_of_its_own() -> None:
    batches = plan_epoch(np.array([5, 900, 5]), batch_size=32, batch_tokens=100)
    assert sorted(map(len, batches)) == [1, 2]


def test_evaluation_covers_all_longest_first() -> None:
    batches = plan_evaluation(LENGTHS, batch_tokens=2048)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert LENGTHS[batches[0][0]] == LENGTHS.max()
    assert all(LENGTHS[rows].sum() <= 2048 for rows in batches)
    assert plan_evaluation(np.array([], dtype=np.int64), batch_tokens=2048) == []


def test_collate_packs_the_rows_in_order() -> None:
    lengths = np.array([3, 1, 4])
    types = np.array([0, 0, 1, 0, 0, 1, 1, 1], np.uint8)
    tokens = Tokens(np.arange(10, 18, dtype=np.int32), offsets_of(lengths), types, np.zeros(3, np.int32))
    x = collate(tokens, np.array([2, 0]))
    assert x.input_ids is not None and x.position_ids is not None and x.token_type_ids is not None
    assert x.input_ids.tolist() == [14, 15, 16, 17, 10, 11, 12]
    assert x.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert x.token_type_ids.tolist() == [0, 1, 1, 1, 0, 0, 1]
    assert x.packing.cu_seqlens.tolist() == [0, 4, 7] and x.packing.first_rows.tolist() == [0, 4]
