"""What Python callers have -> what a run trains on: texts and labels, or tables such as a DataFrame or a Dataset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minibert.config import DataSettings
from minibert.data.columns import find_columns
from minibert.data.examples import examples_from_lists, examples_from_table, plain_values, sample_weights
from minibert.data.loading import RunData, columns_like, prepare
from minibert.data.rows import Table, check_width
from minibert.errors import UserError


def load_in_memory(
    given: dict[str, Any], config: DataSettings, sample_weight: Iterable[float] | None = None
) -> RunData:
    """Of each split (texts, labels), or a table of both; the columns of a table are found as those of a file."""
    tables = {split: table_of(data, split) for split, data in given.items()}
    train = tables["train"]
    if train is None and not (isinstance(given["train"], tuple | list) and len(given["train"]) == 2):
        raise UserError("labels are missing; give one for each text, or a table or a file that has both")
    if train is None:
        if asked := [name for name in ("text_column", "text_pair_column", "label_column") if getattr(config, name)]:
            raise UserError(f"{asked[0]}: is for tables and files; leave it out, or give a table without labels")
        splits, found = examples_from_lists(given, config.label_delimiter, sample_weight)
        return prepare(splits, found, config, [])
    columns = find_columns(train, config)
    splits = {"train": examples_from_table(train, columns)}
    splits["train"].weights = sample_weights(sample_weight, len(splits["train"]))
    for split, table in tables.items():
        if table is None:
            raise UserError(f"{split}: expected a table, as for training")
        splits[split] = splits.get(split) or examples_from_table(table, columns_like(columns, table, config, True))
    return prepare(splits, columns, config, [str(columns)])


def table_of(data: Any, split: str) -> Table | None:
    """A DataFrame of pandas or polars, an Arrow table or a Dataset as a table; None for anything else."""
    if isinstance(data, tuple | list):
        return None
    names = getattr(data, "column_names", None)  # of Arrow and of datasets
    names = names if isinstance(names, list) else getattr(data, "columns", None)
    if names is None:
        return None
    names = list(names)
    features = getattr(data, "features", None) or {}
    if hasattr(data, "with_format") and features:
        data = data.with_format(None)  # of numpy's or torch's arrays Python's values
    check_width(split, len(names))
    columns = {str(name): _with_class_names(plain_values(data[name]), features.get(name)) for name in names}
    rows = len(next(iter(columns.values()), []))
    return Table(f"{split} table", columns, list(range(rows)))


def _with_class_names(column: Any, feature: Any) -> list[Any]:
    """The names of a Dataset's ClassLabel in place of its numbers, in lists of them too; -1 says that none is given."""
    names = getattr(feature, "names", None)
    if isinstance(names, list):
        return [names[value] if value is not None and value >= 0 else None for value in column]
    names = getattr(getattr(feature, "feature", None), "names", None)
    if isinstance(names, list):
        return [value and [names[number] for number in value] for value in column]
    return [plain_values(value) for value in column]
