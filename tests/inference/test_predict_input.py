"""What predict reads, what it refuses to, and which columns it takes."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
from commands import run_here

import minibert
from minibert.cli import run_command
from minibert.embed import main as embed_main
from minibert.errors import UserError
from minibert.evaluate import main as evaluate_main
from minibert.finetune import main as finetune_main
from minibert.inference.explain import explain, marked
from minibert.inference.stream import stream_lines
from minibert.predict import main as predict_main


@pytest.fixture
def untrained(tiny: Callable[..., Path]) -> Path:
    return tiny("BertForSequenceClassification")


@pytest.mark.slow
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
    done = run_here("minibert.predict", str(untrained), *arguments, text=text, check=False)
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
    lines = run_here("minibert.predict", str(untrained), "--text", "a", "b", "--text", "c").stdout.splitlines()
    assert [line.split("\t")[-1] for line in lines] == ["a", "b", "c"]


def test_pairs_are_refused_for_a_model_of_single_texts(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("BertForSequenceClassification", type_vocab_size=1)
    done = run_here("minibert.predict", str(folder), "--text", "a", "--text-pair", "b", check=False)
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
    done = run_here("minibert.predict", str(untrained), "--file", str(source), "--output", str(source), check=False)
    assert done.returncode == 2 and "is the file to read" in done.stderr and source.read_text() == "text\nzebra\n"
    (folder / "bad.jsonl").write_text('{"text": "a"}\n' * 10_001 + "oops\n")
    arguments = ["--file", str(folder / "bad.jsonl"), "--output", str(folder / "out.parquet")]
    done = run_here("minibert.predict", str(untrained), *arguments, check=False)
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
