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
from data_files import data_file

from minibert.data import sources
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


ROWS = {"text": ["a, b", 'say "hi"', "two\nlines", "last"], "label": ["x", "y", "x", "y"]}

CSV = 'text,label\n"a, b",x\n"say ""hi""",y\n"two\nlines",x\nlast,y\n'


def test_csv_with_quotes_and_newlines_keeps_line_numbers(tmp_path: Path) -> None:
    table = read_table(data_file(tmp_path, CSV))
    assert table.columns == ROWS and table.lines == [2, 3, 4, 6]


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_other_line_endings(tmp_path: Path, ending: str) -> None:
    table = read_table(data_file(tmp_path, f"text,label{ending}one,x{ending}{ending}two,y{ending}"))
    assert table.columns == {"text": ["one", "two"], "label": ["x", "y"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_found(tmp_path: Path, encoding: str) -> None:
    table = read_table(data_file(tmp_path, "text,label\ncafé naïve,é\n".encode(encoding)))
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
    table = read_table(data_file(tmp_path, content.encode(encoding)))
    assert table.encoding == encoding
    assert table.columns == {"text": texts, "label": labels}


def test_a_sample_that_ends_inside_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the start of a large file is looked at; all of it must read in the encoding that is chosen."""
    content = "text,label\n" + "".join(f"这部电影非常好看{number},好\n" for number in range(20))
    for size in range(200, 208):
        monkeypatch.setattr(sources, "SAMPLE", size)
        assert read_table(data_file(tmp_path, content.encode("gb18030"))).encoding == "gb18030"


def test_encoding_flag_wins_and_must_exist(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text,label\nпривет,x\n".encode("koi8-r"))
    assert read_table(path, encoding="koi8-r").columns["text"] == ["привет"]
    with pytest.raises(UserError, match="no such encoding"):
        read_table(path, encoding="klingon")
    with pytest.raises(UserError, match="not utf-8 text"):
        read_table(path, encoding="utf-8")


def test_long_cells_are_read_and_the_limit_of_csv_stays(tmp_path: Path) -> None:
    """csv's limit is of the whole process: it is back before anyone else runs, also in the middle of a file."""
    before, long = csv.field_size_limit(), "long text " * 30_000
    path = data_file(tmp_path, f'text,label\n{long},x\n"{long}\nend",y\nshort,z\n')
    for table in stream_table(path, rows=1):
        assert csv.field_size_limit() == before and table.columns["label"]
    assert read_table(path).columns["text"] == [long, f"{long}\nend", "short"]
    assert csv.field_size_limit() == before


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
    columns = read_table(data_file(tmp_path, content, "a.json")).columns
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
    path = data_file(tmp_path, "text,label\n" + "".join(f"text {i},{i % 3}\n" for i in range(1000)))
    parts = list(stream_table(path, rows=64))
    assert [len(part.lines) for part in parts] == [64] * 15 + [40]
    assert [t for part in parts for t in part.columns["text"]] == read_table(path).columns["text"]
    assert parts[1].lines[0] == 66


def test_json_lines_with_other_line_separators_in_a_text(tmp_path: Path) -> None:
    path = data_file(tmp_path, '{"text": "a\u2028b", "label": 1}\n{"text": "c", "label": 2}\n', "a.json")
    assert read_table(path).columns["text"] == ["a\u2028b", "c"]


def test_header_alone_is_a_table_without_rows(tmp_path: Path) -> None:
    table = read_table(data_file(tmp_path, "text,label\n"))
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
    path = data_file(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path)


def test_bad_rows_are_counted_by_reason_and_left_out_when_asked(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text,label\none,x\na,b,c\ntwo,y\nd,e,f\nalone\n")
    with pytest.raises(UserError, match=r"line 3, 5: 2 rows: 3 cells where the header has 2; line 6: 1 cell where"):
        read_table(path)
    table = read_table(path, on_bad_rows="skip")
    assert table.columns == {"text": ["one", "two"], "label": ["x", "y"]} and table.lines == [2, 4]
    assert [row.line for row in table.bad] == [3, 5, 6]


def test_bad_rows_of_json_lines(tmp_path: Path) -> None:
    path = data_file(tmp_path, '{"text": "a"}\n{"text": \n[1]\n"not JSON"\n{"text": "b"}\n', "a.jsonl")
    table = read_table(path, on_bad_rows="skip")
    assert table.columns == {"text": ["a", "b"]} and table.lines == [1, 5]
    assert [(row.line, row.reason.split(" (")[0][:8]) for row in table.bad] == [
        (2, "not JSON"),
        (3, "expected"),
        (4, "expected"),
    ]


def test_a_mark_does_not_become_part_of_a_name(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text,label\r\na,x\r\n".encode("utf-8-sig"))
    assert list(read_table(path, encoding="utf-8").columns) == ["text", "label"]


def test_latin_1_where_cp1252_has_no_character(tmp_path: Path) -> None:
    table = read_table(data_file(tmp_path, b"text,label\ncaf\xe9 \x81,x\n"))
    assert table.encoding == "latin-1" and table.columns["text"] == ["café \x81"]


def test_a_bad_byte_in_much_utf8_is_named_and_not_read_as_cp1252(tmp_path: Path) -> None:
    path = data_file(tmp_path, "text,label\nnaïve café,x\n".encode() + b"caf\xe9,y\n")
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
    table = read_table(data_file(tmp_path, lines, "a.txt"))
    assert table.columns == {"label": ["__label__a", ["__label__b", "__label__c"]], "text": ["one", "two three"]}
    for plain in ("http://example.org is a link\n12:30 is a time\n", "10 things\n10 ways\n", "RT @you: hi\nRT hi\n"):
        assert read_table(data_file(tmp_path, plain, "a.txt")).columns == {"text": plain.splitlines()}
    ragged = read_table(data_file(tmp_path, "x\tone\ny\ttwo\tthree\n", "a.txt"), header=False)
    assert ragged.columns == {"0": ["x", "y"], "1": ["one", "two"], "2": [None, "three"]}


@pytest.mark.parametrize(
    "content",
    [
        {"text": {"0": "hello"}, "label": {"0": "a"}},
        {"0": {"text": "hello", "label": "a"}},
    ],
)
def test_json_of_a_single_row(tmp_path: Path, content: dict[str, Any]) -> None:
    assert read_table(data_file(tmp_path, json.dumps(content), "a.json")).columns == {"text": ["hello"], "label": ["a"]}


def test_parquet_of_bytes(tmp_path: Path) -> None:
    columns = {"text": ["é".encode(), None], "label": [b"a", b"b"], "image": [b"\xff", b"\xfe"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet").columns
    assert read == {"text": ["é", None], "label": ["a", "b"], "image": [b"\xff", b"\xfe"]}
