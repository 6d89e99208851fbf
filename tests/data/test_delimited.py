"""CSV and TSV as people have them: delimiters, quotes, headers, rows that are broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import data_file

from minibert.config import RunConfig
from minibert.data import delimited
from minibert.data.columns import find_columns
from minibert.data.tables import read_table
from minibert.errors import UserError


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "~"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str, name: str) -> None:
    lines = [["text", "label"], ["one and more", "x"], ["two", "y"]]
    table = read_table(data_file(tmp_path, "\n".join(delimiter.join(line) for line in lines), name))
    assert table.columns == {"text": ["one and more", "two"], "label": ["x", "y"]}


def test_bare_quotes_in_tsv_are_text_and_quoted_tsv_is_not(tmp_path: Path) -> None:
    bare = read_table(data_file(tmp_path, 'text\tlabel\nsize 5" pipe\tx\n"half quoted\ty\n', "a.tsv"))
    assert bare.columns["text"] == ['size 5" pipe', '"half quoted']
    quoted = read_table(data_file(tmp_path, 'text\tlabel\n"with\ttab"\tx\n"and ""quote"""\ty\n', "b.tsv"))
    assert quoted.columns["text"] == ["with\ttab", 'and "quote"']


def test_no_header_names_columns_by_place_and_fills_short_rows(tmp_path: Path) -> None:
    table = read_table(data_file(tmp_path, "a,b\nc,d,e\n"), header=False)
    assert table.columns == {"0": ["a", "c"], "1": ["b", "d"], "2": [None, "e"]}


def test_nameless_and_repeated_columns(tmp_path: Path) -> None:
    assert list(read_table(data_file(tmp_path, ",text\n0,a\n")).columns) == ["0", "text"]
    table = read_table(data_file(tmp_path, "id,text,label,id,id\n1,a,x,2,3\n"))
    assert list(table.columns) == ["id", "text", "label", "id (2)", "id (3)"]
    assert find_columns(table, RunConfig()).text == ("text",)
    with pytest.raises(UserError, match="'text' appears twice"):
        find_columns(read_table(data_file(tmp_path, "text,text,label\na,b,x\n")), RunConfig())


def test_row_names_of_r(tmp_path: Path) -> None:
    table = read_table(
        data_file(tmp_path, 'text label\n"1" "so good" "a"\n"2" "so bad" "b"\n'.replace(" ", "\t"), "a.tsv")
    )
    assert list(table.columns) == ["0", "text", "label"] and table.columns["label"] == ["a", "b"]
    with pytest.raises(UserError, match="3 cells where the header has 2"):
        read_table(data_file(tmp_path, "text,label\nwell, yes,a\noh, no,b\n"))


def test_texts_below_one_name_may_hold_commas(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text\nI like it, really\nso so\na, b, c\n")
    assert read_table(path).columns == {"text": ["I like it, really", "so so", "a, b, c"]}
    with pytest.raises(UserError, match="2 cells where the header has 1"):  # a label without a name
        read_table(data_file(tmp_path, "text\ngood,1\nbad,0\n"))


def test_a_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text,label\na,x\ntext,label\nb,y\n")
    with pytest.raises(UserError, match="line 3: the header again"):
        read_table(path)
    assert read_table(path, on_bad_rows="skip").columns == {"text": ["a", "b"], "label": ["x", "y"]}


def test_a_quote_never_closed_says_how_many_lines_it_took(tmp_path: Path) -> None:
    path = data_file(tmp_path, 'text,label\none,x\n"two,y\nthree,x\nfour,y\n')
    with pytest.raises(UserError, match="line 3: a quote is not closed, and takes in 2 more lines"):
        read_table(path)


def test_without_header_an_unquoted_comma_is_a_bad_row_not_another_column(tmp_path: Path) -> None:
    path = data_file(tmp_path, "a,x\nb,y\nwell, yes,x\nc,y\n")
    table = read_table(path, header=False, on_bad_rows="skip")
    assert table.columns == {"0": ["a", "b", "c"], "1": ["x", "y", "y"]}
    assert [(row.line, row.reason) for row in table.bad] == [(3, "3 cells where most rows have 2")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_single_quotes(tmp_path: Path, delimiter: str) -> None:
    lines = [["'text'", "'label'"], [f"'one{delimiter} two'", "'x'"], ["'it''s'", "'y'"]]
    path = data_file(tmp_path, "\n".join(delimiter.join(line) for line in lines))
    assert read_table(path).columns["text"] == (
        [f"one{delimiter} two", "it's"] if delimiter != "\t" else ["one\t two", "it's"]
    )


def test_backslash_quotes_and_apostrophes(tmp_path: Path) -> None:
    path = data_file(tmp_path, 'text,label\n"say \\"hi, you\\" now",x\n"plain",y\n')
    assert read_table(path).columns == {"text": ['say "hi, you" now', "plain"], "label": ["x", "y"]}
    path = data_file(tmp_path, "text,label\n'tis one,x\nthe dogs',y\n")
    assert read_table(path).columns["text"] == ["'tis one", "the dogs'"]


def test_one_ragged_row_does_not_hide_the_delimiter(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text;label\none, two;x\nthree; four;y\nfive, six;x\nseven;y\n")
    assert read_table(path, on_bad_rows="skip").columns["text"] == ["one, two", "five, six", "seven"]


@pytest.mark.parametrize(
    "content",
    [
        '"text", "label"\n"one, two", "x"\n"three", "y"\n',
        "sep=;\ntext;label\none, two;x\nthree;y\n",
        'text,label\n"one, two",x,,\nthree,y,\n',
    ],
)
def test_spaces_before_quotes_a_spreadsheets_first_line_and_empty_cells_too_many(tmp_path: Path, content: str) -> None:
    table = read_table(data_file(tmp_path, content))
    assert table.columns == {"text": ["one, two", "three"], "label": ["x", "y"]}


def test_a_quoted_tsv_is_found_out_though_the_sample_ends_inside_quotes(tmp_path: Path) -> None:
    rows = [f"a text\tof row {i}" for i in range(20_000)]
    path = data_file(tmp_path, '"text"\t"label"\n' + "".join(f'"{row}"\t"x"\n' for row in rows), "a.tsv")
    assert path.stat().st_size > delimited.SAMPLE and read_table(path).columns["text"] == rows


def numbered(count: int, **odd: str) -> list[str]:
    """Lines `text number i, a or b` with a tab between, some of them otherwise."""
    return [odd.get(f"row_{i}", f"text number {i}\t{'ab'[i % 2]}") for i in range(count)]


@pytest.mark.parametrize(
    "rows",
    [
        numbered(60, row_20='"It begins a quotation\ta', row_40='and here it ends"\tb'),
        numbered(60, row_20='"It begins\ta', row_40='"This one begins, too\ta'),
        numbered(12_000, row_11_000='"Unclosed\ta', row_11_500='"Another one\tb'),
    ],
)
def test_stray_quotes_merge_no_rows_of_a_tsv(tmp_path: Path, rows: list[str]) -> None:
    path = data_file(tmp_path, "\n".join(["text\tlabel", *rows]) + "\n", "a.tsv")
    try:
        table = read_table(path)
    except UserError as error:  # beyond the first rows, which decide on quoting
        assert "a quote is not closed, and takes in 500 more lines" in str(error)
    else:
        assert table.columns["text"] == [row.split("\t")[0] for row in rows]


def test_a_quote_that_is_not_closed_is_a_bad_row(tmp_path: Path) -> None:
    lines = [f"{i},text number {i},{'ab'[i % 2]}" for i in range(400)]
    lines[100], lines[300] = '100,"hello there,a', '300,"see you,b'
    path = data_file(tmp_path, "\n".join(["id,text,label", *lines]) + "\n")
    with pytest.raises(UserError, match="line 102: a quote is not closed, and takes in 200 more lines"):
        read_table(path)
    assert len(read_table(path, on_bad_rows="skip").lines) == 199
    good = "".join(f'{i},"a text, with\r\nlines, ""quotes""\n\nof {i}",a\n' for i in range(40))
    assert len(read_table(data_file(tmp_path, "id,text,label\n" + good)).lines) == 40


def test_blanks_before_quotes_below_a_plain_header(tmp_path: Path) -> None:
    path = data_file(tmp_path, "label, text\n" + "".join(f'{i}, "love, hate {i}"\n' for i in range(9)))
    assert read_table(path).columns["text"][:2] == ["love, hate 0", "love, hate 1"]
    path = data_file(tmp_path, 'label,text\n1,"a, "" b"\n2," ""c"""\n')
    assert read_table(path).columns["text"] == ['a, " b', ' "c"']


def test_a_spreadsheet_says_its_delimiter(tmp_path: Path) -> None:
    path = data_file(tmp_path, "sep=;\nid;text;label\n" + "".join(f"{i};love, hate;a\n" for i in range(9)))
    assert list(read_table(path).columns) == ["id", "text", "label"]


def test_a_nameless_column_beside_one_called_0(tmp_path: Path) -> None:
    assert list(read_table(data_file(tmp_path, ",0,1\n5,some words,a\n")).columns) == ["unnamed 0", "0", "1"]
