"""Predictions as people use them: texts, files and pipes in; tables that spreadsheets and programs can read out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

import minibert
from minibert.cli import run_command
from minibert.data.examples import Examples
from minibert.embed import main as embed_main
from minibert.errors import UserError
from minibert.evaluate import main as evaluate_main
from minibert.finetune import main as finetune_main
from minibert.inference.explain import explain, marked, word_spans
from minibert.inference.predictions import (
    Predicted,
    plain_cell,
    prediction_columns,
    readable_decision,
    safe_cell,
    write_csv,
)
from minibert.inference.stream import stream_lines
from minibert.predict import main as predict_main
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


def predict(*arguments: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minibert.predict", *arguments]
    options = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload]
    if check:
        assert done.returncode == 0, done.stderr
    return done


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


@pytest.fixture
def untrained(tiny: Callable[..., Path]) -> Path:
    return tiny("BertForSequenceClassification")


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
    lines = predict(str(planted), "--text", text, "--top-k", "2", "--explain").stdout.splitlines()
    label, probability, shown = lines[0].split("\t")
    assert label == "animal" and float(probability) > 0.8
    assert shown == text.replace("zebra", "[++zebra]")
    assert [line.split("\t")[2] for line in lines[1:3]] == ["animal", "office"]
    assert lines[3].startswith("\tfor animal: zebra +")
    record = json.loads(predict(str(planted), "--text", text, "--format", "jsonl", "--explain").stdout)
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
        done = predict(str(planted), "--file", str(source), "--output", str(tmp_path / name), "--explain")
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
    plain = rows_of(predict(str(planted), "--file", str(file)).stdout)
    guarded = rows_of(predict(str(planted), "--file", str(file), "--spreadsheet-safe").stdout)
    assert [row["text"] for row in plain] == ["@user thanks!", "- great film", "plain"]
    assert [row["text"] for row in guarded] == ["'@user thanks!", "'- great film", "plain"]
    refused = predict(str(planted), "--file", str(file), "--format", "jsonl", "--spreadsheet-safe", check=False)
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
    plain = json.loads(predict(str(folder), "--text", "a good film", "--format", "jsonl").stdout)
    low, *_ = sorted(plain["probabilities"], key=lambda name: plain["probabilities"][name])
    thresholds = [0.0 if name == low else 1.0 for name in plain["probabilities"]]
    path.write_text(json.dumps(config | {"minibert": {"thresholds": thresholds, "temperature": 5.0}}))
    calibrated = json.loads(predict(str(folder), "--text", "a good film", "--format", "jsonl").stdout)
    assert calibrated["predicted"] == [low]
    done = predict(str(folder), "--text", "a good film", "--format", "jsonl", "--explain")
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


def test_a_million_lines_pass_through_little_memory() -> None:
    line = b"a text of a usual length, some sixty characters or so, ok\r\n"
    blocks = islice(repeat(line * 1000), 1000)
    stream = io.BufferedReader(Blocks(blocks), 1 << 17)
    tracemalloc.start()
    count = 0
    for examples in stream_lines(lambda: stream.read1(1 << 16), "utf-8-sig"):
        assert examples.lines[0] == count + 1 and set(examples.texts) == {line.decode().rstrip()}
        count += len(examples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_000_000 and peak < 4 << 20


class Blocks(io.RawIOBase):
    """Bytes that are made as they are read."""

    def __init__(self, blocks: islice[bytes]) -> None:
        self.blocks, self.rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.rest = self.rest or next(self.blocks, b"")
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


@pytest.mark.parametrize(
    ("encoding", "data"), [("utf-8-sig", "\ufeffé\nü".encode()), ("utf-16", "é\r\nü".encode("utf-16"))]
)
def test_encodings_of_standard_input(encoding: str, data: bytes) -> None:
    stream = io.BytesIO(data)
    found = [text for examples in stream_lines(lambda: stream.read(1), encoding) for text in examples.texts]
    assert found == ["é", "ü"]


@pytest.mark.parametrize(
    ("encoding", "data", "message"),
    [
        ("ascii", "x\nä\n".encode(), "after line 1: not ascii text; give --encoding"),
        ("utf-8", "x\nä".encode()[:-1], "after line 1: not utf-8 text; give --encoding"),
        ("klingon", b"x", "--encoding klingon: no such encoding"),
        ("base64", b"x", "--encoding base64: no such encoding"),
    ],
)
def test_standard_input_that_is_no_text(encoding: str, data: bytes, message: str) -> None:
    stream = io.BytesIO(data)
    with pytest.raises(UserError, match=message):
        list(stream_lines(lambda: stream.read(2), encoding))


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], "", "standard input is empty; give --text, --file"),
        (["--text", "a", "--file", "b"], None, "--file: not allowed with argument --text"),
        (["--text", "a", "--output", "x.xlsx"], None, "end the name in .csv, .jsonl or .parquet"),
        (["--text", "a", "--output", "x.csv", "--format", "jsonl"], None, "--output x.csv says csv"),
        (["--text", "a", "--no-header"], None, "--no-header: is about a data file"),
        (["--text", "a", "--on-bad-rows", "skip"], None, "--on-bad-rows: is about a data file"),
        (["--text", "a", "--encoding", "cp1252"], None, "--encoding: is about a data file"),
        (["--text", "a", "--top-k", "0"], None, "--top-k 0: give an integer of at least 1"),
        (["--file", "-", "--text-column", "x"], "a\n", "--text-column: is about a data file"),
    ],
)
def test_mistakes_are_one_line(untrained: Path, arguments: list[str], text: str | None, message: str) -> None:
    done = predict(str(untrained), *arguments, text=text, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_no_command_writes_over_the_file_it_reads(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, command in (("a.json", evaluate_main), ("b.csv", embed_main), ("c.csv", predict_main)):
        path = tmp_path / name
        path.write_text("text,label\na,0\n")
        assert run_command(command, [str(untrained), "--file", str(path), "--output", str(path)]) == 2
        assert "is the file to read" in capsys.readouterr().err and path.read_text() == "text,label\na,0\n"


def test_texts_after_several_flags_are_all_answered(untrained: Path) -> None:
    lines = predict(str(untrained), "--text", "a", "b", "--text", "c").stdout.splitlines()
    assert [line.split("\t")[-1] for line in lines] == ["a", "b", "c"]


def test_pairs_are_refused_for_a_model_of_single_texts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("BertForSequenceClassification", type_vocab_size=1)
    done = predict(str(folder), "--text", "a", "--text-pair", "b", check=False)
    assert done.returncode == 2 and "reads single texts (its type_vocab_size is 1)" in done.stderr
    with pytest.raises(UserError, match="type_vocab_size is 1"):
        pairs = [(f"a {i}", "b") for i in range(40)]
        minibert.finetune(pairs, ["x", "y"] * 20, model=str(folder), output=str(tmp_path / "x"), quiet=True)
    assert not (tmp_path / "x").exists()


def test_the_input_is_never_overwritten_and_a_failure_leaves_nothing(untrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = folder / "in.csv"
    source.write_text("text\nzebra\n")
    done = predict(str(untrained), "--file", str(source), "--output", str(source), check=False)
    assert done.returncode == 2 and "is the file to read" in done.stderr and source.read_text() == "text\nzebra\n"
    (folder / "bad.jsonl").write_text('{"text": "a"}\n' * 10_001 + "oops\n")
    arguments = ["--file", str(folder / "bad.jsonl"), "--output", str(folder / "out.parquet")]
    done = predict(str(untrained), *arguments, check=False)
    assert done.returncode == 2 and "line 10002: not JSON" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["bad.jsonl", "in.csv"]


def test_the_columns_of_training_need_not_be_named_again(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moods = ("glad|calm", "sad", "calm")
    rows = [[f"good {i}", f"film {i % 7}", moods[i % 3], "title"] for i in range(30)]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("remark", "answer", "mood", "title"), *rows])
    flags = "--text-column remark --text-pair-column answer --label-column mood --label-delimiter | --max-steps 2"
    out, data = str(tmp_path / "run"), str(tmp_path / "a.csv")
    finetune_main([*flags.split(), "--model", str(tiny()), "--train", data, "--output", out, "--quiet"])
    capsys.readouterr()
    evaluate_main([out, "--file", data])
    assert set(json.loads(capsys.readouterr().out)["per_class"]) == {"calm", "glad", "sad"}
    predict_main([out, "--file", data])
    told = capsys.readouterr().out
    predict_main([out, "--file", data, "--text-column", "remark", "--text-pair-column", "answer"])
    assert told == capsys.readouterr().out and "film 1" in told
    with pytest.raises(UserError, match=r"one text a row .*, unlike training \(remark \+ answer\)"):
        predict_main([out, "--file", data, "--text-column", "remark"])
    embed_main([out, "--file", data, "--output", out + ".npy"])  # not of `title`, which has a known name
    expected = minibert.load(out).embed([(first, second) for first, second, *_ in rows])
    assert np.allclose(np.load(out + ".npy"), expected, atol=1e-5)
    embed_main([out, "--file", data, "--text-column", "remark", "--output", out + ".npy"])
    assert np.allclose(np.load(out + ".npy"), minibert.load(out).embed([row[0] for row in rows]), atol=1e-5)
    capsys.readouterr()
    predict_main([out, "--text", "good 1", "--text-pair", "film 1"])
    line = capsys.readouterr().out.rstrip("\n").split("\t")
    probability = minibert.load(out).predict([("good 1", "film 1")])[0].probabilities
    given = [name for name in probability if f"{name} {probability[name]:.4f}" in line[0]]
    assert line[1:] == ["good 1", "film 1"] and given
    predict_main([out, "--text", "good 1", "--text-pair", "film 1", "--format", "jsonl"])
    assert json.loads(capsys.readouterr().out)["text_pair"] == "film 1"
    predict_main([out, "--text", "good 1", "good 2", "--text-pair", "film 1", "film 2", "--explain"])
    told = capsys.readouterr().out
    classifier = minibert.load(out)
    logits = classifier.logits(["good 1", "good 2"], ["film 1", "film 2"])
    for i, words in enumerate(explain(classifier, ["good 1", "good 2"], ["film 1", "film 2"], logits), 1):
        assert f"\t{marked(f'good {i}', words)}\t{marked(f'film {i}', words, in_pair=True)}\n" in told
    predict_main([out, "--text", "good 1"])
    assert "trained on two texts a row; --text-pair gives the second" in capsys.readouterr().err
    for arguments in (["--text", "a", "b", "--text-pair", "c"], ["--file", data, "--text-pair", "c"]):
        with pytest.raises(UserError, match="--text-pair"):
            predict_main([out, *arguments])
