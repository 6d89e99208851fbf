"""Which rows train, validate and test, and which are sampled."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import write

from minibert.config import RunConfig
from minibert.data.examples import Examples, text_keys
from minibert.data.loading import load_data
from minibert.data.splits import stratified_split
from minibert.errors import UserError
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem


def examples(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b", "c"], count, p=[0.8, 0.15, 0.05]).tolist()
    texts = [f"text {i}" for i in rng.integers(0, count * 2 // 3, count)]
    return Examples("data.csv", texts, None, labels, list(range(count)))


def split(data: Examples, problem: Problem, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return stratified_split(text_keys(data), data.labels or [], problem.kind, share, seed)


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_split_is_stratified_seeded_and_keeps_equal_texts_together(share: float) -> None:
    data = examples(2000)
    problem = Problem(SINGLE, ["a", "b", "c"])
    kept, taken = split(data, problem, share, 42)
    assert sorted([*kept, *taken]) == list(range(2000))
    assert abs(len(taken) - share * 2000) <= 3
    assert not {data.texts[i] for i in kept} & {data.texts[i] for i in taken}
    assert data.labels is not None
    before, after = Counter(data.labels), Counter(data.labels[i] for i in taken)
    assert all(abs(after[name] / before[name] - share) < 0.1 for name in before)
    again = split(data, problem, share, 42)[1]
    assert np.array_equal(taken, again) and not np.array_equal(taken, split(data, problem, share, 43)[1])


def test_a_class_of_one_row_stays_in_training() -> None:
    data = Examples("x", [f"t{i}" for i in range(41)], None, ["a"] * 40 + ["rare"], list(range(41)))
    kept, _ = split(data, Problem(SINGLE, ["a", "rare"]), 0.5, 0)
    assert 40 in kept


def test_validation_and_test_come_from_the_training_file(shared_data: Path) -> None:
    config = RunConfig(train=str(shared_data / "sms_spam" / "spamdata_v2.csv"), test_split=0.15)
    data = load_data(config)
    sizes = {part: len(rows) for part, rows in data.splits.items()}
    assert sum(sizes.values()) == 5572 and sizes["test"] == pytest.approx(836, abs=3) == sizes["validation"]
    texts = [set(part.texts) for part in data.splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_a_sample_of_the_training_rows_is_stratified(shared_data: Path) -> None:
    config = RunConfig(train=str(shared_data / "sms_spam" / "spamdata_v2.csv"), max_train_samples=1000)
    data = load_data(config)
    total = sum(len(part) for part in data.splits.values())
    assert abs(total - 1000) <= 2
    spam = sum(label == "1" for part in data.splits.values() for label in part.labels or [])
    assert spam / total == pytest.approx(747 / 5572, abs=0.01)


@pytest.mark.parametrize("most", [3, 20, 60, 100])
def test_a_sample_is_never_larger_than_asked_for(shared_data: Path, most: int) -> None:
    config = RunConfig(train=str(shared_data / "trec" / "train_5500.label"), max_train_samples=most, validation_split=0)
    train = load_data(config).splits["train"]
    assert len(train) == most and len(set(train.labels or [])) >= min(most, 40)
    with pytest.raises(UserError, match="3 rows are too few to split off validation; give --validation-split 0"):
        load_data(dataclasses.replace(config, max_train_samples=3, validation_split=0.15))


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_multi_label_split_gives_each_label_its_share(share: float) -> None:
    rng = np.random.default_rng(1)
    frequency = np.geomspace(0.4, 0.004, 40)
    rows = [[f"l{i}" for i in np.flatnonzero(row < frequency)] for row in rng.random((3000, 40))]
    texts = [f"Text {i}" if i % 2 else f"text  {i}" for i in rng.integers(0, 2500, 3000)]
    data = Examples("x", texts, None, rows, list(range(3000)))
    problem = Problem(MULTI, [f"l{i}" for i in range(40)])
    kept, taken = split(data, problem, share, 7)
    assert sorted([*kept, *taken]) == list(range(3000)) and abs(len(taken) - 3000 * share) <= 15
    assert not {texts[i].split()[1] for i in kept} & {texts[i].split()[1] for i in taken}
    before = Counter(name for row in rows for name in row)
    after = Counter(name for i in taken for name in rows[i])
    assert all(abs(after[name] - share * count) <= max(2, 0.03 * count) for name, count in before.items())
    assert np.array_equal(taken, split(data, problem, share, 7)[1])
    assert not np.array_equal(taken, split(data, problem, share, 8)[1])


def test_multi_label_rows_that_all_differ_can_be_split() -> None:
    rows = [[f"l{j}" for j in range(10) if i >> j & 1] for i in range(1024)]
    data = Examples("x", [f"t{i}" for i in range(1024)], None, rows, list(range(1024)))
    _, taken = split(data, Problem(MULTI, [f"l{j}" for j in range(10)]), 0.25, 0)
    counts = Counter(name for i in taken for name in rows[i])
    assert abs(len(taken) - 256) <= 8 and all(abs(count - 128) <= 8 for count in counts.values()), counts


@pytest.mark.parametrize("scale", [0.001, 1.0, 1e6])
def test_values_are_split_over_their_whole_range(scale: float) -> None:
    values = (np.random.default_rng(0).random(500) ** 3 * scale).tolist()
    data = Examples("x", [f"t{i}" for i in range(500)], None, values, list(range(500)))
    _, taken = split(data, Problem(REGRESSION, ["score"]), 0.2, 0)
    tenths = np.quantile(values, np.linspace(0, 1, 11))[1:-1]
    assert np.bincount(np.searchsorted(tenths, np.array(values)[taken])).tolist() == [10] * 10


def test_pairs_stay_together_only_if_both_texts_are_equal() -> None:
    texts, pairs = ["same"] * 40, [f"other {i // 2}" for i in range(40)]
    data = Examples("x", texts, pairs, ["a", "b"] * 20, list(range(40)))
    kept, taken = split(data, Problem(SINGLE, ["a", "b"]), 0.5, 0)
    assert len(taken) == 20 and not {pairs[i] for i in kept} & {pairs[i] for i in taken}


def test_many_rare_classes_take_nothing_from_the_others() -> None:
    labels = [f"rare {i:03}" for i in range(200)] + ["refund"] * 40 + ["shipping"] * 400
    data = Examples("list", [f"text {i}" for i in range(640)], None, labels)
    for seed in range(5):
        _, taken = split(data, Problem(SINGLE, sorted({*labels})), 0.15, seed)
        count = Counter(labels[i] for i in taken)
        assert 5 <= count["refund"] <= 7 and 59 <= count["shipping"] <= 61 and len(count) == 2


def test_a_text_of_many_rows_starves_no_class() -> None:
    texts = [f"text {i}" for i in range(350)] + ["win a prize"] * 50
    labels = ["ham"] * 300 + ["spam"] * 100
    for seed in range(8):
        _, taken = split(Examples("list", texts, None, labels), Problem(SINGLE, ["ham", "spam"]), 0.15, seed)
        assert Counter(labels[i] for i in taken) == {"ham": 45, "spam": 15}


def test_a_sample_is_not_copies_of_one_text(tmp_path: Path) -> None:
    rows = ["ok,ham"] * 400 + [f"ham {i},ham" for i in range(500)] + [f"spam {i},spam" for i in range(100)]
    path = write(tmp_path / "a.csv", "text,label\n" + "\n".join(rows) + "\n")
    for seed in (4, 5, 6):
        data = load_data(RunConfig(train=path, max_train_samples=200, split_seed=seed))
        texts = [text for examples in data.splits.values() for text in examples.texts]
        labels = [label for examples in data.splits.values() for label in examples.labels or []]
        assert len(texts) == 200 and 60 <= texts.count("ok") <= 105 and labels.count("spam") == 20
