"""Many labels, several labels a row, labels that training never sees."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import minibert
from minibert.config import RunConfig
from minibert.data.columns import Columns
from minibert.data.examples import Examples, examples_from_lists
from minibert.data.labels import label_warnings, normalize_spelling
from minibert.data.loading import RunData, load_data, prepare
from minibert.errors import UserError
from minibert.inference.stream import stream_labelled
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runs.setup import without_effect

CLASSES = 150


def prepared(labels: list[Any], **flags: Any) -> RunData:
    examples = Examples("list", [f"text {i}" for i in range(len(labels))], None, labels, list(range(len(labels))))
    return prepare({"train": examples}, Columns(("text",), None, ("label",)), RunConfig(**flags), [])


@pytest.mark.parametrize(
    ("labels", "phrase"),
    [
        (["a", "b"], "single_label_classification, as each row has one label"),
        (["0.5", "1", "2"], "regression, as the labels are numbers with fractions, such as 0.5"),
        ([["a"], ["b", "a"]], "multi_label_classification, as the labels are lists"),
        (["3", "12", "3,12"], "labels such as '3,12' look like several: --label-delimiter ','"),
        (["1", "2", "3", "4", "5"], "--problem-type regression takes them as values"),
    ],
)
def test_what_was_decided_is_said_with_the_reason(labels: list[Any], phrase: str) -> None:
    assert phrase in "\n".join(prepared(labels * 10).notes)


def test_flags_about_evaluations_are_told_where_there_are_none() -> None:
    flags = RunConfig(metric="loss", early_stopping_patience=2)
    notes = without_effect(flags, prepared(["a", "b"] * 5, validation_split=0))
    assert notes == [
        f"there are no validation rows: {flag} has no effect" for flag in ("--metric", "--early-stopping-patience")
    ]
    assert not without_effect(flags, prepared(["a", "b"] * 20))


def test_a_column_of_nearly_only_different_labels_is_doubted() -> None:
    assert "60 different labels in 60 rows" in "\n".join(
        prepared([f"x{i}" for i in range(60)], validation_split=0).notes
    )


def test_rows_of_0_and_1_are_a_place_for_each_label() -> None:
    rows = [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    data = prepared(rows * 10, validation_split=0)
    assert data.problem.kind == MULTI and data.problem.labels == ["0", "1", "2"]
    assert data.problem.targets(data.splits["train"].labels or [])[:3].tolist() == rows
    assert prepared([[0, 1], [1], [0]] * 10, validation_split=0).problem.labels == ["0", "1"]  # lists of labels 0, 1


@pytest.mark.parametrize("written", [list, str, np.array])
def test_one_of_two_in_two_columns(written: Callable[[list[int]], Any]) -> None:
    rows = np.eye(2, dtype=int)[[0, 1, 1, 0, 1] * 4]
    texts = [f"text {i}" for i in range(20)]
    labels = rows if written is np.array else [written(row.tolist()) for row in rows]
    parts, columns = examples_from_lists({"train": (texts, labels)}, None)
    data = prepare(parts, columns, RunConfig(validation_split=0), [])
    assert (
        data.problem.kind == MULTI and data.problem.targets(data.splits["train"].labels or []).tolist() == rows.tolist()
    )


def test_decimal_commas_draw_a_remark() -> None:
    assert "'1,5' look like numbers; write them with a point" in label_warnings(["1,5", "2", "2,25"] * 4)[0]


def test_real_multi_label_data(shared_data: Path) -> None:
    folder = shared_data / "multilabel" / "goemotions"
    flags = {"text_column": ("0",), "label_column": ("1",), "label_delimiter": ",", "no_header": True}
    files = {"train": str(folder / "dev.tsv"), "test": str(folder / "test.tsv")}
    data = load_data(RunConfig(**files, **flags))  # type: ignore[arg-type]
    assert data.problem.kind == MULTI and data.problem.labels == [str(i) for i in range(28)]
    assert len(data.splits["test"]) == 5427


def of_many_classes(rows: int, multi: bool, skip: int | None = None) -> tuple[list[str], list[Any]]:
    """Texts whose words are their labels."""
    numbers = [i % CLASSES for i in range(rows) if i % CLASSES != skip]
    texts = [f"{n} is the number {i}" for i, n in enumerate(numbers)]
    labels: list[Any] = [f"n{n}" for n in numbers]
    if multi:
        labels = [[f"n{n}", f"n{(7 * n) % CLASSES}"] if n % 3 else [] for n in numbers]
    return texts, labels


@pytest.mark.parametrize("multi", [False, True])
def test_150_classes_one_of_them_only_in_test(tiny: Callable[..., Path], tmp_path: Path, multi: bool) -> None:
    output = tmp_path / "run"
    minibert.finetune(
        *of_many_classes(600, multi, skip=4),
        test=of_many_classes(150, multi),
        model=str(tiny()),
        epochs=1,
        output=str(output),
        quiet=True,
    )
    check = json.loads((output / "check.json").read_text())
    assert check["labels_not_in_train"] == ({} if multi else {"test": ["n4"]})  # several labels: another row has it too
    metrics = json.loads((output / "metrics.json").read_text())
    names = json.loads((output / "config.json").read_text())["label2id"]
    assert len(names) == len(metrics["test"]["per_class"]) == (CLASSES if not multi else len(names))
    with open(output / "predictions-test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 150 and sum(name.startswith("probability_") for name in rows[0]) == len(names)
    splits = json.loads((output / "splits.json").read_text())["parts"]
    assert sorted(splits["train"]["rows"] + splits["validation"]["rows"]) == list(range(596))
    assert [int(row["row"]) for row in rows] == splits["test"]["rows"]
    clf = minibert.load(output)
    if multi:
        assert metrics["test"]["thresholds"] == dict(zip(clf.problem.labels, clf.problem.thresholds, strict=True))
        assert set(metrics["test"]["at_threshold_0.5"]) == {"micro_f1", "macro_f1", "subset_accuracy"}
        given = clf.predict([rows[0]["text"]])[0]
        named = zip(clf.problem.labels, clf.problem.thresholds, strict=True)
        assert given.label == [name for name, threshold in named if given.probabilities[name] >= threshold]
        assert "|".join(given.label) == rows[0]["predicted"]


def test_a_whole_number_is_one_label_however_it_is_written(tmp_path: Path) -> None:
    def write(name: str, labels: list[str]) -> str:
        path = tmp_path / name
        path.write_text("text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels)), encoding="utf-8")
        return str(path)

    plain, gaps = write("a.csv", ["0", "1", "2"] * 5), write("b.csv", ["1.0", "0.0", "2.00"] * 5)
    for train, test in ((plain, gaps), (gaps, plain)):
        data = load_data(RunConfig(train=train, test=test, validation_split=0))
        assert data.problem.labels == ["0", "1", "2"]
        assert any(note.startswith("labels such as 0.0 are read as 0") for note in data.notes)
        assert {part: (examples.labels or [])[0] for part, examples in data.splits.items()} == (
            {"train": "0", "test": "1"} if train == plain else {"train": "1", "test": "0"}
        )
    assert load_data(RunConfig(train=gaps)).problem.labels == ["0.0", "1.0", "2.00"]  # as they stand
    for known in (["0", "1", "2"], ["0.0", "1.0", "2.00"]):
        for path in (plain, gaps):
            (examples,) = stream_labelled(path, Problem(SINGLE, known), RunConfig())
            assert {int(float(label)) for label in examples.labels or []} == {0, 1, 2}
            assert set(examples.labels or []) == set(known)


def test_what_is_no_other_spelling_of_a_number_stays() -> None:
    names = ["1", "01", "1.5", "1.0.0", "one", "-1.0", "v1.0", ".0"]
    assert normalize_spelling(names, names) == names
    assert normalize_spelling(["1.0", "-1", "one"], names) == ["1", "-1.0", "one"]
    assert normalize_spelling([["1.0", "1"], [], ["one", "1.0"]], names) == [["1"], [], ["1", "one"]]


def test_a_file_of_numbers_fits_a_model_whose_classes_have_no_names(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("text,label\nwin,1\nhello,0\nnow,1.0\n")
    (examples,) = stream_labelled(str(path), Problem(SINGLE, ["LABEL_0", "LABEL_1"]), RunConfig())
    assert examples.labels == ["LABEL_1", "LABEL_0", "LABEL_1"]
    path.write_text("text,label\nwin,2\n")
    with pytest.raises(UserError, match=r"line 2: label '2' is unknown to the model; it knows LABEL_0, LABEL_1"):
        list(stream_labelled(str(path), Problem(SINGLE, ["LABEL_0", "LABEL_1"]), RunConfig()))


@pytest.mark.parametrize(
    ("names", "labels", "kept"),
    [
        (None, [0, 1], True),  # transformers writes no names where there are two that nobody named
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2], True),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1], False),
        (["a", "b", "c"], ["a", "b"], False),
        (["a", "b"], ["b", "c"], False),
    ],
)
def test_a_head_for_the_same_labels_is_kept(
    names: list[str] | None, labels: list[Any], kept: bool, tiny: Callable[..., Path]
) -> None:
    changes = {} if names is None else {"num_labels": len(names), "id2label": dict(enumerate(names))}
    folder = tiny("BertForSequenceClassification", **changes)
    texts, values = [f"good film {i}" for i in range(12)], labels * (12 // len(labels))
    flags = {"model": str(folder), "max_steps": 1, "learning_rate": 1e-9, "quiet": True, "validation_split": 0}
    ours = minibert.finetune(texts, values, output=str(folder / "run"), **flags).model.classifier.out.weight
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    assert (ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-6)) == kept


def test_labels_that_differ_in_case_draw_a_remark() -> None:
    assert "'Spam' and 'spam' differ only in upper and lower case" in label_warnings(["spam", "Spam", "ham"] * 4)[0]


@pytest.mark.parametrize("blank", ["nan", "NULL", "N/A", "-"])
def test_labels_that_may_mean_nothing_draw_a_remark(blank: str) -> None:
    assert f"label {blank!r} is read as a name" in label_warnings(["yes", "no", blank] * 4)[0]
    assert label_warnings(["yes", "no"] * 4) == []


@pytest.mark.parametrize("several", [set, frozenset, np.array, list, tuple])
def test_several_labels_a_row_in_any_collection(several: Callable[[list[str]], Any], tiny: Callable[..., Path]) -> None:
    folder, texts = tiny(), [f"good film {i}" for i in range(12)]
    labels = [several(["a", "b"]) if i % 2 else several(["c"]) for i in range(12)]
    output = str(folder / "run")
    classifier = minibert.finetune(texts, labels, model=str(folder), max_steps=1, quiet=True, output=output)
    assert classifier.problem.kind == MULTI and classifier.problem.labels == ["a", "b", "c"]


class Table(list[str]):
    """What pandas calls a DataFrame iterates over its columns' names."""

    columns = ("text", "label")


class Frame(Table):
    """One of columns of 0 and 1."""

    def __init__(self, values: np.ndarray, columns: Any) -> None:
        super().__init__(columns)
        self.values, self.columns = values, columns

    def to_numpy(self) -> np.ndarray:
        return self.values


def test_labels_in_a_column_or_in_a_table_from_python() -> None:
    texts, numbers = ["a", "b", "c"], np.array([0, 1, 0])
    for labels in (numbers, numbers[:, None], Frame(numbers[:, None], ["kind"])):
        parts, columns = examples_from_lists({"train": (texts, labels)}, None)
        data = prepare(parts, columns, RunConfig(validation_split=0), [])
        assert data.problem.kind == SINGLE and data.splits["train"].labels == ["0", "1", "0"]

    flags = Frame(np.array([[1, 0], [0, 0], [1, 1]]), ["rude", "loud"])
    parts, columns = examples_from_lists(
        {"train": (texts, flags), "test": (["d"], Frame(np.array([[0, 1]]), flags.columns))}, None
    )
    data = prepare(parts, columns, RunConfig(validation_split=0), [])
    assert data.problem.kind == MULTI and data.problem.labels == ["rude", "loud"]
    assert data.splits["train"].labels == [["rude"], [], ["rude", "loud"]] and data.splits["test"].labels == [["loud"]]
    with pytest.raises(UserError, match="test: labels come in the columns label, those of training in rude and loud"):
        examples_from_lists({"train": (texts, flags), "test": (["d"], [["loud"]])}, None)


@pytest.mark.parametrize("scalar", [bool, np.bool_, np.float32, np.int8, torch.tensor, lambda value: np.array(value)])
def test_labels_are_numbers_of_any_kind(scalar: Callable[[int], Any]) -> None:
    labels = [scalar(value) for value in (0, 1, 1)]
    parts, columns = examples_from_lists({"train": (["a", "b", "c"], labels)}, None)
    data = prepare(parts, columns, RunConfig(validation_split=0), [])
    assert data.problem.kind == SINGLE and data.splits["train"].labels == ["0", "1", "1"]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (None, ["a"], "expected a list of texts, not None"),
        ({"text": "a"}, ["a"], "expected a list of texts, not {'text': 'a'}"),
        (np.array("win"), ["a"], "put it in brackets"),
        (["a"], None, "expected a list of labels, not None"),
        (["a", "b"], {0: "x", 1: "y"}, "expected a list of labels, not {0: 'x', 1: 'y'}"),
        (["a"], 3, "expected a list of labels, not 3"),
        ([], [], "train: no texts"),
    ],
)
def test_what_is_no_list_is_one_line(texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        examples_from_lists({"train": (texts, labels)}, None)


def test_a_text_that_is_missing_in_a_list_is_a_row_that_cannot_be_used() -> None:
    given = {"train": (["win", None, "hello", float("nan"), "now"], ["a", "b", "b", "a", "a"])}
    parts, columns = examples_from_lists(given, None)
    with pytest.raises(UserError, match=r"train list, line 1, 3: 2 rows have no text; .*--on-bad-rows skip"):
        prepare(parts, columns, RunConfig(), [])
    data = prepare(parts, columns, RunConfig(on_bad_rows="skip", validation_split=0), [])
    assert data.splits["train"].texts == ["win", "hello", "now"]
    parts, _ = examples_from_lists({"train": ([("a", "b"), ("c", None)], [0, 1])}, None)
    assert parts["train"].pairs == ["b", ""]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "put it in brackets"),
        (Table(["text", "label"]), "expected a column of texts, not a whole table"),
        ([1, 2], "text 0 is int, not a string: 1"),
        (["a", float("nan")], "text 1: 1 row has no text"),
        ([("a", "b"), ("a", None)], "text 1: 1 row has no second text"),
        ([("a", "b"), ("a", 3.5)], "second text 1 is float, not a string: 3.5"),
    ],
)
def test_what_is_no_list_of_texts_is_one_line(texts: Any, message: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        minibert.finetune(texts, ["a", "b"], model=str(tiny()), output="none")
    assert not Path("none").exists()


@pytest.mark.slow
def test_order_and_spelling_of_labels_are_the_same_in_every_process() -> None:
    """Sets of strings have another order in each."""
    code = """
from minibert.data.labels import normalize_spelling, sorted_labels
print(normalize_spelling(["1"], {"True", "true", "TRUE", "False"}), sorted_labels({"3.5", "1.5", "nan", "2.5", "-inf"}))
print(sorted_labels({"10", "9", "-1"}))
"""
    said = set()
    for seed in range(6):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        said.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
    assert said == {"['true'] ['-inf', '1.5', '2.5', '3.5', 'nan']\n['-1', '9', '10']\n"}


def test_decimal_commas_are_thought_of() -> None:
    (hint,) = label_warnings(["1", "1,5", "2", "3", "4", "5"])
    assert "look like numbers" in hint
    assert label_warnings(["1", "5", "1,5"])[0].endswith("; if they are numbers, write them with a point")
    assert "look like numbers" in label_warnings(["1,5", "2,25", "3,75"])[0]


def test_labels_that_share_their_pieces_look_like_several() -> None:
    (hint,) = label_warnings(["joy|anger", "joy", "fear|joy", "anger|fear"])
    assert "--label-delimiter '|'" in hint
    assert not label_warnings(["Paris, France", "Lyon, France", "Rome, Italy", "Oslo, Norway"])


def test_sparse_tables_and_bytes_as_labels() -> None:
    scipy = pytest.importorskip("scipy.sparse")
    texts = [f"text {i}" for i in range(8)]
    parts, _ = examples_from_lists({"train": (texts, scipy.csr_matrix(np.eye(8, 3, dtype=int)))}, None)
    assert parts["train"].labels[:2] == [[1, 0, 0], [0, 1, 0]]  # type: ignore[index]
    with pytest.raises(UserError, match="bytes where a label is expected"):
        prepared([b"a", b"b"] * 10)


@pytest.mark.slow
def test_numbers_of_a_wide_spread_are_learned_as_small_ones_are(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts = [f"film {i % 7} is {'good' if i % 2 else 'bad'} {i}" for i in range(48)]
    values = np.array([3.0 * (i % 7) + i % 2 for i in range(48)])
    model = str(tiny())
    flags = {"model": model, "problem_type": REGRESSION, "epochs": 6, "learning_rate": 1e-2, "weight_decay": 0.1}
    flags |= {"max_grad_norm": 0.0, "batch_size": 8, "quiet": True}  # not clipped, for the head's gradient differs
    answers = []
    for times in (1, 1000):
        classifier = minibert.finetune(texts, values * times, output=str(tmp_path / str(times)), **flags)
        answers.append(classifier.logits(texts) / times)
    assert np.std(answers[0]) > 0.2
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-3)
    metrics = json.loads((tmp_path / "1000" / "metrics.json").read_text())["validation"]
    assert metrics["mae"] > 100  # in the labels' own unit


def test_numbers_of_a_small_spread_are_counted_as_they_are() -> None:
    assert prepared([f"{i / 10}" for i in range(40)], problem_type=REGRESSION).problem.target_scale == 1
    wide = prepared([f"{i * 10}" for i in range(40)], problem_type=REGRESSION)
    assert wide.problem.target_scale > 50 and "are divided by" in " ".join(wide.notes)
