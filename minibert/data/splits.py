"""Which rows train and which measure: stratified, fixed by a seed, equal texts on one side so that none leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minibert.problem.problem import MULTI, REGRESSION


def stratified_split(
    keys: Sequence[str], labels: Sequence[Any], kind: str, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (kept, taken), `fraction` of each class taken; rows of equal keys stay together.

    labels: a name, a list of names or a number for each row, as `kind` has it.
    """
    rng = np.random.default_rng([seed, len(keys)])
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    members = list(groups.values())
    if kind == MULTI:
        taken = _iterative_stratification([[labels[row] for row in rows] for rows in members], fraction, rng)
    else:
        firsts = [labels[rows[0]] for rows in members]
        strata = _value_ranges(firsts) if kind == REGRESSION else firsts
        taken = _stratified(strata, [len(rows) for rows in members], fraction, rng)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[[row for group in taken for row in members[group]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _value_ranges(values: list[float]) -> list[int]:
    """Ten ranges with as many values each, fewer where there are few values."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    ranges = min(10, max(1, len(values) // 10))
    return (ranks * ranges // max(len(values), 1)).tolist()


def _stratified(strata: list[Any], sizes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    """The groups to take, `fraction` of the rows of each stratum; at least one group of each stays."""
    groups: dict[Any, list[int]] = {}
    for group, stratum in enumerate(strata):
        groups.setdefault(stratum, []).append(group)
    taken = []
    owed = 0.0  # what rounding in one stratum left over is made up for in the next, not what it could not give
    for stratum in sorted(groups, key=str):
        owed += fraction * sum(sizes[group] for group in groups[stratum])
        for group in rng.permutation(groups[stratum])[: len(groups[stratum]) - 1]:
            if sizes[group] <= owed + 0.5:
                taken.append(int(group))
                owed -= sizes[group]
        owed = min(owed, 0.5)
    return taken


def _iterative_stratification(labels_of: list[list[list[str]]], fraction: float, rng: np.random.Generator) -> list[int]:
    """The groups to take of rows with several labels each, `fraction` of the rows of each label (Sechidis et al. 2011).

    The label with the fewest rows left goes first, as later nothing could make up for it; each of its groups goes to
    the side that lacks the label more. labels_of: for each group the labels of each of its rows.
    """
    counts = [Counter(name for names in rows for name in names) for rows in labels_of]
    fractions = np.array([1 - fraction, fraction])
    total = Counter(name for rows in labels_of for names in rows for name in names)
    lacking = {name: fractions * count for name, count in total.items()}  # rows that each side still lacks
    lacking_rows = fractions * sum(map(len, labels_of))
    left = Counter(name for count in counts for name in count)  # groups not yet placed, by label
    holders: dict[str | None, list[int]] = {}
    for group in rng.permutation(len(counts)).tolist():
        for name in counts[group] or (None,):
            holders.setdefault(name, []).append(group)
    side = np.full(len(counts), -1)

    def place(group: int, name: str | None) -> None:
        wanted = lacking_rows if name is None else lacking[name]
        best = int(np.argmax(lacking_rows) if wanted[0] == wanted[1] else np.argmax(wanted))
        side[group] = best
        lacking_rows[best] -= len(labels_of[group])
        for other, count in counts[group].items():
            lacking[other][best] -= count
            left[other] -= 1

    while rarest := min((name for name in left if left[name] > 0), key=lambda name: (left[name], name), default=None):
        for group in holders[rarest]:
            if side[group] < 0:
                place(group, rarest)
    for group in holders.get(None, []):
        place(group, None)
    return np.flatnonzero(side == 1).tolist()
