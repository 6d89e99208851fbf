"""--check and the head of a run say what is in the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minibert.batching.tokenizer import Tokenizer
from minibert.cli import run_command
from minibert.config import RunConfig
from minibert.data.loading import load_data
from minibert.errors import UserError
from minibert.finetune import main
from minibert.predict import main as predict
from minibert.reporting.data_summary import FEW_ROWS, WIDTH, Inspection, histogram, inspect, summary_lines
from minibert.runs.folder import refuse_at_once


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def flawed(tmp_path: Path) -> RunConfig:
    """Train and test files with one flaw of each kind."""
    train = [(f"word{i} good", "good" if i % 2 else "bad") for i in range(60)]
    train += [("the  SAME", "good"), ("the same", "bad"), ("a rare one", "rare"), ("long " * 100, "bad")]
    test = [("new one", "good"), ("word1 good", "good"), ("The same", "bad"), ("what is this", "unheard")]
    files = {"train": write(tmp_path / "train.csv", train), "test": write(tmp_path / "test.csv", test)}
    return RunConfig(**files, validation_split=0)


def inspected(config: RunConfig, model: Path, max_length: int = 64) -> Inspection:
    data = load_data(config)
    tokenizer = Tokenizer.from_folder(model)
    tokens = {part: tokenizer.encode(rows.texts, rows.pairs, max_length) for part, rows in data.splits.items()}
    return inspect(data, tokens, max_length, config.truncation)


def test_every_flaw_is_found(flawed: RunConfig, minilm: Path) -> None:
    found = inspected(flawed, minilm)
    train, test = found.parts["train"], found.parts["test"]
    assert (train.rows, test.rows) == (64, 4)
    assert train.classes == {"bad": 32, "good": 31, "rare": 1, "unheard": 0} and test.classes["unheard"] == 1
    assert (train.duplicate_rows, train.conflicts, test.conflicts) == (1, 1, 0)
    assert (train.conflict_examples[0].lines, train.conflict_examples[0].labels) == ([62, 63], ["good", "bad"])
    assert [(s.part, s.other, s.lines) for s in found.shared] == [("test", "train", [3, 4])]
    assert found.few_rows == {"rare": 1} and found.labels_not_in_train == {"test": ["unheard"]}
    assert (train.length_longest, train.cut_rows, train.cut_tokens) == (102, 1, 38)
    assert sum(rows for _, _, rows in train.histogram) == 64 and train.histogram[-1] == (65, 128, 1)
    text = "\n".join(summary_lines(found))
    for phrase in ("test that are also in train: 2", "line 62 good, 63 bad", "unheard", "rare (1)", "1.6% of rows"):
        assert phrase in text


def test_clean_data_has_no_warnings(tmp_path: Path, minilm: Path) -> None:
    rows = [(f"word{i}", "ab"[i % 2]) for i in range(FEW_ROWS * 4)]
    found = inspected(RunConfig(train=write(tmp_path / "train.csv", rows)), minilm)
    assert not [line for line in summary_lines(found) if line.startswith("look at")]


def test_histogram_counts_every_row_once() -> None:
    lengths = np.array([2, 4, 5, 8, 9, 300])
    assert histogram(lengths)[:3] == [(1, 4, 2), (5, 8, 2), (9, 16, 1)]
    assert [rows for _, _, rows in histogram(lengths)[3:]] == [0, 0, 0, 0, 1]
    assert histogram(lengths)[-1][:2] == (257, 512)


def test_the_screen_stays_a_screen_with_150_classes_and_long_names(tmp_path: Path, minilm: Path) -> None:
    names = [f"class {i} with a name that goes on and on and on for ever" for i in range(150)]
    rows = [(f"word{i} " * (1 + i % 300), names[i % 150]) for i in range(900)]
    found = inspected(RunConfig(train=write(tmp_path / "train.csv", rows)), minilm)
    lines = summary_lines(found)
    assert len(lines) <= 34 and max(map(len, lines)) <= WIDTH  # model and cost take six more
    assert len(found.parts["train"].classes) == 150 and "140 more" in "\n".join(lines)


def finetune(*arguments: str) -> int:
    return run_command(main, arguments)


def test_a_label_does_not_command_the_terminal(tmp_path: Path, minilm: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f'words {i},"\x1b[31mred\ngreen"\nmore {i},blue\n' for i in range(20)))
    lines = summary_lines(inspected(RunConfig(train=str(path)), minilm))
    assert any("[31mred green" in line for line in lines) and not any(set("\x1b\n") & set(line) for line in lines)


@pytest.mark.parametrize("freeze", ["none", "1", "all"])
def test_check_trains_nothing_and_tells_the_cost(
    flawed: RunConfig, tiny: Callable[..., Path], tmp_path: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    flags = ["--train", str(flawed.train), "--test", str(flawed.test), "--model", str(tiny()), "--batch-size", "8"]
    capsys.readouterr()
    assert finetune("--check", *flags, "--freeze", freeze, "--output", str(output), "--epochs", "2") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == "" and len(lines) <= 40 and max(map(len, lines[3:])) <= WIDTH and lines[-1].startswith("cost")
    assert [path.name for path in output.iterdir()] == ["check.json"]
    written = json.loads((output / "check.json").read_text())
    rows = written["parts"]["train"]["rows"]
    cost = written["cost"]
    assert cost["steps"] == 2 * -(-rows // 8) and cost["tokens_per_epoch"] == written["parts"]["train"]["tokens"]
    assert cost["seconds"] > 0 and 1 << 26 < cost["peak_memory_bytes"] < 1 << 33


def test_a_run_may_follow_a_check_in_the_same_folder_and_records_skipped_rows(
    flawed: RunConfig, tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(str(flawed.train), "a") as file:
        file.write(",good\nfar,too,many\n")
    output = str(tmp_path / "out")
    flags = ["--train", str(flawed.train), "--model", str(tiny()), "--output", output, "--max-steps", "2"]
    assert (
        finetune("--check", *flags) == 2 and "line 66: 1 row has no text; line 67: 3 cells" in capsys.readouterr().err
    )
    for how in (["--check"], []):
        assert finetune(*how, *flags, "--on-bad-rows", "skip") == 0
        said = capsys.readouterr().out
        assert all(word in said for word in ("skipped 2 rows of", "classes", "tokens  median", "█", "look at"))
    skipped = json.loads((tmp_path / "out" / "run.json").read_text())["skipped_rows"]["train"]
    assert skipped["rows"] == 2 and [row["line"] for row in skipped["first"]] == [66, 67]
    check = json.loads((tmp_path / "out" / "check.json").read_text())
    assert check["parts"]["train"]["rows"] and "cost" not in check
    assert run_command(predict, [output, "--file", str(flawed.train), "--on-bad-rows", "skip"]) == 0
    said = capsys.readouterr()
    assert "skipped 2 rows of" in said.err and "line 67" in said.err and len(said.out.splitlines()) == 65


def test_check_is_for_one_process(flawed: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minibert.runtime.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="--check: for one process"):
        refuse_at_once(replace(flawed, check=True))


def test_check_finds_the_mistakes_that_a_run_would(
    flawed: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("keep")
    assert finetune("--check", "--train", str(flawed.train), "--output", str(tmp_path / "used")) == 2
    error = capsys.readouterr().err
    assert "not empty" in error and error.count("\n") == 1


def test_long_notes_are_told_to_their_end(flawed: RunConfig, minilm: Path) -> None:
    found = inspected(flawed, minilm)
    found = replace(found, notes=["a note that goes on " * 8 + "to its end", *["short"] * 14])
    lines = summary_lines(found)
    assert any(line.endswith("to its end") for line in lines) and max(map(len, lines)) <= WIDTH
    assert "        ... 3 more notes" in lines
