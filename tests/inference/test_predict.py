"""Predictions as people use them: texts, files and pipes in; tables that spreadsheets and programs can read out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from pyarrow import parquet

import minibert
from minibert.data.examples import Examples
from minibert.inference.explain import explain, marked, word_spans
from minibert.inference.predictions import (
    Predicted,
    plain_cell,
    prediction_columns,
    readable_decision,
    safe_cell,
    write_csv,
)
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Calibration, Problem

WORDS = "the meeting starts soon please bring your notes and coffee for our friends from work".split()

FORMULAS = [
    "=1+1",
    "+49 30 1234",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''=1",
    "'twas",
    "fine",
    "",
    "＝1",
    "a\rb",
]


@pytest.fixture(scope="module")
def planted(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts in which one word, zebra, decides."""
    rng = np.random.default_rng(0)
    texts = [list(rng.choice(WORDS, 6)) for _ in range(96)]
    for words in texts[::2]:
        words[rng.integers(6)] = "zebra"
    output = tmp_path_factory.mktemp("runs") / "planted"
    labels = ["animal", "office"] * 48
    recipe = {"epochs": 3, "lr": 5e-4, "batch_size": 8, "quiet": True, "metric": "loss"}
    minibert.finetune([" ".join(t) for t in texts], labels, model=str(minilm), output=str(output), **recipe)
    return output


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_decision_in_a_line() -> None:
    single, multi = Problem(SINGLE, ["ham", "spam"]), Problem(MULTI, ["joy", "fear", "pride"])
    assert readable_decision("spam", np.array([0.25, 0.75]), single) == "spam\t0.7500"
    assert readable_decision(["joy", "pride"], np.array([0.5, 0.1, 0.625]), multi) == "joy 0.5000, pride 0.6250"
    assert readable_decision([], np.array([0.1, 0.1, 0.1]), multi) == "(none)"
    assert readable_decision(0.18853259086608887, np.array([0.1885]), Problem(REGRESSION, ["score"])) == "0.1885"


def test_texts_top_k_and_the_planted_word(planted: Path) -> None:
    text = "please bring the zebra and coffee"
    lines = run_here("minibert.predict", str(planted), "--text", text, "--top-k", "2", "--explain").stdout.splitlines()
    label, probability, shown = lines[0].split("\t")
    assert label == "animal" and float(probability) > 0.8
    assert shown == text.replace("zebra", "[++zebra]")
    assert [line.split("\t")[2] for line in lines[1:3]] == ["animal", "office"]
    assert lines[3].startswith("\tfor animal: zebra +")
    record = json.loads(
        run_here("minibert.predict", str(planted), "--text", text, "--format", "jsonl", "--explain").stdout
    )
    assert record["predicted"] == "animal" and record["probability"] == record["probabilities"]["animal"]
    assert [word["word"] for word in record["words"]] == text.split()
    assert max(record["words"], key=lambda word: word["effect"])["word"] == "zebra"
    assert all(text[w["start"] : w["end"]] == w["word"] for w in record["words"])


def test_an_effect_is_what_leaving_the_word_out_changes(planted: Path) -> None:
    """Also in second texts, with temperature, and for words outside ASCII."""
    classifier = minibert.load(planted)
    assert repr(classifier).startswith("Classifier(single_label_classification: ") and len(repr(classifier)) < 200
    classifier.problem = replace(classifier.problem, calibration=Calibration(2.0))
    texts, pairs = ["A zebra, für uns!", ""], ["the coffee", "notes 咖啡"]
    words = explain(classifier, texts, pairs, classifier.logits(texts, pairs))
    assert [w.text for w in words[0]] == ["A", "zebra", ",", "für", "uns", "!", "the", "coffee"]
    assert [w.in_pair for w in words[0]] == [False] * 6 + [True] * 2
    assert [w.text for w in words[1]] == ["notes", "咖", "啡"]
    whole, without = (p.probabilities for p in classifier.predict([(texts[0], pairs[0]), ("A , für uns!", pairs[0])]))
    label = max(whole, key=lambda name: whole[name])
    expected = np.log(whole[label] / (1 - whole[label])) - np.log(without[label] / (1 - without[label]))
    assert words[0][1].effect == pytest.approx(expected, abs=1e-4)
    assert marked(texts[0], words[0]).replace("[++zebra]", "zebra").replace("[--zebra]", "zebra") == texts[0]
    assert explain(classifier, [], None, classifier.logits([])) == []
    classifier.max_length = 16
    assert len(explain(classifier, ["word " * 500], None, classifier.logits(["word " * 500]))[0]) == 16
    classifier.truncation = "head_tail"  # in a text little longer than that, no word comes twice
    for count, kept in ((20, 20), (30, 24)):
        text = "word " * count
        starts = [word.start for word in explain(classifier, [text], None, classifier.logits([text]))[0]]
        assert len(starts) == kept and starts == sorted({*starts})


def test_words_of_a_text_with_special_tokens_and_broken_unicode(planted: Path) -> None:
    tokenizer = minibert.load(planted).tokenizer
    for text in ("[SEP] 👍🏽 naïve e\u0301 \ud800 x\x00y", "नमस्ते दुनिया", "", "   "):
        spans = word_spans(tokenizer, text)
        assert all(0 <= a < b <= len(text) for a, b in spans)
        assert spans == sorted(spans)
    assert [("नमस्ते दुनिया")[a:b] for a, b in word_spans(tokenizer, "नमस्ते दुनिया")] == ["नमस्ते", "दुनिया"]


def test_every_output_format_holds_the_same(planted: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    texts = ["=zebra", "coffee, please", 'a "quote"\nand a line', "half \ud83d pair", ""]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        done = run_here(
            "minibert.predict", str(planted), "--file", str(source), "--output", str(tmp_path / name), "--explain"
        )
        assert done.stdout.startswith("5 predictions written")
    readable = [text.encode("utf-8", "replace").decode() for text in texts]
    expected = minibert.load(planted).predict(readable)
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == readable
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["text"] for record in records] == readable
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["text"] == readable and table["row"] == [1, 2, 3, 4, 5] == [int(row["row"]) for row in rows]
    for i, prediction in enumerate(expected):
        assert rows[i]["predicted"] == records[i]["predicted"] == table["predicted"][i] == prediction.label
        assert float(rows[i]["probability"]) == pytest.approx(prediction.score, abs=1e-5)
        assert table["probability_animal"][i] == pytest.approx(prediction.probabilities["animal"], abs=1e-5)
        assert records[i]["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
        assert rows[i]["words"] == table["words"][i]


def test_formulas_are_harmless_and_come_back() -> None:
    for text in FORMULAS:
        assert not safe_cell(text).startswith(tuple("=+-@\t\r＝"))
        assert plain_cell(safe_cell(text)) == text
    problem = Problem(SINGLE, ["-1", "=x"])
    examples = Examples("list", FORMULAS, None, ["-1"] * len(FORMULAS), list(range(len(FORMULAS))))
    logits = np.eye(2, dtype=np.float32)[np.arange(len(FORMULAS)) % 2]
    file = io.StringIO(newline="")
    table = prediction_columns(Predicted(examples, logits), problem, np.zeros(len(FORMULAS), np.int64))
    write_csv(file, table, spreadsheet_safe=True)
    rows = rows_of(file.getvalue())
    assert [plain_cell(row["text"]) for row in rows] == FORMULAS
    assert [row["predicted"] for row in rows[:2]] == ["-1", "'=x"]  # a number is no formula
    assert {row["label"] for row in rows} == {"-1"} and all(float(row["loss"]) > 0 for row in rows)


def test_predict_guards_cells_only_when_asked(planted: Path, tmp_path: Path) -> None:
    """The flag does what it says by the real command, and is refused where it would do nothing."""
    file = tmp_path / "texts.csv"
    file.write_text('text\n"@user thanks!"\n- great film\nplain\n')
    plain = rows_of(run_here("minibert.predict", str(planted), "--file", str(file)).stdout)
    guarded = rows_of(run_here("minibert.predict", str(planted), "--file", str(file), "--spreadsheet-safe").stdout)
    assert [row["text"] for row in plain] == ["@user thanks!", "- great film", "plain"]
    assert [row["text"] for row in guarded] == ["'@user thanks!", "'- great film", "plain"]
    refused = run_here(
        "minibert.predict", str(planted), "--file", str(file), "--format", "jsonl", "--spreadsheet-safe", check=False
    )
    assert refused.returncode == 2 and "--spreadsheet-safe: is about CSV files" in refused.stderr


def test_a_run_holds_texts_as_they_are(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts = [f"=spam({i})" if i % 2 else f"you and the film {i}" for i in range(40)]
    minibert.finetune(
        texts, ["a", "b"] * 20, model=str(tiny()), max_steps=1, output=str(tmp_path / "x"), test_split=0.2, quiet=True
    )
    for part in ("validation", "test"):
        rows = rows_of((tmp_path / "x" / f"predictions-{part}.csv").read_text())
        assert any(row["text"].startswith("=spam") for row in rows)
        assert {row["text"] for row in rows} <= set(texts)


def test_columns_of_other_problems() -> None:
    examples = Examples("list", ["x", "y"], lines=[1, 2])
    multi = Problem(MULTI, ["a", "b", "c"], Calibration(2.0, (0.5, 0.9, 0.01)))
    logits = np.array([[2.0, 2.0, -8.0], [-20.0, -20.0, -20.0]], dtype=np.float32)
    predicted = Predicted(examples, logits)
    table = prediction_columns(predicted, multi, top_k=2)
    assert table["predicted"] == [["a", "c"], []]
    assert table["top_1"][0] == "a" and table["top_2"][0] == "b" and "probability_a" not in table
    assert table["top_1_probability"][0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert list(prediction_columns(Predicted(examples, logits[:, :1]), Problem(REGRESSION, ["score"]))) == [
        "row",
        "text",
        "predicted",
    ]
    assert set(prediction_columns(predicted, multi, top_k=9)) == set(prediction_columns(predicted, multi, top_k=3))


def test_saved_thresholds_and_temperature_are_applied(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    plain = json.loads(run_here("minibert.predict", str(folder), "--text", "a good film", "--format", "jsonl").stdout)
    low, *_ = sorted(plain["probabilities"], key=lambda name: plain["probabilities"][name])
    thresholds = [0.0 if name == low else 1.0 for name in plain["probabilities"]]
    path.write_text(json.dumps(config | {"minibert": {"thresholds": thresholds, "temperature": 5.0}}))
    calibrated = json.loads(
        run_here("minibert.predict", str(folder), "--text", "a good film", "--format", "jsonl").stdout
    )
    assert calibrated["predicted"] == [low]
    done = run_here("minibert.predict", str(folder), "--text", "a good film", "--format", "jsonl", "--explain")
    explained = json.loads(done.stdout)
    assert explained["explained"] == low  # which was given, though others are more probable
    classifier, words = minibert.load(folder), ["good film", "a film", "a good"]
    (prediction,) = classifier.predict(["a good film"])
    assert prediction.label == [low] and prediction.score == prediction.probabilities[low]
    at = list(prediction.probabilities).index(low)
    whole, without = classifier.logits(["a good film"])[0, at], classifier.logits(words)[:, at]
    effects = [word["effect"] for word in explained["words"]]
    assert effects == pytest.approx(((whole - without) / 5).tolist(), abs=1e-4)
    for name, p in plain["probabilities"].items():
        q = calibrated["probabilities"][name]
        assert np.log(p / (1 - p)) / 5 == pytest.approx(np.log(q / (1 - q)), abs=1e-3)


@pytest.mark.slow
def test_standard_input_is_answered_while_it_comes(planted: Path) -> None:
    command = [sys.executable, "-m", "minibert.predict", str(planted)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process, contextlib.ExitStack() as stack:  # type: ignore[call-overload]
        stack.callback(process.kill)  # if an answer is wrong
        assert process.stdin and process.stdout
        answers = []
        for text in ("our zebra", "", "coffee for friends"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            if not answers:
                assert process.stdout.readline().startswith("row,text,predicted,probability,")
            answers.append(process.stdout.readline().split(","))  # would wait for ever if output waited for more input
        assert [answer[:3] for answer in answers] == [
            ["1", "our zebra", "animal"],
            ["2", "", answers[1][2]],
            ["3", "coffee for friends", "office"],
        ]
        rest, _ = process.communicate("no newline at the end")
        assert process.returncode == 0 and rest.startswith("4,no newline at the end,")
