"""Files as people have them: real ones by their row counts, and each rule on a file written for it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minibert.config import RunConfig
from minibert.data import delimited, sources
from minibert.data.columns import find_columns
from minibert.data.tables import read_table, stream_table
from minibert.errors import UserError


@pytest.mark.parametrize(
    ("name", "header", "rows", "columns"),
    [
        ("sms_spam/spamdata_v2.csv", True, 5572, ["label", "text"]),
        ("sst2/train.tsv", False, 6920, ["0", "1"]),
        ("sst2/dev.tsv", False, 872, ["0", "1"]),
        ("sst2/test.tsv", False, 1821, ["0", "1"]),
        ("mrpc/msr_paraphrase_train.txt", True, 4076, ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]),
        ("mrpc/msr_paraphrase_test.txt", True, 1725, ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]),
        ("stsb/glue/dev.tsv", True, 1500, None),
        ("stsb/original/sts-train.tsv", False, 5749, [str(i) for i in range(9)]),
        ("stsb/original/sts-test.tsv", False, 1379, [str(i) for i in range(9)]),
        ("multilabel/goemotions/train.tsv", False, 43410, ["0", "1", "2"]),
        ("trec/train_5500.label", True, 5452, ["label", "text"]),
        ("trec/TREC_10.label", True, 500, ["label", "text"]),
    ],
)
def test_real_files(shared_data: Path, name: str, header: bool, rows: int, columns: list[str] | None) -> None:
    table = read_table(shared_data / name, header=header)
    assert len(table.lines) == rows
    assert all(len(values) == rows for values in table.columns.values())
    if columns is not None:
        assert list(table.columns) == columns


def write(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ROWS = {"text": ["a, b", 'say "hi"', "two\nlines", "last"], "label": ["x", "y", "x", "y"]}
CSV = 'text,label\n"a, b",x\n"say ""hi""",y\n"two\nlines",x\nlast,y\n'


def test_csv_with_quotes_and_newlines_keeps_line_numbers(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, CSV))
    assert table.columns == ROWS and table.lines == [2, 3, 4, 6]


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_other_line_endings(tmp_path: Path, ending: str) -> None:
    table = read_table(write(tmp_path, f"text,label{ending}one,x{ending}{ending}two,y{ending}"))
    assert table.columns == {"text": ["one", "two"], "label": ["x", "y"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_found(tmp_path: Path, encoding: str) -> None:
    table = read_table(write(tmp_path, "text,label\ncafé naïve,é\n".encode(encoding)))
    assert table.columns == {"text": ["café naïve"], "label": ["é"]}
    assert table.encoding == encoding.removesuffix("-sig")


OTHER_SCRIPTS = {
    "cp1251": "Это очень хороший фильм|хорошо|Ужасная еда и плохое обслуживание|плохо",
    "koi8_r": "Это очень хороший фильм|хорошо|Ужасная еда и плохое обслуживание|плохо",
    "cp1250": "Zażółć gęślą jaźń; to świetny film|świetny|Příliš žluťoučký kůň úpěl ďábelské ódy|špatný",
    "cp1252": "un très bon film “déjà vu”|élevé|schöner Film über Straßen|schön",
    "cp1253": "μια πολύ καλή ταινία|καλή|το φαγητό ήταν κακό|κακή",
    "gb18030": "这部电影非常好看|好|服务太差了不会再来|坏",
    "cp932": "この映画はとても面白かったです|良い|サービスがひどかった|悪い",
    "big5": "這部電影非常好看|好|服務太差了不會再來|壞",
    "cp949": "정말 좋은 영화입니다|좋음|서비스가 너무 나빴어요|나쁨",
    "utf_16_le": "a good film|good|a bad film|bad",
    "utf_16_be": "un très bon film|élevé|schöner Film über Straßen|schön",
}


@pytest.mark.parametrize("encoding", OTHER_SCRIPTS)
def test_encodings_of_other_scripts_are_told_apart(tmp_path: Path, encoding: str) -> None:
    first, one, second, two = OTHER_SCRIPTS[encoding].split("|")
    texts = [f"{first if number % 2 else second} {number}" for number in range(40)]
    labels = [one if number % 2 else two for number in range(40)]
    content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    table = read_table(write(tmp_path, content.encode(encoding)))
    assert table.encoding == encoding
    assert table.columns == {"text": texts, "label": labels}


def test_a_sample_that_ends_inside_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the start of a large file is looked at; all of it must read in the encoding that is chosen."""
    content = "text,label\n" + "".join(f"这部电影非常好看{number},好\n" for number in range(20))
    for size in range(200, 208):
        monkeypatch.setattr(sources, "SAMPLE", size)
        assert read_table(write(tmp_path, content.encode("gb18030"))).encoding == "gb18030"


def test_encoding_flag_wins_and_must_exist(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\nпривет,x\n".encode("koi8-r"))
    assert read_table(path, encoding="koi8-r").columns["text"] == ["привет"]
    with pytest.raises(UserError, match="no such encoding"):
        read_table(path, encoding="klingon")
    with pytest.raises(UserError, match="not utf-8 text"):
        read_table(path, encoding="utf-8")


def test_long_cells_are_read_and_the_limit_of_csv_stays(tmp_path: Path) -> None:
    """csv's limit is of the whole process: it is back before anyone else runs, also in the middle of a file."""
    before, long = csv.field_size_limit(), "long text " * 30_000
    path = write(tmp_path, f'text,label\n{long},x\n"{long}\nend",y\nshort,z\n')
    for table in stream_table(path, rows=1):
        assert csv.field_size_limit() == before and table.columns["label"]
    assert read_table(path).columns["text"] == [long, f"{long}\nend", "short"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "~"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str, name: str) -> None:
    lines = [["text", "label"], ["one and more", "x"], ["two", "y"]]
    table = read_table(write(tmp_path, "\n".join(delimiter.join(line) for line in lines), name))
    assert table.columns == {"text": ["one and more", "two"], "label": ["x", "y"]}


def test_bare_quotes_in_tsv_are_text_and_quoted_tsv_is_not(tmp_path: Path) -> None:
    bare = read_table(write(tmp_path, 'text\tlabel\nsize 5" pipe\tx\n"half quoted\ty\n', "a.tsv"))
    assert bare.columns["text"] == ['size 5" pipe', '"half quoted']
    quoted = read_table(write(tmp_path, 'text\tlabel\n"with\ttab"\tx\n"and ""quote"""\ty\n', "b.tsv"))
    assert quoted.columns["text"] == ["with\ttab", 'and "quote"']


def test_no_header_names_columns_by_place_and_fills_short_rows(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a,b\nc,d,e\n"), header=False)
    assert table.columns == {"0": ["a", "c"], "1": ["b", "d"], "2": [None, "e"]}


def test_nameless_and_repeated_columns(tmp_path: Path) -> None:
    assert list(read_table(write(tmp_path, ",text\n0,a\n")).columns) == ["0", "text"]
    table = read_table(write(tmp_path, "id,text,label,id,id\n1,a,x,2,3\n"))
    assert list(table.columns) == ["id", "text", "label", "id (2)", "id (3)"]
    assert find_columns(table, RunConfig()).text == ("text",)
    with pytest.raises(UserError, match="'text' appears twice"):
        find_columns(read_table(write(tmp_path, "text,text,label\na,b,x\n")), RunConfig())


def test_row_names_of_r(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'text label\n"1" "so good" "a"\n"2" "so bad" "b"\n'.replace(" ", "\t"), "a.tsv"))
    assert list(table.columns) == ["0", "text", "label"] and table.columns["label"] == ["a", "b"]
    with pytest.raises(UserError, match="3 cells where the header has 2"):
        read_table(write(tmp_path, "text,label\nwell, yes,a\noh, no,b\n"))


def test_texts_below_one_name_may_hold_commas(tmp_path: Path) -> None:
    path = write(tmp_path, "text\nI like it, really\nso so\na, b, c\n")
    assert read_table(path).columns == {"text": ["I like it, really", "so so", "a, b, c"]}
    with pytest.raises(UserError, match="2 cells where the header has 1"):  # a label without a name
        read_table(write(tmp_path, "text\ngood,1\nbad,0\n"))


@pytest.mark.parametrize("pack", ["gz", "zip"])
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_packed_files(tmp_path: Path, pack: str, name: str) -> None:
    lines = [json.dumps(dict(zip(ROWS, row, strict=True))) for row in zip(*ROWS.values(), strict=True)]
    content = CSV if name.endswith("csv") else "\n".join(lines)
    path = tmp_path / f"{name}.{pack}"
    if pack == "gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"folder/{name}", content)
    assert read_table(path).columns == ROWS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a", "label": 1}, {"text": "b", "label": None}]),
        json.dumps({"text": ["a", "b"], "label": [1, None]}),
        '{"text": "a", "label": 1}\n{"text": "b"}\n',
        '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": null}}',  # pandas: orient="columns", "index", "split"
        '{"0": {"text": "a", "label": 1}, "1": {"text": "b", "label": null}, "2": {"text": "c", "label": 2}}',
        '{"columns": ["text", "label"], "index": [0, 1], "data": [["a", 1], ["b", null]]}',
        '{"version": 1, "data": [{"text": "a", "label": 1}, {"text": "b"}]}',
        '{"data": [{"text": "a", "label": 1}, {"text": "b"}]}',
    ],
)
def test_json_in_its_forms(tmp_path: Path, content: str) -> None:
    columns = read_table(write(tmp_path, content, "a.json")).columns
    assert {name: values[:2] for name, values in columns.items()} == {"text": ["a", "b"], "label": [1, None]}


def test_parquet_keeps_types(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "label": [1.5, None], "tags": [["x"], ["y", "z"]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns == columns


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    twice = pyarrow.Table.from_arrays(columns, names=["text", "label", "label"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are named 'label'; rename one"):
        read_table(tmp_path / "a.parquet")


def test_streaming_gives_the_same_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\n" + "".join(f"text {i},{i % 3}\n" for i in range(1000)))
    parts = list(stream_table(path, rows=64))
    assert [len(part.lines) for part in parts] == [64] * 15 + [40]
    assert [t for part in parts for t in part.columns["text"]] == read_table(path).columns["text"]
    assert parts[1].lines[0] == 66


def test_a_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\na,x\ntext,label\nb,y\n")
    with pytest.raises(UserError, match="line 3: the header again"):
        read_table(path)
    assert read_table(path, on_bad_rows="skip").columns == {"text": ["a", "b"], "label": ["x", "y"]}


def test_json_lines_with_other_line_separators_in_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a\u2028b", "label": 1}\n{"text": "c", "label": 2}\n', "a.json")
    assert read_table(path).columns["text"] == ["a\u2028b", "c"]


def test_header_alone_is_a_table_without_rows(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "text,label\n"))
    assert table.columns == {"text": [], "label": []} and table.lines == []


def bomb() -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(b"text,label\n")
        for _ in range(100):
            file.write(b"x" * (1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "empty"),
        ("a.csv", b"text,label\none,x\ntwo,y,z\n", "line 3: 3 cells where the header has 2"),
        ("a.csv", b'text,label\n"never closed,x\n', "line 2"),
        ("a.csv", b"text,label\na\x00b,x\n", "NUL"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: expected an object"),
        ("a.json", b'{"text": ["a"], "label": []}', "differ in length"),
        ("a.json", b"3", "expected an array"),
        ("a.json", b'[{"text": "a", "label": "b"}, {"te', "not JSON"),
        ("a.json", b"{", "not JSON"),
        ("a.parquet", b"PAR1 not really PAR1", "cannot be read as Parquet"),
        ("a.csv.gz", b"not gzip", "cannot be read"),
        ("a.zip", b"not a zip", "cannot be read as zip"),
        ("a.docx", b"x", "unknown kind of file"),
        ("a.xls", b"x", "a spreadsheet; save it as .xlsx or .csv"),
        ("a.xlsx", b"x", "cannot be read as .xlsx"),
        ("bomb.csv.gz", bomb(), "longer than"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path)


def test_bad_rows_are_counted_by_reason_and_left_out_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\none,x\na,b,c\ntwo,y\nd,e,f\nalone\n")
    with pytest.raises(UserError, match=r"line 3, 5: 2 rows: 3 cells where the header has 2; line 6: 1 cell where"):
        read_table(path)
    table = read_table(path, on_bad_rows="skip")
    assert table.columns == {"text": ["one", "two"], "label": ["x", "y"]} and table.lines == [2, 4]
    assert [row.line for row in table.bad] == [3, 5, 6]


def test_bad_rows_of_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a"}\n{"text": \n[1]\n"not JSON"\n{"text": "b"}\n', "a.jsonl")
    table = read_table(path, on_bad_rows="skip")
    assert table.columns == {"text": ["a", "b"]} and table.lines == [1, 5]
    assert [(row.line, row.reason.split(" (")[0][:8]) for row in table.bad] == [
        (2, "not JSON"),
        (3, "expected"),
        (4, "expected"),
    ]


def test_a_quote_never_closed_says_how_many_lines_it_took(tmp_path: Path) -> None:
    path = write(tmp_path, 'text,label\none,x\n"two,y\nthree,x\nfour,y\n')
    with pytest.raises(UserError, match="line 3: a quote is not closed, and takes in 2 more lines"):
        read_table(path)


def test_without_header_an_unquoted_comma_is_a_bad_row_not_another_column(tmp_path: Path) -> None:
    path = write(tmp_path, "a,x\nb,y\nwell, yes,x\nc,y\n")
    table = read_table(path, header=False, on_bad_rows="skip")
    assert table.columns == {"0": ["a", "b", "c"], "1": ["x", "y", "y"]}
    assert [(row.line, row.reason) for row in table.bad] == [(3, "3 cells where most rows have 2")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_single_quotes(tmp_path: Path, delimiter: str) -> None:
    lines = [["'text'", "'label'"], [f"'one{delimiter} two'", "'x'"], ["'it''s'", "'y'"]]
    path = write(tmp_path, "\n".join(delimiter.join(line) for line in lines))
    assert read_table(path).columns["text"] == (
        [f"one{delimiter} two", "it's"] if delimiter != "\t" else ["one\t two", "it's"]
    )


def test_backslash_quotes_and_apostrophes(tmp_path: Path) -> None:
    path = write(tmp_path, 'text,label\n"say \\"hi, you\\" now",x\n"plain",y\n')
    assert read_table(path).columns == {"text": ['say "hi, you" now', "plain"], "label": ["x", "y"]}
    path = write(tmp_path, "text,label\n'tis one,x\nthe dogs',y\n")
    assert read_table(path).columns["text"] == ["'tis one", "the dogs'"]


def test_one_ragged_row_does_not_hide_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, "text;label\none, two;x\nthree; four;y\nfive, six;x\nseven;y\n")
    assert read_table(path, on_bad_rows="skip").columns["text"] == ["one, two", "five, six", "seven"]


def test_a_mark_does_not_become_part_of_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\r\na,x\r\n".encode("utf-8-sig"))
    assert list(read_table(path, encoding="utf-8").columns) == ["text", "label"]


def test_latin_1_where_cp1252_has_no_character(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, b"text,label\ncaf\xe9 \x81,x\n"))
    assert table.encoding == "latin-1" and table.columns["text"] == ["café \x81"]


def test_a_bad_byte_in_much_utf8_is_named_and_not_read_as_cp1252(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\nnaïve café,x\n".encode() + b"caf\xe9,y\n")
    with pytest.raises(UserError, match="line 3: not UTF-8, which the rest of the file is"):
        read_table(path)


@pytest.mark.parametrize("pack", ["gz", "zip"])
def test_packed_parquet(tmp_path: Path, pack: str) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(ROWS), buffer)
    path = tmp_path / f"a.parquet.{pack}"
    if pack == "gz":
        path.write_bytes(gzip.compress(buffer.getvalue()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.parquet", buffer.getvalue())
    assert read_table(path).columns == ROWS


@pytest.mark.parametrize(
    "content",
    [
        '"text", "label"\n"one, two", "x"\n"three", "y"\n',
        "sep=;\ntext;label\none, two;x\nthree;y\n",
        'text,label\n"one, two",x,,\nthree,y,\n',
    ],
)
def test_spaces_before_quotes_a_spreadsheets_first_line_and_empty_cells_too_many(tmp_path: Path, content: str) -> None:
    table = read_table(write(tmp_path, content))
    assert table.columns == {"text": ["one, two", "three"], "label": ["x", "y"]}


def test_of_an_archive_the_one_data_file_is_read(tmp_path: Path) -> None:
    for others, fine in ((["README.md", ".DS_Store", "__MACOSX/._a.csv"], True), (["b.csv"], False)):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in ["a.csv", *others]:
                archive.writestr(name, CSV)
        if fine:
            assert read_table(tmp_path / "a.zip").columns == ROWS
        else:
            with pytest.raises(UserError, match="holds 2 files"):
                read_table(tmp_path / "a.zip")


def test_a_quoted_tsv_is_found_out_though_the_sample_ends_inside_quotes(tmp_path: Path) -> None:
    rows = [f"a text\tof row {i}" for i in range(20_000)]
    path = write(tmp_path, '"text"\t"label"\n' + "".join(f'"{row}"\t"x"\n' for row in rows), "a.tsv")
    assert path.stat().st_size > delimited.SAMPLE and read_table(path).columns["text"] == rows


@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz", "rows.txt.zip"])
def test_a_tab_separated_txt_file_packed_or_not(tmp_path: Path, name: str) -> None:
    content = b"text\tlabel\ngood film\tpos\nbad film\tneg\n"
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.txt", content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_table(path).columns == {"text": ["good film", "bad film"], "label": ["pos", "neg"]}


def test_lines_with_labels_and_without(tmp_path: Path) -> None:
    lines = "__label__a one\n__label__b __label__c two three\n"
    table = read_table(write(tmp_path, lines, "a.txt"))
    assert table.columns == {"label": ["__label__a", ["__label__b", "__label__c"]], "text": ["one", "two three"]}
    for plain in ("http://example.org is a link\n12:30 is a time\n", "10 things\n10 ways\n", "RT @you: hi\nRT hi\n"):
        assert read_table(write(tmp_path, plain, "a.txt")).columns == {"text": plain.splitlines()}
    ragged = read_table(write(tmp_path, "x\tone\ny\ttwo\tthree\n", "a.txt"), header=False)
    assert ragged.columns == {"0": ["x", "y"], "1": ["one", "two"], "2": [None, "three"]}


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
    path = write(tmp_path, "\n".join(["text\tlabel", *rows]) + "\n", "a.tsv")
    try:
        table = read_table(path)
    except UserError as error:  # beyond the first rows, which decide on quoting
        assert "a quote is not closed, and takes in 500 more lines" in str(error)
    else:
        assert table.columns["text"] == [row.split("\t")[0] for row in rows]


def test_a_quote_that_is_not_closed_is_a_bad_row(tmp_path: Path) -> None:
    lines = [f"{i},text number {i},{'ab'[i % 2]}" for i in range(400)]
    lines[100], lines[300] = '100,"hello there,a', '300,"see you,b'
    path = write(tmp_path, "\n".join(["id,text,label", *lines]) + "\n")
    with pytest.raises(UserError, match="line 102: a quote is not closed, and takes in 200 more lines"):
        read_table(path)
    assert len(read_table(path, on_bad_rows="skip").lines) == 199
    good = "".join(f'{i},"a text, with\r\nlines, ""quotes""\n\nof {i}",a\n' for i in range(40))
    assert len(read_table(write(tmp_path, "id,text,label\n" + good)).lines) == 40


def test_blanks_before_quotes_below_a_plain_header(tmp_path: Path) -> None:
    path = write(tmp_path, "label, text\n" + "".join(f'{i}, "love, hate {i}"\n' for i in range(9)))
    assert read_table(path).columns["text"][:2] == ["love, hate 0", "love, hate 1"]
    path = write(tmp_path, 'label,text\n1,"a, "" b"\n2," ""c"""\n')
    assert read_table(path).columns["text"] == ['a, " b', ' "c"']


def test_a_spreadsheet_says_its_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, "sep=;\nid;text;label\n" + "".join(f"{i};love, hate;a\n" for i in range(9)))
    assert list(read_table(path).columns) == ["id", "text", "label"]


def test_a_nameless_column_beside_one_called_0(tmp_path: Path) -> None:
    assert list(read_table(write(tmp_path, ",0,1\n5,some words,a\n")).columns) == ["unnamed 0", "0", "1"]


@pytest.mark.parametrize(
    "content",
    [
        {"text": {"0": "hello"}, "label": {"0": "a"}},
        {"0": {"text": "hello", "label": "a"}},
    ],
)
def test_json_of_a_single_row(tmp_path: Path, content: dict[str, Any]) -> None:
    assert read_table(write(tmp_path, json.dumps(content), "a.json")).columns == {"text": ["hello"], "label": ["a"]}


def test_parquet_of_bytes(tmp_path: Path) -> None:
    columns = {"text": ["é".encode(), None], "label": [b"a", b"b"], "image": [b"\xff", b"\xfe"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet").columns
    assert read == {"text": ["é", None], "label": ["a", "b"], "image": [b"\xff", b"\xfe"]}
