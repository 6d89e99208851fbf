"""Which columns hold the texts and the labels: by name, as asked for, or as in training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_files import table, write

from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.data.columns import Columns, as_trained, find_columns, trained_columns
from minibert.data.examples import examples_from_table
from minibert.data.loading import load_data
from minibert.data.tables import stream_table
from minibert.errors import UserError
from minibert.inference.stream import stream_examples, stream_labelled
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem


@pytest.mark.parametrize(
    ("columns", "text", "pair", "label"),
    [
        (["id", "text", "label"], ("text",), None, ("label",)),
        (["Review", "Sentiment"], ("Review",), None, ("Sentiment",)),
        (["v1", "v2"], ("v2",), None, ("v1",)),
        (["qid", "question_text", "target"], ("question_text",), None, ("target",)),
        (["sentence1", "sentence2", "score"], ("sentence1",), "sentence2", ("score",)),
        (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ("#1 String",), "#2 String", ("Quality",)),
        (["Category", "Resume"], ("Resume",), None, ("Category",)),
        (["index", "question", "sentence", "label"], ("question",), "sentence", ("label",)),
        (["Class Index", "Title", "Description"], ("Description",), None, ("Class Index",)),
        (["Clothing ID", "Title", "Review Text", "Rating"], ("Review Text",), None, ("Rating",)),
    ],
)
def test_columns_are_found_by_name(
    columns: list[str], text: tuple[str, ...], pair: str | None, label: tuple[str, ...]
) -> None:
    found = find_columns(table(**{name: ["a", "b"] for name in columns}), RunConfig())
    assert found == Columns(text, pair, label)


def test_of_two_nameless_columns_the_one_with_few_values_is_the_label() -> None:
    found = find_columns(table(**{"0": ["one", "two", "three"], "1": ["x", "y", "x"]}), RunConfig())
    assert found == Columns(("0",), None, ("1",))


@pytest.mark.parametrize("names", [("body text", "id"), ("id", "body text")])
def test_of_two_unknown_columns_to_predict_the_longer_is_the_text(
    tmp_path: Path, names: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {"body text": ["so good", "so good"], "id": ["1", "2"]}
    rows = [names, *zip(*(cells[name] for name in names), strict=True)]
    path = write(tmp_path / "new.csv", "\n".join(map(",".join, rows)) + "\n")
    assert [text for part in stream_examples(path, RunConfig()) for text in part.texts] == ["so good", "so good"]
    assert "the texts are taken from column 'body text'; --text-column says otherwise" in capsys.readouterr().err
    assert next(stream_examples(path, RunConfig(text_column=("id",)))).texts == ["1", "2"]


def test_columns_that_cannot_be_found_are_an_error_that_lists_what_is_there() -> None:
    with pytest.raises(UserError, match=r"give --text-column; the columns are a, b, c"):
        find_columns(table(a=["1"], b=["2"], c=["3"]), RunConfig())
    with pytest.raises(UserError, match=r"no column 'txt'; its columns are text, label"):
        find_columns(table(text=["1"], label=["2"]), RunConfig(text_column=("txt",)))
    with pytest.raises(UserError, match=r"'text' is asked for twice"):
        find_columns(table(text=["1"], label=["2"]), RunConfig(text_column=("text",), label_column=("text",)))
    with pytest.raises(UserError, match=r"line 3, column text: an object, not a text"):
        examples_from_table(table(text=["a", {"b": 1}], label=["x", "y"]), Columns(("text",), None, ("label",)))


def test_lines_that_are_all_broken_are_not_blamed_on_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '[{"text": "a"}]\n{"text"\n')
    with pytest.raises(UserError, match="no row can be used; line 1: expected an object"):
        load_data(RunConfig(train=path))


def test_columns_asked_for_in_another_letter_case() -> None:
    found = find_columns(
        table(TEXT=["1"], Body=["2"], Label=["3"]), RunConfig(text_column=("body",), label_column=("label",))
    )
    assert found == Columns(("Body",), None, ("Label",))


def test_a_column_whose_name_has_commas() -> None:
    there = table(**{"Title, body": ["1"], "a": ["2"], "b": ["3"]})
    settings = checked_values({"text_column": "Title, body", "label_column": "a,b"}, "here")
    assert find_columns(there, RunConfig(**settings)) == Columns(("Title, body",), None, ("a", "b"))
    with pytest.raises(UserError, match="no column 'Title'; its columns are Title, body, a, b"):
        find_columns(there, RunConfig(text_column=("Title", "body")))


def test_columns_of_0_and_1_are_a_label_each() -> None:
    columns = {"id": ["7", "8", "9"], "comment_text": ["a", "b", "c"], "toxic": ["0", "1", "0"], "threat": [0, 0, 1]}
    assert find_columns(table(**columns), RunConfig()).label == ("toxic", "threat")
    assert find_columns(table(**columns), RunConfig(), need_label=False).label == ()
    typed = {"text": ["a", "b", "c"], "toxic": [True, False, False], "threat": [0.0, 1.0, 0.0], "odds": [0.5, 1.0, 0.0]}
    assert find_columns(table(**typed), RunConfig()).label == ("toxic", "threat")
    del columns["threat"]
    with pytest.raises(UserError, match="give --label-column; the columns are id, comment_text, toxic"):
        find_columns(table(**columns), RunConfig())


def test_a_file_without_header_is_found_out(shared_data: Path) -> None:
    sst2 = load_data(RunConfig(train=str(shared_data / "sst2" / "dev.tsv")))
    assert sum(map(len, sst2.splits.values())) == 872 and sst2.columns == Columns(("0",), None, ("1",), header=False)
    assert any("has no header" in note for note in sst2.notes)
    with pytest.raises(UserError, match=r"no header; the columns are 0 \(.*\.\.\.\), 1 \(27\), 2 \("):
        load_data(RunConfig(train=str(shared_data / "multilabel" / "goemotions" / "dev.tsv")))


@pytest.mark.parametrize(
    "content",
    [
        "words,mark\n" + "".join(f"some text {i},{i % 2}\n" for i in range(9)),
        "note,kind\n" + "".join(f"some text {i},{'ab'[i % 2]}\n" for i in range(9)) + "note,b\n",
        "text,1\nwell,1\n",
    ],
)
def test_a_header_of_unknown_names_stays_a_header(tmp_path: Path, content: str) -> None:
    rows = content.count("\n") - 1
    streamed = list(stream_examples(write(tmp_path / "a.csv", content), RunConfig(), with_labels=True))
    assert sum(map(len, streamed)) == rows


@pytest.mark.parametrize(
    ("first", "has_header"),
    [("spam,some text", False), ("text,text", False), ("v1,v2", True), ("spam,text", True), ("0,0", False)],
)
def test_a_first_row_of_values_that_are_also_names(tmp_path: Path, first: str, has_header: bool) -> None:
    label, _ = first.split(",")
    labels = [label, "other"] if not has_header else ["ham", "eggs"]
    rows = "".join(f"{labels[i % 2]},some text {i}\n" for i in range(20))
    content = f"{first}\n{rows}" if label != "0" else "".join(f"{i % 2},{i % 2},text {i}\n" for i in range(21))
    config = RunConfig(text_column=("2",), label_column=("0", "1")) if label == "0" else RunConfig()
    streamed = list(stream_examples(write(tmp_path / "a.csv", content), config, with_labels=True))
    assert sum(map(len, streamed)) == (20 if has_header else 21)


TRAINED = Columns(("Body",), "Reply", ("Mood",), "|")

AS_TRAINED = RunConfig(text_column=("Body",), text_pair_column="Reply", label_column=("Mood",), label_delimiter="|")


@pytest.mark.parametrize(
    ("content", "flags", "expected", "header"),
    [
        ("id,body,reply,mood\n1,a,b,x\n", {}, AS_TRAINED, True),
        ("body,reply\na,b\nc,d\n", {}, dataclasses.replace(AS_TRAINED, label_column=()), True),
        ("text,label\na,x\n", {}, RunConfig(label_delimiter="|"), True),
        ("1,a b,x\n2,c d,x\n3,e f,x\n", {}, RunConfig(label_delimiter="|"), False),
        ("body,reply,mood\na,b,x\n", {"no_header": True}, RunConfig(label_delimiter="|", no_header=True), False),
        (
            "body,reply,mood,text\na,b,x,c\n",
            {"text_column": ("text",), "label_delimiter": ";"},
            RunConfig(text_column=("text",), label_column=("Mood",), label_delimiter=";"),
            True,
        ),
        (
            "body,reply,mood\na,b,x\n",
            {"text_column": ("Mood",)},
            RunConfig(text_column=("Mood",), label_delimiter="|"),
            True,
        ),
    ],
)
def test_columns_of_training_are_taken_where_the_file_has_them(
    tmp_path: Path, content: str, flags: dict[str, Any], expected: RunConfig, header: bool
) -> None:
    first = next(stream_table(write(tmp_path / "a.csv", content), header=False))
    assert as_trained(RunConfig(**flags), TRAINED, first) == (expected, header)
    assert as_trained(RunConfig(**flags), None, first)[0] == RunConfig(**flags)


def test_a_column_of_texts_alone_is_not_taken_for_the_labels_of_training(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "see you\nat eight\n")
    trained = Columns(("1",), None, ("0",), header=False)
    for config in (RunConfig(no_header=True), RunConfig()):
        (examples,) = stream_examples(path, config, trained=trained)
        assert examples.texts == ["see you", "at eight"]


@pytest.mark.parametrize("first", ["0", "1", "2"])
def test_a_model_of_nameless_columns_reads_files_without_header(tmp_path: Path, first: str) -> None:
    """A cell of the first row that is the number of the texts' column is no name of it."""
    rows = f"{first},0\nwin,0\nhello,1\nnow,1\nwin,0\n"
    train = write(tmp_path / "train.csv", "free,1\n" + rows)
    columns = load_data(RunConfig(train=train, validation_split=0)).columns
    assert columns == Columns(("0",), None, ("1",), header=False)
    record = {"columns": dataclasses.asdict(columns)}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    trained = trained_columns(tmp_path)
    assert trained == columns
    for content in (rows, f"{first},0\n"):
        (examples,) = stream_examples(write(tmp_path / "new.csv", content), RunConfig(), trained=trained)
        assert examples.texts == [row.split(",")[0] for row in content.split()]
    (examples,) = stream_labelled(write(tmp_path / "new.csv", rows), Problem(SINGLE, ["0", "1"]), RunConfig(), trained)
    assert examples.texts[0] == first and examples.labels == ["0", "0", "1", "1", "0"]
    (examples,) = stream_examples(write(tmp_path / "new.csv", "label,text\n1,win\n"), RunConfig(), trained=trained)
    assert examples.texts == ["win"]


def test_a_first_row_of_unknown_names_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", "see you,ok\nwin,bad\nhello,ok\nmoney,bad\nfree,ok\n")
    list(stream_examples(path, RunConfig()))
    note = "the first row (see you, ok) is taken for the columns' names; --no-header if it is data"
    assert note not in capsys.readouterr().err  # `ok` occurs below: no header
    path = write(tmp_path / "a.csv", "see you,ok\nwin,bad\nhello,bad\nnow,fine\n")
    list(stream_examples(path, RunConfig()))
    assert note in capsys.readouterr().err
    assert any(note in told for told in load_data(RunConfig(train=path, validation_split=0)).notes)
    for content in ("text,kind\nwin,bad\n", "win,bad\nwin,bad\nlose,bad\n"):
        list(stream_examples(write(tmp_path / "b.csv", content), RunConfig()))
    list(stream_examples(path, RunConfig(text_column=("see you",))))
    assert "taken for the columns' names" not in capsys.readouterr().err


def test_columns_named_by_numbers_do_not_make_a_header_of_a_row(tmp_path: Path) -> None:
    first = next(stream_table(write(tmp_path / "a.csv", "text,label\na,x\nb,x\nc,y\n"), header=False))
    trained = Columns(("0",), None, ("1",), header=False)
    assert as_trained(RunConfig(), trained, first) == (RunConfig(), True)


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"columns": null, "flags": {}}', '{"columns": 3, "flags": 3}', "[" * 100_000]
)
def test_a_record_without_columns_says_nothing(tmp_path: Path, record: str) -> None:
    assert trained_columns(tmp_path) is None
    (tmp_path / "run.json").write_text(record, encoding="utf-8")
    assert trained_columns(tmp_path) is None
    (tmp_path / "run.json").unlink()
    os.mkfifo(tmp_path / "run.json")  # is not waited for
    assert trained_columns(tmp_path) is None


def test_a_file_without_labels_is_not_given_its_row_numbers_for_labels(tmp_path: Path) -> None:
    rows = "".join(f"q{i},a question {i},{i % 2}\n" for i in range(40))
    train = write(tmp_path / "train.csv", "qid,question_text,target\n" + rows)
    unlabelled = write(tmp_path / "test.csv", "qid,question_text\n" + "".join(f"q{i},a text {i}\n" for i in range(9)))
    message = r"test.csv: no column 'target', which training has for labels; .*minibert.predict"
    with pytest.raises(UserError, match=message):
        load_data(RunConfig(train=train, test=unlabelled))
    columns = load_data(RunConfig(train=train)).columns
    with pytest.raises(UserError, match=message):
        list(stream_labelled(unlabelled, Problem(SINGLE, ["0", "1"]), RunConfig(), columns))
    assert len(next(stream_examples(unlabelled, RunConfig(), trained=columns))) == 9
    named = write(tmp_path / "named.csv", "question_text,label\nwhat,1\n")
    assert next(stream_labelled(named, Problem(SINGLE, ["0", "1"]), RunConfig(), columns)).labels == ["1"]


def test_a_file_of_single_texts_is_refused_for_a_model_of_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\na,x\n")
    with pytest.raises(
        UserError, match=r"one text a row .*, unlike training \(Body \+ Reply\); give --text-column and"
    ):
        list(stream_examples(path, RunConfig(), trained=TRAINED))
    pairs = write(tmp_path / "b.csv", "question1,question2,label\na,b,x\n")
    with pytest.raises(UserError, match=r"two texts a row .*, unlike training \(words\); give --text-column"):
        list(stream_labelled(pairs, Problem(MULTI, ["x"]), RunConfig(), Columns(("words",), None, ("label",))))
    assert len(list(stream_examples(path, RunConfig(), trained=TRAINED, same_kind=False))) == 1
    assert len(list(stream_examples(pairs, RunConfig(), trained=TRAINED))) == 1


def test_of_two_columns_the_one_of_numbers_is_the_label(tmp_path: Path) -> None:
    rows = "".join(f"phrase {i % 30},{i * 0.003:.6f}\n" for i in range(1, 200))
    data = load_data(RunConfig(train=write(tmp_path / "a.csv", "Snippet,Valence\n" + rows)))
    assert data.columns.text == ("Snippet",) and data.problem.kind == REGRESSION


def test_a_small_validation_file_without_header_is_read_as_the_training_file(tmp_path: Path) -> None:
    train = write(tmp_path / "a.tsv", "".join(f"intent_{i % 20}\tthe text number {i}\n" for i in range(300)))
    validation = write(tmp_path / "b.tsv", "".join(f"intent_{i}\tother text {i}\n" for i in range(15)))
    assert len(load_data(RunConfig(train=train, validation=validation)).splits["validation"]) == 15


def test_a_row_of_unknown_names_that_is_read_as_data_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Columns(("1",), None, ("0",), None, header=False)
    path = write(tmp_path / "a.csv", "id,comments\n" + "".join(f"{i},some words {i}\n" for i in range(5)))
    assert len(next(stream_examples(path, RunConfig(), trained=trained))) == 6
    assert "the first row (id, comments) is read as data, for training's file had no header" in capsys.readouterr().err


def test_measuring_wants_every_label_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,loud,rude\n" + "".join(f"text {i},{i % 2},1\n" for i in range(9)))
    with pytest.raises(UserError, match="no column 'kind', which the model has for a label"):
        list(stream_labelled(path, Problem(MULTI, ["kind", "loud", "rude"]), RunConfig()))
