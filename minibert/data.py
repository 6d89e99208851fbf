"""Data files to examples: which columns, which labels, which rows train and which test."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.problem import MULTI, REGRESSION, SINGLE, Problem, label_text, sorted_labels
from minibert.tables import BadRow, Table, bad_rows_error, describe_bad, read_table, stream_table
from minibert.tokens import valid_unicode

ROOM_FOR_LABELS = 30  # characters
HEADER_ROWS = 200  # looked at to tell whether there is a header

# What people call their columns, in the order of trust; compared in lower case.
TEXT_NAMES = """text sentence review question_text message sms tweet comment comment_text content question body
description document resume utterance title v2 texts""".split()
LABEL_NAMES = """label labels target category class sentiment intent topic quality score rating stars y is_duplicate
spam v1 gold_label emotion output""".split()
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("query", "passage"),
    ("#1 string", "#2 string"),
)


@dataclass
class Examples:
    """Rows of one file or list: texts, second texts of pairs, and labels as read, with the lines they stand on."""

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)  # rows of the source that are not among these

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> Examples:
        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in rows]

        """Some of the rows; `bad` stays behind, for it tells of the whole source."""
        return Examples(self.source, pick(self.texts), pick(self.pairs), pick(self.labels), pick(self.lines))


@dataclass
class Columns:
    """Which columns of a table are which."""

    text: tuple[str, ...]
    pair: str | None
    label: tuple[str, ...]


@dataclass
class RunData:
    """Everything a run reads: the parts, and what the labels are."""

    parts: dict[str, Examples]  # train, validation and, if there is one, test
    problem: Problem
    columns: Columns
    notes: list[str]  # what was decided without being asked
    skipped: dict[str, list[BadRow]] = field(default_factory=dict)  # by --on-bad-rows skip


def text_keys(examples: Examples) -> list[str]:
    """For each row its text (and second text) with case and blanks evened out: rows of equal keys are duplicates."""
    keys = [" ".join(text.split()).casefold() for text in examples.texts]
    if examples.pairs is None:
        return keys
    return [f"{key}\n{' '.join(pair.split()).casefold()}" for key, pair in zip(keys, examples.pairs, strict=True)]


def find_columns(table: Table, config: RunConfig, need_label: bool = True) -> Columns:
    """The columns named by flags, or else by the names that people use; UserError lists what is there."""
    names = list(table.columns)
    lower = {name.lower(): name for name in reversed(names)}
    for wanted in (*config.text_column, *config.label_column, *filter(None, [config.text_pair_column])):
        if wanted not in names:
            meant = f" (did you mean {lower[wanted.lower()]!r}?)" if wanted.lower() in lower else ""
            raise UserError(f"{table.path}: no column {wanted!r}; its columns are {', '.join(names)}{meant}")
    text, pair, label = config.text_column, config.text_pair_column, config.label_column
    if not text and not pair:
        first, second = next(((a, b) for a, b in PAIR_NAMES if a in lower and b in lower), ("", ""))
        text, pair = ((lower[first],), lower[second]) if first else ((), None)
    if not label:
        label = tuple(lower[name] for name in LABEL_NAMES if name in lower and lower[name] not in (*text, pair))[:1]
    if not text:
        text = tuple(lower[name] for name in TEXT_NAMES if name in lower and lower[name] not in label)[:1]
    if len(names) == 2 and not pair and not (text and (label or not need_label)):
        text, label = _two_columns(table, text, label)
    if not text or (need_label and not label):
        what = "--text-column" if not text else "--label-column"
        raise UserError(f"{table.path}: give {what}; {_described(table)}")
    return Columns(text, pair, label)


def _described(table: Table) -> str:
    """The columns for an error line; those that have only numbers for names with what the first row holds."""
    names = list(table.columns)
    if names != [str(i) for i in range(len(names))]:
        return f"the columns are {', '.join(names) or 'none'}"
    first = {name: " ".join(str(values[0]).split()) if values else "" for name, values in table.columns.items()}
    shown = ", ".join(f"{name} ({value[:24]}{'...' if len(value) > 24 else ''})" for name, value in first.items())
    return f"there is no header; the columns are {shown}"


def _two_columns(
    table: Table, text: tuple[str, ...], label: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of two columns the one with fewer different values is the label, unless its name says otherwise."""
    first, second = table.columns
    known = text or label
    if known:
        other = second if known == (first,) else first
        return (text or (other,)), (label or (other,))
    different = {name: len({str(value) for value in table.columns[name]}) for name in (first, second)}
    fewer = min(different, key=lambda name: different[name])
    return (first if fewer == second else second,), (fewer,)


def examples_from_table(table: Table, columns: Columns, with_labels: bool = True) -> Examples:
    def column(name: str) -> list[str]:
        return ["" if _is_missing(value) else valid_unicode(str(value)) for value in table.columns[name]]

    texts = column(columns.text[0])
    if len(columns.text) > 1:
        texts = [" ".join(filter(None, cells)) for cells in zip(*map(column, columns.text), strict=True)]
    pairs = column(columns.pair) if columns.pair else None
    labels: list[Any] | None = None
    if with_labels and all(name in table.columns for name in columns.label):
        labels = list(table.columns[columns.label[0]])
        if len(columns.label) > 1:
            labels = list(zip(*(table.columns[name] for name in columns.label), strict=True))
    return Examples(table.path, texts, pairs, labels, list(table.lines), list(table.bad))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # NaN is how pandas writes nothing


def load_data(config: RunConfig) -> RunData:
    """Read the files that the flags name, decide what the labels are, and split what has no file of its own."""
    assert config.train is not None
    notes: list[str] = []
    tables = {"train": _read(config.train, config, notes)}
    for part in ("validation", "test"):
        if path := getattr(config, part):
            tables[part] = _read(path, config, notes)
    columns = find_columns(tables["train"], config)
    parts = {}
    for part, table in tables.items():
        own = find_columns(table, config) if part != "train" and config.text_column == () else columns
        parts[part] = examples_from_table(table, own)
    pair = f" + {columns.pair}" if columns.pair else ""
    notes.append(f"text: {' + '.join(columns.text)}{pair} · label: {', '.join(columns.label)}")
    return prepare(parts, columns, config, notes)


def stream_examples(path: str, config: RunConfig, with_labels: bool = False) -> Iterator[Examples]:
    """Rows of a file, chunk by chunk, so that it may be larger than memory; the first chunk decides on the columns."""
    columns: Columns | None = None
    bad: list[BadRow] = []
    header = _has_header(path, config)
    for table in stream_table(path, header=header, encoding=config.encoding, on_bad_rows=config.on_bad_rows):
        columns = columns or find_columns(table, config, need_label=with_labels)
        examples = examples_from_table(table, columns, with_labels)
        if with_labels:
            may_lack_labels = config.label_delimiter is not None or len(columns.label) > 1
            examples = usable(examples, config, may_lack_labels)
        bad += examples.bad
        yield examples
    if bad:
        print(f"skipped {_rows(bad)} of {path}, {describe_bad(bad)}", file=sys.stderr)


def _rows(bad: list[BadRow]) -> str:
    return "1 row" if len(bad) == 1 else f"{len(bad)} rows"


def stream_labelled(path: str, problem: Problem, config: RunConfig) -> Iterator[Examples]:
    """`stream_examples` with labels that a trained model knows, for `evaluate`."""
    known = set(problem.labels)
    for examples in stream_examples(path, config, with_labels=True):
        examples.labels = _labels_of(examples, problem.kind, Columns((), None, config.label_column), config)
        for line, value in zip(examples.lines, examples.labels, strict=True):
            names = {value} if problem.kind == SINGLE else set(value) if problem.kind == MULTI else set()
            if names - known:
                unknown, some = min(names - known), ", ".join(problem.labels[:8])
                more = f" and {len(known) - 8} more" if len(known) > 8 else ""
                several = problem.kind == MULTI and config.label_delimiter is None
                hint = "; --label-delimiter takes several labels apart" if several else ""
                raise UserError(
                    f"{path}, line {line}: label {unknown!r} is unknown to the model; it knows {some}{more}{hint}"
                )
        yield examples


def _read(path: str, config: RunConfig, notes: list[str]) -> Table:
    header = _has_header(path, config)
    if not header and not config.no_header:
        notes.append(f"{path} has no header: its first row looks like the others")
    table = read_table(path, header=header, encoding=config.encoding, on_bad_rows="skip")
    if not table.lines and not table.bad:
        raise UserError(f"{path}: no rows; expected a header and at least one row of data")
    if table.encoding not in ("utf-8", config.encoding):
        notes.append(f"{path} is not UTF-8; read as {table.encoding} (--encoding says otherwise)")
    return table


def _has_header(path: str, config: RunConfig) -> bool:
    """Whether the first row holds names: it does not if all names are unknown and one is a value of its own column."""
    if config.no_header:
        return False
    table = next(stream_table(path, encoding=config.encoding, rows=HEADER_ROWS, on_bad_rows="skip"))
    asked = {*config.text_column, *config.label_column, *filter(None, [config.text_pair_column])}
    known = {*TEXT_NAMES, *LABEL_NAMES, *(name for pair in PAIR_NAMES for name in pair)}
    if not table.headed or any(name in asked or name.lower() in known for name in table.columns):
        return True
    return not any(_is_one_of(name, [str(value) for value in values]) for name, values in table.columns.items())


def _is_one_of(name: str, values: list[str]) -> bool:
    """A name that occurs below itself, in a column of few values or of numbers, is no name."""
    if _is_number(name):
        return name in values or (bool(values) and all(map(_is_number, values)))
    return name in values and len(set(values)) <= len(values) / 2


def prepare(parts: dict[str, Examples], columns: Columns, config: RunConfig, notes: list[str]) -> RunData:
    """Check rows, name the labels, and split."""
    may_lack_labels = config.label_delimiter is not None or len(columns.label) > 1
    skipped = {}
    for name in list(parts):
        parts[name] = usable(parts[name], config, may_lack_labels)
        if bad := parts[name].bad:
            skipped[name] = bad
            notes.append(f"skipped {_rows(bad)} of {parts[name].source}, {describe_bad(bad)}")
    problem = detect_problem(parts, columns, config, notes)
    if config.max_train_samples and config.max_train_samples < len(parts["train"]):
        rows = len(parts["train"])
        share = config.max_train_samples / rows
        kept, _ = split(parts["train"], problem, 1 - share, config.split_seed)
        parts["train"] = parts["train"].take(kept)
        notes.append(f"{len(kept)} of {rows} training rows are used (--max-train-samples {config.max_train_samples})")
    _split_parts(parts, problem, config)
    return RunData(parts, problem, columns, notes, skipped)


def usable(examples: Examples, config: RunConfig, may_lack_labels: bool = False) -> Examples:
    """The rows that have text and label. The others are an error that names them or, if asked for, left in `bad`."""
    bad = list(examples.bad)
    kept = []
    labels = None if may_lack_labels else examples.labels
    for i, text in enumerate(examples.texts):
        if not text.strip():
            bad.append(BadRow(examples.lines[i], "no text"))
        elif examples.pairs is not None and not examples.pairs[i].strip():
            bad.append(BadRow(examples.lines[i], "no second text"))
        elif labels is not None and (_is_missing(labels[i]) or (isinstance(labels[i], str) and not labels[i].strip())):
            bad.append(BadRow(examples.lines[i], "no label"))
        else:
            kept.append(i)
    if not bad:
        return examples
    bad.sort(key=lambda row: row.line)
    if config.on_bad_rows == "error":
        raise bad_rows_error(examples.source, bad)
    if not kept:
        raise UserError(f"{examples.source}: no row can be used; {describe_bad(bad)}")
    left = examples.take(kept)
    left.bad = bad
    return left


def detect_problem(parts: dict[str, Examples], columns: Columns, config: RunConfig, notes: list[str]) -> Problem:
    """Name the labels of all parts; labels become names (or numbers for regression) in place."""
    train = parts["train"]
    if _are_indicators(train.labels or []):
        columns.label = tuple(str(i) for i in range(len((train.labels or [])[0])))
    kind, why = _guess_kind(train, columns, config)
    if config.problem_type != "auto":
        kind, why = config.problem_type, "as --problem-type says"
    for examples in parts.values():
        if examples.labels is None:
            raise UserError(f"{examples.source}: no label column {', '.join(columns.label)}")
        examples.labels = _labels_of(examples, kind, columns, config)
    if kind == REGRESSION:
        notes.append(f"{kind}, {why}")
        return Problem(kind, [columns.label[0]])
    names: set[str] = set()
    for examples in parts.values():
        names |= _names_in(examples.labels or [], kind)
    if len(names) < 2 and kind == SINGLE:
        raise UserError(f"{train.source}: only one label, {names.pop()!r}; a classifier needs two or more")
    labels = list(columns.label) if kind == MULTI and len(columns.label) > 1 else sorted_labels(names)
    if not labels:
        raise UserError(f"{train.source}: no row has a label; a classifier needs some")
    notes.append(f"{kind}, {why}: {len(labels)} labels ({_some_names(labels)})")
    if kind == SINGLE and config.problem_type == "auto":
        notes += _second_thoughts(train.labels or [])
    return Problem(kind, labels)


def _some_names(labels: list[str]) -> str:
    """As many labels as a line has room for."""
    shown = labels[:6]
    while len(shown) > 1 and len(", ".join(shown)) > ROOM_FOR_LABELS:
        shown.pop()
    return ", ".join(shown) + (", ..." if len(shown) < len(labels) else "")


def _guess_kind(train: Examples, columns: Columns, config: RunConfig) -> tuple[str, str]:
    """The problem type, and why."""
    values = train.labels or []
    if len(columns.label) > 1:
        return MULTI, "as each label has a column of 0 and 1"
    if config.label_delimiter:
        return MULTI, "as --label-delimiter is given"
    if any(isinstance(value, list | tuple) for value in values):
        return MULTI, "as the labels are lists"
    names = {label_text(value) for value in values}
    fraction = next((label_text(value) for value in values if _is_fraction(label_text(value))), None)
    if len(names) > 2 and fraction is not None and all(_is_number(name) for name in names):
        return REGRESSION, f"as the labels are numbers with fractions, such as {fraction}"
    return SINGLE, "as each row has one label"


def _are_indicators(values: Sequence[Any]) -> bool:
    """Whether labels from Python are rows of 0 and 1, a place for each label, and not lists of labels 0 and 1."""
    if not values or not all(isinstance(row, list | tuple) for row in values):
        return False
    same_length = len({len(row) for row in values}) == 1 and len(values[0]) > 1
    return same_length and all(v in (0, 1) for row in values for v in row) and any(len(set(r)) < len(r) for r in values)


def _second_thoughts(labels: list[str]) -> list[str]:
    """What looks as if the labels were meant in another way."""
    names = set(labels)
    for delimiter in ",|;":
        several = sorted(name for name in names if delimiter in name)
        pieces = {piece.strip() for name in several for piece in name.split(delimiter)}
        if several and pieces <= names:
            return [
                f"labels such as {several[0]!r} look like several: --label-delimiter {delimiter!r} takes them apart"
            ]
    if len(labels) >= 50 and len(names) > len(labels) / 2:
        return [f"{len(names)} different labels in {len(labels)} rows: is --label-column right?"]
    if len(names) > 2 and all(map(_is_number, names)):
        return ["numbers without fractions are classes; --problem-type regression takes them as values"]
    return []


def _labels_of(examples: Examples, kind: str, columns: Columns, config: RunConfig) -> list[Any]:
    labels = examples.labels or []
    if kind == SINGLE:
        return [label_text(value) for value in labels]
    if kind == REGRESSION:
        for line, value in zip(examples.lines, labels, strict=True):
            if not _is_number(label_text(value)):
                raise UserError(f"{examples.source}, line {line}: {value!r} is not a number, as regression needs")
        return [float(value) for value in labels]
    if len(columns.label) > 1:
        return [_from_indicators(examples, i, row, columns.label) for i, row in enumerate(labels)]
    return [_several(value, config.label_delimiter) for value in labels]


def _from_indicators(examples: Examples, index: int, row: Sequence[Any], names: tuple[str, ...]) -> list[str]:
    for value, name in zip(row, names, strict=True):
        if label_text(value) not in ("0", "1"):
            where = f"{examples.source}, line {examples.lines[index]}, column {name}"
            raise UserError(f"{where}: {value!r} is neither 0 nor 1, as one column a label needs")
    return [name for value, name in zip(row, names, strict=True) if label_text(value) == "1"]


def _several(value: Any, delimiter: str | None) -> list[str]:
    if isinstance(value, list | tuple):
        return sorted({label_text(item) for item in value})
    pieces = str("" if value is None else value).split(delimiter) if delimiter else [str(value)]
    return sorted({piece.strip() for piece in pieces if piece.strip()})


def _names_in(labels: list[Any], kind: str) -> set[str]:
    return set(labels) if kind == SINGLE else {name for row in labels for name in row}


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _is_fraction(text: str) -> bool:
    return _is_number(text) and not float(text).is_integer()


def _split_parts(parts: dict[str, Examples], problem: Problem, config: RunConfig) -> None:
    """Give validation and test their share of the training rows, where they have no file."""
    shares = {"test": config.test_split, "validation": config.validation_split}
    total = len(parts["train"])
    for part, share in shares.items():
        if part in parts or share == 0:
            continue
        train = parts["train"]
        kept, taken = split(train, problem, share * total / len(train), config.split_seed)
        if len(taken) == 0 or len(kept) == 0:
            many = " for so many labels (is --label-column right?)" if 2 * len(problem.labels) > total else ""
            raise UserError(
                f"{train.source}: {total} rows are too few{many} to split off {part}; give --{part}-split 0"
            )
        parts["train"], parts[part] = train.take(kept), train.take(taken)


def split(examples: Examples, problem: Problem, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (kept, taken), `share` of each class taken; rows of equal text stay on one side, so none leaks."""
    rng = np.random.default_rng([seed, len(examples)])
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(text_keys(examples)):
        groups.setdefault(key, []).append(i)
    members = list(groups.values())
    labels = examples.labels or []
    if problem.kind == MULTI:
        taken = _iterative_stratification([[labels[row] for row in rows] for rows in members], share, rng)
    else:
        firsts = [labels[rows[0]] for rows in members]
        strata = _value_ranges(firsts) if problem.kind == REGRESSION else firsts
        taken = _stratified(strata, [len(rows) for rows in members], share, rng)
    chosen = np.zeros(len(examples), dtype=bool)
    chosen[[row for group in taken for row in members[group]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _value_ranges(values: list[float]) -> list[int]:
    """Ten ranges with as many values each, fewer where there are few values."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    ranges = min(10, max(1, len(values) // 10))
    return (ranks * ranges // max(len(values), 1)).tolist()


def _stratified(strata: list[Any], sizes: list[int], share: float, rng: np.random.Generator) -> list[int]:
    """The groups to take, `share` of the rows of each stratum; at least one group of each stays."""
    groups: dict[Any, list[int]] = {}
    for group, stratum in enumerate(strata):
        groups.setdefault(stratum, []).append(group)
    taken = []
    owed = 0.0  # what rounding in one stratum left over is made up for in the next
    for stratum in sorted(groups, key=str):
        owed += share * sum(sizes[group] for group in groups[stratum])
        for group in rng.permutation(groups[stratum])[: len(groups[stratum]) - 1]:
            if sizes[group] > owed + 0.5:
                break
            taken.append(int(group))
            owed -= sizes[group]
    return taken


def _iterative_stratification(labels_of: list[list[list[str]]], share: float, rng: np.random.Generator) -> list[int]:
    """The groups to take of rows with several labels each, `share` of the rows of each label (Sechidis et al. 2011).

    The label with the fewest rows left goes first, as later nothing could make up for it; each of its groups goes to
    the side that lacks the label more. labels_of: for each group the labels of each of its rows.
    """
    counts = [Counter(name for names in rows for name in names) for rows in labels_of]
    shares = np.array([1 - share, share])
    lacking = {name: shares * count for name, count in sum_of(counts).items()}  # rows that each side still lacks
    lacking_rows = shares * sum(map(len, labels_of))
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


def sum_of(counts: list[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
