"""What the data is like, before anything is trained: rows, classes, lengths, duplicates, leaks; as lines and as JSON.

Nothing here is computed by a model; what a run will cost is measured in `probe`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from minibert.batching.tokens import Tokens
from minibert.data.examples import Examples, text_keys
from minibert.data.loading import RunData
from minibert.problem.problem import MULTI, REGRESSION
from minibert.runtime.files import printable

FEW_ROWS = 10  # a class with fewer training rows is hardly learned, and hardly measured
NAMED = 3  # texts, classes or lines that a warning names; check.json has more
NAMED_IN_JSON = 100
ROOM_FOR_NAMES = 32  # characters
CLASSES_SHOWN = 10
NOTES_SHOWN = 12
WIDTH = 100  # columns of a line
BAR = 40


@dataclass(frozen=True)
class Conflict:
    """One text that stands in several rows with different labels."""

    text: str
    lines: list[int]
    labels: list[str]


@dataclass(frozen=True)
class PartInspection:
    """One part of the data: training, validation or test rows."""

    source: str
    rows: int
    classes: dict[str, int]  # rows of each label; empty for regression
    rows_without_label: int  # possible in multi-label only
    tokens: int  # that the model will read, special tokens included
    length_median: int  # in tokens, before --max-length
    length_mean: float
    length_95_percent: int
    length_longest: int
    histogram: list[tuple[int, int, int]]  # (from, to, rows) lengths before --max-length
    cut_rows: int
    cut_tokens: int
    duplicate_rows: int  # rows whose text stood in an earlier row
    conflicts: int  # texts with different labels
    conflict_examples: list[Conflict]


@dataclass(frozen=True)
class Shared:
    """Rows of one part whose text is also in another part: what they measure was seen in training."""

    part: str
    other: str
    rows: int
    lines: list[int]


@dataclass(frozen=True)
class Inspection:
    problem_type: str
    max_length: int
    truncation: str
    parts: dict[str, PartInspection]
    shared: list[Shared]
    few_rows: dict[str, int]  # training rows of each class that has some, but fewer than FEW_ROWS
    labels_not_in_train: dict[str, list[str]]  # labels without a training row, by the parts that have them
    notes: list[str]  # what was decided without being asked

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(data: RunData, tokens: Mapping[str, Tokens], max_length: int, truncation: str) -> Inspection:
    """Look at all parts of prepared data and at their encoded texts."""
    keys = {part: text_keys(examples) for part, examples in data.splits.items()}
    names = [] if data.problem.kind == REGRESSION else data.problem.labels
    parts = {part: _inspect_part(rows, names, keys[part], tokens[part]) for part, rows in data.splits.items()}
    taught = parts["train"].classes
    labels_not_in_train = {
        part: [name for name, count in inspected.classes.items() if count and not taught[name]]
        for part, inspected in parts.items()
    }
    return Inspection(
        problem_type=data.problem.kind,
        max_length=max_length,
        truncation=truncation,
        parts=parts,
        shared=_shared(data.splits, keys),
        few_rows=dict(sorted(((n, c) for n, c in taught.items() if 0 < c < FEW_ROWS), key=lambda item: item[1])),
        labels_not_in_train={part: labels for part, labels in labels_not_in_train.items() if labels},
        notes=list(data.notes),
    )


def _inspect_part(examples: Examples, names: list[str], keys: list[str], tokens: Tokens) -> PartInspection:
    labels = examples.labels or []
    counts = Counter(name for label in labels for name in (label if isinstance(label, list) else [label]))
    lengths = tokens.full_lengths
    conflicts = _conflicts(examples, keys)
    return PartInspection(
        source=examples.source,
        rows=len(examples),
        classes={name: counts[name] for name in names},
        rows_without_label=sum(label == [] for label in labels),
        tokens=len(tokens.ids),
        length_median=int(np.median(lengths)),
        length_mean=round(float(lengths.mean()), 1),
        length_95_percent=int(np.percentile(lengths, 95)),
        length_longest=int(lengths.max()),
        histogram=histogram(lengths),
        cut_rows=int((tokens.truncated > 0).sum()),
        cut_tokens=int(tokens.truncated.sum()),
        duplicate_rows=len(keys) - len(set(keys)),
        conflicts=len(conflicts),
        conflict_examples=conflicts[:NAMED_IN_JSON],
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Rows between powers of two: [n] lengths -> (from, to, rows) from the shortest to the longest."""
    place = np.ceil(np.log2(np.maximum(lengths, 4))).astype(int)
    rows = np.bincount(place)
    return [(2 ** (i - 1) + 1 if i > 2 else 1, 2**i, int(rows[i])) for i in range(int(place.min()), len(rows))]


def _conflicts(examples: Examples, keys: list[str]) -> list[Conflict]:
    rows: dict[str, list[int]] = {}
    labels = examples.labels or []
    first: dict[str, int] = {}
    for i, key in enumerate(keys):  # rows are kept only for texts that occur again: few, however many texts there are
        if first.setdefault(key, i) != i:
            rows.setdefault(key, [first[key]]).append(i)
    different = [same for same in rows.values() if any(labels[i] != labels[same[0]] for i in same)]
    return [
        Conflict(examples.texts[same[0]], [examples.lines[i] for i in same], [_name(labels[i]) for i in same])
        for same in different
    ]


def _name(label: Any) -> str:
    return "|".join(label) if isinstance(label, list) else str(label)


def _shared(parts: Mapping[str, Examples], keys: Mapping[str, list[str]]) -> list[Shared]:
    found = []
    for part, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if part in keys and other in keys:
            known = set(keys[other])
            lines = [parts[part].lines[i] for i, key in enumerate(keys[part]) if key in known]
            if lines:
                found.append(Shared(part, other, len(lines), lines[:NAMED_IN_JSON]))
    return found


def summary_lines(inspection: Inspection) -> list[str]:
    """What --check and the head of every run say, one screen together with the lines about model and cost."""
    lines = [*_size_lines(inspection), *_class_lines(inspection), _length_line(inspection)]
    return truncate([*lines, *_histogram_lines(inspection), *_warning_lines(inspection)])


def truncate(lines: list[str]) -> list[str]:
    """Lines for a terminal, without what one would obey, and no longer than it is wide."""
    lines = [printable(line) for line in lines]
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines]


def _size_lines(inspection: Inspection) -> list[str]:
    rows = " · ".join(f"{part} {inspected.rows}" for part, inspected in inspection.parts.items())
    notes, more = inspection.notes[:NOTES_SHOWN], len(inspection.notes) - NOTES_SHOWN
    lines = [line for note in notes for line in wrap(note, WIDTH - 8, max_lines=2, break_on_hyphens=False)]
    lines += [f"... {more} more notes"] if more > 0 else []
    return [f"data    {rows} rows", *(f"        {line}" for line in lines)]


def _class_lines(inspection: Inspection) -> list[str]:
    """The largest classes and, where there are too many, the smallest."""
    parts = inspection.parts
    classes = sorted(parts["train"].classes.items(), key=lambda item: -item[1])
    if not classes:
        return []
    half = CLASSES_SHOWN // 2
    shown = classes if len(classes) <= CLASSES_SHOWN else [*classes[:half], *classes[-half:]]
    width = min(32, max(len(name) for name, _ in shown))
    lines = [f"classes {'':<{width}}" + "".join(f" {part:>10}" for part in parts)]
    for place, (name, count) in enumerate(shown):
        if len(shown) < len(classes) and place == half:
            lines.append(f"        ... {len(classes) - len(shown)} more ...")
        rows = "".join(f" {inspected.classes[name]:>10}" for inspected in parts.values())
        lines.append(f"        {name[:width]:<{width}}{rows} {count / max(parts['train'].rows, 1):>6.1%}")
    if inspection.problem_type == MULTI and any(inspected.rows_without_label for inspected in parts.values()):
        rows = "".join(f" {inspected.rows_without_label:>10}" for inspected in parts.values())
        lines.append(f"        {'(no label)':<{width}}{rows}")
    return lines


def _length_line(inspection: Inspection) -> str:
    train = inspection.parts["train"]
    whole = train.tokens + train.cut_tokens
    lengths = f"median {train.length_median}, 95% up to {train.length_95_percent}, longest {train.length_longest}"
    limit = f"--max-length {inspection.max_length}"
    if inspection.truncation == "window" and not train.cut_tokens:
        return f"tokens  {lengths}; texts beyond {limit} become windows"
    cut = f"{train.cut_rows / train.rows:.1%} of rows, {train.cut_tokens / whole:.1%} of tokens"
    return f"tokens  {lengths}; {limit} cuts {cut}"


def _histogram_lines(inspection: Inspection) -> list[str]:
    """A bar for each range of lengths; one line holds the ranges that lie wholly beyond the tenth."""
    bins = inspection.parts["train"].histogram
    if len(bins) > 9:
        bins = [*bins[:8], (bins[8][0], bins[-1][1], sum(rows for _, _, rows in bins[8:]))]
    most = max(rows for _, _, rows in bins)
    width = max(len(f"{low}-{high}") for low, high, _ in bins)
    digits = len(str(most))
    return [
        f"        {f'{low}-{high}':>{width}} {rows:>{digits}} {'█' * round(BAR * rows / most)}".rstrip()
        for low, high, rows in bins
    ]


def _warning_lines(inspection: Inspection) -> list[str]:
    """What a person should look at before trusting a result; nothing where all is well."""
    warnings = []
    for shared in inspection.shared:
        where = _some(shared.lines, shared.rows)
        warnings.append(f"texts of {shared.part} that are also in {shared.other}: {shared.rows}, line {where}")
    for part, inspected in inspection.parts.items():
        if inspected.conflicts:
            example = inspected.conflict_examples[0]
            where = ", ".join(f"{line} {label}" for line, label in zip(example.lines, example.labels, strict=True))
            warnings.append(f"texts of {part} with different labels: {inspected.conflicts}, such as line {where[:40]}")
    duplicates = ", ".join(f"{part} {p.duplicate_rows}" for part, p in inspection.parts.items() if p.duplicate_rows)
    if duplicates:
        warnings.append(f"rows that repeat an earlier row's text: {duplicates}")
    for part, names in inspection.labels_not_in_train.items():
        warnings.append(f"labels of {part} without a training row: {_some(names)}")
    if inspection.few_rows:
        some = _some([f"{name} ({count})" for name, count in inspection.few_rows.items()])
        warnings.append(f"classes of fewer than {FEW_ROWS} training rows: {some}")
    return [f"{'look at' if i == 0 else '':<8}{warning}" for i, warning in enumerate(warnings)]


def _some(values: list[Any], count: int | None = None) -> str:
    count = len(values) if count is None else count
    shown = [str(value) for value in values[:NAMED]]
    while len(shown) > 1 and len(", ".join(shown)) > ROOM_FOR_NAMES:
        shown.pop()
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")
