"""Which columns, which labels, which rows."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.data.columns import Columns, as_trained, find_columns, trained_columns
from minibert.data.examples import Examples, examples_from_table, text_keys
from minibert.data.labels import sorted_labels
from minibert.data.loading import RunData, load_data, prepare
from minibert.data.rows import Table
from minibert.data.splits import stratified_split
from minibert.data.tables import stream_table
from minibert.errors import UserError
from minibert.inference.stream import stream_examples, stream_labelled
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem, class_weights


def split(data: Examples, problem: Problem, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return stratified_split(text_keys(data), data.labels or [], problem.kind, share, seed)


def table(**columns: list[Any]) -> Table:
    return Table("data.csv", columns, list(range(2, 2 + len(next(iter(columns.values()))))))


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


def examples(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b", "c"], count, p=[0.8, 0.15, 0.05]).tolist()
    texts = [f"text {i}" for i in rng.integers(0, count * 2 // 3, count)]
    return Examples("data.csv", texts, None, labels, list(range(count)))


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_split_is_stratified_seeded_and_keeps_equal_texts_together(share: float) -> None:
    data = examples(2000)
    problem = Problem(SINGLE, ["a", "b", "c"])
    kept, taken = split(data, problem, share, 42)
    assert sorted([*kept, *taken]) == list(range(2000))
    assert abs(len(taken) - share * 2000) <= 3
    assert not {data.texts[i] for i in kept} & {data.texts[i] for i in taken}
    assert data.labels is not None
    before, after = Counter(data.labels), Counter(data.labels[i] for i in taken)
    assert all(abs(after[name] / before[name] - share) < 0.1 for name in before)
    again = split(data, problem, share, 42)[1]
    assert np.array_equal(taken, again) and not np.array_equal(taken, split(data, problem, share, 43)[1])


def test_a_class_of_one_row_stays_in_training() -> None:
    data = Examples("x", [f"t{i}" for i in range(41)], None, ["a"] * 40 + ["rare"], list(range(41)))
    kept, _ = split(data, Problem(SINGLE, ["a", "rare"]), 0.5, 0)
    assert 40 in kept


def test_validation_and_test_come_from_the_training_file(shared_data: Path) -> None:
    config = RunConfig(train=str(shared_data / "sms_spam" / "spamdata_v2.csv"), test_split=0.15)
    data = load_data(config)
    sizes = {part: len(rows) for part, rows in data.splits.items()}
    assert sum(sizes.values()) == 5572 and sizes["test"] == pytest.approx(836, abs=3) == sizes["validation"]
    texts = [set(part.texts) for part in data.splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_a_sample_of_the_training_rows_is_stratified(shared_data: Path) -> None:
    config = RunConfig(train=str(shared_data / "sms_spam" / "spamdata_v2.csv"), max_train_samples=1000)
    data = load_data(config)
    total = sum(len(part) for part in data.splits.values())
    assert abs(total - 1000) <= 2
    spam = sum(label == "1" for part in data.splits.values() for label in part.labels or [])
    assert spam / total == pytest.approx(747 / 5572, abs=0.01)


@pytest.mark.parametrize("most", [3, 20, 60, 100])
def test_a_sample_is_never_larger_than_asked_for(shared_data: Path, most: int) -> None:
    config = RunConfig(train=str(shared_data / "trec" / "train_5500.label"), max_train_samples=most, validation_split=0)
    train = load_data(config).splits["train"]
    assert len(train) == most and len(set(train.labels or [])) >= min(most, 40)
    with pytest.raises(UserError, match="3 rows are too few to split off validation; give --validation-split 0"):
        load_data(dataclasses.replace(config, max_train_samples=3, validation_split=0.15))


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


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


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


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_multi_label_split_gives_each_label_its_share(share: float) -> None:
    rng = np.random.default_rng(1)
    frequency = np.geomspace(0.4, 0.004, 40)
    rows = [[f"l{i}" for i in np.flatnonzero(row < frequency)] for row in rng.random((3000, 40))]
    texts = [f"Text {i}" if i % 2 else f"text  {i}" for i in rng.integers(0, 2500, 3000)]
    data = Examples("x", texts, None, rows, list(range(3000)))
    problem = Problem(MULTI, [f"l{i}" for i in range(40)])
    kept, taken = split(data, problem, share, 7)
    assert sorted([*kept, *taken]) == list(range(3000)) and abs(len(taken) - 3000 * share) <= 15
    assert not {texts[i].split()[1] for i in kept} & {texts[i].split()[1] for i in taken}
    before = Counter(name for row in rows for name in row)
    after = Counter(name for i in taken for name in rows[i])
    assert all(abs(after[name] - share * count) <= max(2, 0.03 * count) for name, count in before.items())
    assert np.array_equal(taken, split(data, problem, share, 7)[1])
    assert not np.array_equal(taken, split(data, problem, share, 8)[1])


def test_multi_label_rows_that_all_differ_can_be_split() -> None:
    rows = [[f"l{j}" for j in range(10) if i >> j & 1] for i in range(1024)]
    data = Examples("x", [f"t{i}" for i in range(1024)], None, rows, list(range(1024)))
    _, taken = split(data, Problem(MULTI, [f"l{j}" for j in range(10)]), 0.25, 0)
    counts = Counter(name for i in taken for name in rows[i])
    assert abs(len(taken) - 256) <= 8 and all(abs(count - 128) <= 8 for count in counts.values()), counts


@pytest.mark.parametrize("scale", [0.001, 1.0, 1e6])
def test_values_are_split_over_their_whole_range(scale: float) -> None:
    values = (np.random.default_rng(0).random(500) ** 3 * scale).tolist()
    data = Examples("x", [f"t{i}" for i in range(500)], None, values, list(range(500)))
    _, taken = split(data, Problem(REGRESSION, ["score"]), 0.2, 0)
    tenths = np.quantile(values, np.linspace(0, 1, 11))[1:-1]
    assert np.bincount(np.searchsorted(tenths, np.array(values)[taken])).tolist() == [10] * 10


def test_pairs_stay_together_only_if_both_texts_are_equal() -> None:
    texts, pairs = ["same"] * 40, [f"other {i // 2}" for i in range(40)]
    data = Examples("x", texts, pairs, ["a", "b"] * 20, list(range(40)))
    kept, taken = split(data, Problem(SINGLE, ["a", "b"]), 0.5, 0)
    assert len(taken) == 20 and not {pairs[i] for i in kept} & {pairs[i] for i in taken}


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


def test_true_and_1_are_one_label_in_files_of_two_kinds(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    lines = [json.dumps({"text": f"a text {i}", "label": i % 2 == 0}) for i in range(20)]
    train.write_text("\n".join(lines), encoding="utf-8")
    test = write(tmp_path / "test.csv", "text,label\nwin,True\nhello,False\n")
    data = load_data(RunConfig(train=str(train), test=test))
    assert data.problem.labels == ["0", "1"] and data.splits["test"].labels == ["1", "0"]


def test_regression_has_nothing_to_smooth() -> None:
    with pytest.raises(UserError, match="--label-smoothing: regression has no classes"):
        run_data([i / 4 for i in range(20)], RunConfig(label_smoothing=0.1))


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


def test_many_rare_classes_take_nothing_from_the_others() -> None:
    labels = [f"rare {i:03}" for i in range(200)] + ["refund"] * 40 + ["shipping"] * 400
    data = Examples("list", [f"text {i}" for i in range(640)], None, labels)
    for seed in range(5):
        _, taken = split(data, Problem(SINGLE, sorted({*labels})), 0.15, seed)
        count = Counter(labels[i] for i in taken)
        assert 5 <= count["refund"] <= 7 and 59 <= count["shipping"] <= 61 and len(count) == 2


def test_a_text_of_many_rows_starves_no_class() -> None:
    texts = [f"text {i}" for i in range(350)] + ["win a prize"] * 50
    labels = ["ham"] * 300 + ["spam"] * 100
    for seed in range(8):
        _, taken = split(Examples("list", texts, None, labels), Problem(SINGLE, ["ham", "spam"]), 0.15, seed)
        assert Counter(labels[i] for i in taken) == {"ham": 45, "spam": 15}


def test_a_sample_is_not_copies_of_one_text(tmp_path: Path) -> None:
    rows = ["ok,ham"] * 400 + [f"ham {i},ham" for i in range(500)] + [f"spam {i},spam" for i in range(100)]
    path = write(tmp_path / "a.csv", "text,label\n" + "\n".join(rows) + "\n")
    for seed in (4, 5, 6):
        data = load_data(RunConfig(train=path, max_train_samples=200, split_seed=seed))
        texts = [text for examples in data.splits.values() for text in examples.texts]
        labels = [label for examples in data.splits.values() for label in examples.labels or []]
        assert len(texts) == 200 and 60 <= texts.count("ok") <= 105 and labels.count("spam") == 20


def test_a_blank_cell_among_flags_is_a_bad_row_not_a_lost_label(tmp_path: Path) -> None:
    rows = [f"{i},some text {i},{i % 2},{int(i % 3 == 0)}" for i in range(40)]
    rows[7] = "7,some text 7,1,"
    path = write(tmp_path / "a.csv", "id,comment_text,toxic,threat\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="line 9: column threat: '' is neither 0 nor 1"):
        load_data(RunConfig(train=path))
    assert load_data(RunConfig(train=path, on_bad_rows="skip")).problem.labels == ["toxic", "threat"]


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


def test_rows_without_text_are_skipped_where_that_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", "text,label\none,a\n,b\ntwo,a\n")
    assert [text for part in stream_examples(path, RunConfig()) for text in part.texts] == ["one", "", "two"]
    skipped = stream_examples(path, RunConfig(on_bad_rows="skip"))
    assert [text for part in skipped for text in part.texts] == ["one", "two"]
    assert "line 3: 1 row has no text" in capsys.readouterr().err
