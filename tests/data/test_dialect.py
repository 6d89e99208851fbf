"""What --delimiter, --quote and --positive-label say, and the kind of quotes that is guessed without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from minibert.config import RunConfig
from minibert.data.loading import load_data
from minibert.data.tables import read_table
from minibert.errors import UserError


def write(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def two_labels() -> list[str]:
    return [f"film {i},{'legit' if i % 2 else 'fraud'}" for i in range(40)]


def test_single_quotes_are_seen_where_few_cells_need_them(tmp_path: Path) -> None:
    """Writers quote only the cells that hold the delimiter; apostrophes elsewhere are no quotes."""
    plain = [f"it's film {i};good" for i in range(84)]
    quoted = [f"'a film; number {i}';bad" for i in range(8)]
    table = read_table(write(tmp_path / "rows.csv", ["text;label", *plain, *quoted]))
    assert not table.bad and len(table.lines) == 92
    assert table.columns["text"][0] == "it's film 0" and table.columns["text"][-1] == "a film; number 7"
    apostrophes = read_table(write(tmp_path / "words.csv", ["text;label", "'tis;good", "so 'tis';bad", "'no';bad"]))
    assert apostrophes.columns["text"] == ["'tis", "so 'tis'", "'no'"]


def test_the_dialect_that_is_given_is_obeyed(tmp_path: Path) -> None:
    rows = ["text^label", *(f"~a ^ film {i}~^{'good' if i % 2 else 'bad'}" for i in range(40))]
    data = load_data(RunConfig(train=write(tmp_path / "rows.csv", rows), delimiter="^", quote="~"))
    texts = [text for split in data.splits.values() for text in split.texts]
    assert len(texts) == 40 and "a ^ film 3" in texts
    tabs = ["text\tlabel", *(f'"film" {i}\t{"good" if i % 2 else "bad"}' for i in range(40))]
    data = load_data(RunConfig(train=write(tmp_path / "tabs.csv", tabs), delimiter="tab", quote="none"))
    assert '"film" 3' in [text for split in data.splits.values() for text in split.texts]


def test_the_positive_label_is_the_second(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ["text,label", *two_labels()])
    usual, chosen = load_data(RunConfig(train=path)), load_data(RunConfig(train=path, positive_label="fraud"))
    assert usual.problem.labels == ["fraud", "legit"] and chosen.problem.labels == ["legit", "fraud"]
    assert any("positive class is 'legit'" in note for note in usual.notes)
    assert any("positive class is 'fraud'" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"delimiter": "ab"}, "--delimiter 'ab': give one character, or tab"),
        ({"quote": "ab"}, "--quote 'ab': give one character, or none"),
        ({"positive_label": "spam"}, "--positive-label spam: not a label here; give fraud or legit"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, flags: dict[str, str], message: str) -> None:
    path = write(tmp_path / "rows.csv", ["text,label", *two_labels()])
    with pytest.raises(UserError, match=message):
        load_data(RunConfig(train=path, **flags))
