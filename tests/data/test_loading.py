"""Which columns, which labels, which rows."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import table, write

from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.data.columns import Columns
from minibert.data.examples import Examples, examples_from_table
from minibert.data.labels import sorted_labels
from minibert.data.loading import RunData, load_data, prepare
from minibert.data.tables import stream_table
from minibert.errors import UserError
from minibert.inference.stream import stream_examples, stream_labelled
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem, class_weights
from minibert.runs.setup import without_effect


def run_data(labels: list[Any], config: RunConfig | None = None, texts: list[str] | None = None) -> RunData:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    examples = Examples("data.csv", texts, None, labels, list(range(2, 2 + len(labels))))
    return prepare({"train": examples}, Columns(("text",), None, ("label",)), config or RunConfig(), [])


def test_numbers_sort_as_numbers_and_text_as_text() -> None:
    assert sorted_labels({"10", "9", "2"}) == ["2", "9", "10"]
    assert sorted_labels({"10", "9", "x"}) == ["10", "9", "x"]
    assert run_data([10, 2, 1.0, True, "2"] * 10).problem.labels == ["1", "2", "10"]


@pytest.mark.parametrize(
    ("labels", "config", "kind"),
    [
        (["a", "b"], {}, SINGLE),
        (["0", "1"], {}, SINGLE),
        (["1.5", "2.25", "3", "0"], {}, REGRESSION),
        (["a|b", "a"], {"label_delimiter": "|"}, MULTI),
        ([["a", "b"], ["c"]], {}, MULTI),
        (["1", "2"], {"problem_type": REGRESSION}, REGRESSION),
    ],
)
def test_problem_type_is_found_or_given(labels: list[Any], config: dict[str, Any], kind: str) -> None:
    assert run_data(labels * 10, RunConfig(**config)).problem.kind == kind


def test_multi_label_targets() -> None:
    data = run_data(["b|a", "c", ""] + ["a"] * 30, RunConfig(label_delimiter="|", validation_split=0), None)
    assert data.problem.labels == ["a", "b", "c"]
    assert data.problem.targets([["a", "b"], ["c"], []]).tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "texts", "message"),
    [
        (["a", None, "b"], None, "line 3: 1 row has no label"),
        (["a", "b", ""], None, "line 4: 1 row has no label"),
        (["a", "b", "a"], ["x", " ", ""], "line 3, 4: 2 rows have no text"),
        (["a", "a", "a"], None, "only one label, 'a'"),
    ],
)
def test_rows_that_teach_nothing_are_named(labels: list[Any], texts: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_data(labels, None, texts)


def test_real_pairs_and_scores(shared_data: Path) -> None:
    mrpc = load_data(RunConfig(train=str(shared_data / "mrpc" / "msr_paraphrase_train.txt")))
    assert mrpc.problem.kind == SINGLE and mrpc.splits["train"].pairs is not None
    stsb = load_data(RunConfig(train=str(shared_data / "stsb" / "glue" / "dev.tsv")))
    assert stsb.problem.kind == REGRESSION and stsb.splits["train"].pairs is not None
    trec = load_data(RunConfig(train=str(shared_data / "trec" / "train_5500.label")))
    assert len(trec.problem.labels) == 50


def test_class_weights_from_a_file_must_name_every_label(tmp_path: Path) -> None:
    problem = Problem(SINGLE, ["ham", "spam"])
    path = tmp_path / "weights.json"
    path.write_text('{"spam": 5, "ham": 0.5}')
    weights = class_weights(problem, str(path), np.array([0, 1]))
    assert weights is not None and weights.tolist() == [0.5, 5.0]
    path.write_text('{"spam": 5, "eggs": 1}')
    with pytest.raises(UserError, match=r"unknown \['eggs'\], missing \['ham'\]"):
        class_weights(problem, str(path), np.array([0, 1]))


@pytest.mark.parametrize("labels", [["ham", "spam"], ["0", "1"]])
def test_class_weights_as_a_dict_from_python_or_as_json(labels: list[str]) -> None:
    problem, keys = Problem(SINGLE, labels), np.array([int(x) if x.isdecimal() else x for x in labels])
    sklearns = dict(zip(keys, np.array([0.5, 5], np.float32), strict=True))  # np.int64 or np.str_ to np.float32
    (choice,) = checked_values({"class_weights": sklearns}, "here").values()
    weights = class_weights(problem, choice, np.array([0, 1]))
    assert weights is not None and weights.tolist() == [0.5, 5.0]
    for wrong, message in (
        ('{"ham": 1', "--class-weights: cannot be read as JSON"),
        ('{"ham": "x"}', "with weights of at least 0"),
        ('{"ham": Infinity}', "with weights of at least 0"),
        ("{}", "missing"),
    ):
        with pytest.raises(UserError, match=message):
            class_weights(problem, wrong, np.array([0, 1]))
    many = json.dumps({f"a label of some length {i}": 1 for i in range(100)})  # no name of a file
    assert RunConfig(class_weights=many).class_weights == many


def test_flags_out_of_range_are_errors() -> None:
    for bad in ({"batch_size": 0}, {"epochs": -1}, {"dropout": 1.0}, {"head": "mlp"}, {"freeze": "some"}):
        with pytest.raises(UserError, match="give"):
            RunConfig(**bad)  # type: ignore[arg-type]
    assert dataclasses.replace(RunConfig(), head="mlp:64").mlp_size() == 64


BAD = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40)) + ",a\nlonely\nx,\none,two,three\n  ,b\n"


def test_bad_rows_are_an_error_that_counts_them_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data(RunConfig(train=write(tmp_path / "a.csv", BAD)))
    for phrase in (
        "line 42, 46: 2 rows have no text",
        "line 43: 1 cell",
        "line 44: 1 row has no label",
        "line 45: 3 c",
    ):
        assert phrase in str(caught.value)
    assert "--on-bad-rows skip" in str(caught.value)


def test_bad_rows_are_skipped_when_asked_counted_and_named(tmp_path: Path) -> None:
    data = load_data(RunConfig(train=write(tmp_path / "a.csv", BAD), on_bad_rows="skip"))
    assert sum(map(len, data.splits.values())) == 40
    assert [row.line for row in data.skipped["train"]] == [42, 43, 44, 45, 46]
    assert any("skipped 5 rows of" in note and "line 42, 46" in note for note in data.notes)


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row can be used; line 2"):
        load_data(RunConfig(train=write(tmp_path / "a.csv", "text,label\n,a\n"), on_bad_rows="skip"))


def test_nan_is_no_text_and_no_label() -> None:
    rows = table(text=["a", float("nan"), "c"], label=["x", "y", float("nan")])
    with pytest.raises(UserError, match=r"line 3: 1 row has no text; line 4: 1 row has no label"):
        prepare(
            {"train": examples_from_table(rows, Columns(("text",), None, ("label",)))},
            Columns(("text",), None, ("label",)),
            RunConfig(),
            [],
        )


def test_streamed_bad_rows_are_refused_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", BAD)
    with pytest.raises(UserError, match="line 43"):
        list(stream_examples(path, RunConfig()))
    streamed = list(stream_examples(path, RunConfig(on_bad_rows="skip"), with_labels=True))
    assert sum(map(len, streamed)) == 40
    assert "skipped 5 rows" in capsys.readouterr().err


FLAGS = "text,rude,loud\n" + "".join(f"text {i},{i % 2},{i // 2 % 2}\n" for i in range(20))

TWO = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (TWO, "txt,lab\nx,a\n", "no column 'text'; its columns are txt, lab"),
        (FLAGS, "text,rude\nx,0\n", "no column 'loud', which is a label in training"),
        (FLAGS, "text,rude,loud\nx,0,2\n", r"line 2: column loud: '2' is neither 0 nor 1"),
        (TWO, "text1,text2,label\nx,y,a\n", r"two texts a row .*, unlike training \(text\); give --text-column$"),
    ],
)
def test_a_test_file_unlike_training_is_one_line(tmp_path: Path, train: str, test: str, message: str) -> None:
    flags = {"text_column": ("text",), "label_column": ("label",)} if "lab\n" in test else {}
    files = {"train": write(tmp_path / "train.csv", train), "test": write(tmp_path / "test.csv", test)}
    with pytest.raises(UserError, match=message):
        load_data(RunConfig(**files, **flags))  # type: ignore[arg-type]


def test_a_test_file_may_have_other_names_and_the_run_says_so(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", "Sentiment,Review\na,one\nb,two\n")
    data = load_data(RunConfig(train=write(tmp_path / "train.csv", TWO), test=test))
    assert data.splits["test"].texts == ["one", "two"] and f"in {test} text: Review · label: Sentiment" in data.notes


def test_labels_that_cannot_be_read_are_bad_rows(tmp_path: Path) -> None:
    content = "text,score\n" + "".join(f"text {i},{'nan' if i == 4 else i / 8}\n" for i in range(40))
    train = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError, match=r"line 6: label 'nan' is not a number, as regression needs; fix"):
        load_data(RunConfig(train=train))
    data = load_data(RunConfig(train=train, on_bad_rows="skip"))
    assert data.problem.kind == REGRESSION and sum(map(len, data.splits.values())) == 39
    assert [row.line for row in data.skipped["train"]] == [6]
    with pytest.raises(UserError, match="2 labels where single_label_classification takes one"):
        run_data([["a", "b"], ["a"]] * 10, RunConfig(problem_type=SINGLE))
    with pytest.raises(UserError, match="takes one label column, not rude, loud"):
        load_data(RunConfig(train=write(tmp_path / "b.csv", FLAGS), problem_type=SINGLE))


@pytest.mark.parametrize("quote", ["'", '"'])
def test_lists_written_in_cells(quote: str) -> None:
    data = run_data([f"[{quote}a{quote}, {quote}b{quote}]", f"[{quote}a{quote}]", "[]"] * 10)
    assert data.problem.kind == MULTI and data.problem.labels == ["a", "b"]
    assert run_data(["[1, 0, 1]", "[0, 0, 1]"] * 10).problem.labels == ["0", "1", "2"]


def test_lists_with_apostrophes_and_what_only_looks_like_a_list() -> None:
    data = run_data(["""['anger', "can't say"]""", "['anger']", "[None, 'joy']"] * 10)
    assert data.problem.kind == MULTI and data.problem.labels == ["anger", "can't say", "joy"]
    for written in ("['anger' 'joy']", "[1 0]", "[anger, joy]", "[['a'], ['b']]", "[" * 9999 + "]", "[b'a', {1}]"):
        data = run_data([written, "['anger']"] * 10)
        assert data.problem.kind == SINGLE
        assert any(" is read as a name: not all labels are lists" in note for note in data.notes)


def test_evaluation_finds_label_columns_and_skips_a_chunk_of_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = Problem(MULTI, ["loud", "rude"])
    path = write(tmp_path / "a.csv", FLAGS + ",1,1\n")
    monkeypatch.setattr("minibert.inference.stream.stream_table", partial(stream_table, rows=20))
    streamed = list(stream_labelled(path, problem, RunConfig(on_bad_rows="skip")))
    assert [len(examples) for examples in streamed] == [20, 0] and "skipped 1 row" in capsys.readouterr().err
    assert (streamed[0].labels or [])[:4] == [[], ["rude"], ["loud"], ["loud", "rude"]]
    with pytest.raises(UserError, match="no row can be used"):
        list(stream_examples(write(tmp_path / "b.csv", "text,label\n,a\n"), RunConfig(on_bad_rows="skip"), True))


def test_true_and_1_are_one_label_in_files_of_two_kinds(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    lines = [json.dumps({"text": f"a text {i}", "label": i % 2 == 0}) for i in range(20)]
    train.write_text("\n".join(lines), encoding="utf-8")
    test = write(tmp_path / "test.csv", "text,label\nwin,True\nhello,False\n")
    data = load_data(RunConfig(train=str(train), test=test))
    assert data.problem.labels == ["0", "1"] and data.splits["test"].labels == ["1", "0"]


def test_regression_has_nothing_to_smooth() -> None:
    with pytest.raises(UserError, match="--label-smoothing: regression has no classes"):
        without_effect(RunConfig(label_smoothing=0.1), run_data([i / 4 for i in range(20)], RunConfig()))


def test_a_blank_cell_among_flags_is_a_bad_row_not_a_lost_label(tmp_path: Path) -> None:
    rows = [f"{i},some text {i},{i % 2},{int(i % 3 == 0)}" for i in range(40)]
    rows[7] = "7,some text 7,1,"
    path = write(tmp_path / "a.csv", "id,comment_text,toxic,threat\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="line 9: column threat: '' is neither 0 nor 1"):
        load_data(RunConfig(train=path))
    assert load_data(RunConfig(train=path, on_bad_rows="skip")).problem.labels == ["toxic", "threat"]


def test_rows_without_text_are_skipped_where_that_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", "text,label\none,a\n,b\ntwo,a\n")
    assert [text for part in stream_examples(path, RunConfig()) for text in part.texts] == ["one", "", "two"]
    skipped = stream_examples(path, RunConfig(on_bad_rows="skip"))
    assert [text for part in skipped for text in part.texts] == ["one", "two"]
    assert "line 3: 1 row has no text" in capsys.readouterr().err
