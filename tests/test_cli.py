"""Flags, their spellings, and the mistakes that are answered in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run, run_here

import minibert
from minibert.cli import checked_values, run_command
from minibert.config import RunConfig
from minibert.errors import UserError
from minibert.messages import messages_in_python


def test_none_from_python_is_the_default() -> None:
    assert checked_values({"class_weights": None, "lr": None, "epochs": 2}, "here") == {"epochs": 2.0}
    with pytest.raises(UserError, match="unknown setting 'epoch'"):
        checked_values({"epoch": None}, "here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "none.csv"], "none.csv: no such file"),
        (["--train", "~nobody-of-this-name/a.csv"], "~nobody-of-this-name/a.csv: no such file"),
        (["--train", "data.csv", "--model", "~nobody-of-this-name"], "~nobody-of-this-name: no such model folder"),
        (["--train", "bad.csv"], "bad.csv, line 3: 3 cells where the header has 2"),
        (["--train", "data.csv", "--text-column", "txt"], "no column 'txt'; its columns are text, label"),
        (["--train", "data.csv", "--epochs", "-1"], "--epochs -1.0"),
        (["--train", "data.csv", "--epochz", "1"], "--epochz"),
        (["--train", "data.csv", "--seeds", "1", "2"], "several values stand between commas: --seeds A,B"),
        (["--train", "data.csv", "--device", "tpu"], "--device"),
        (["--train", "data.csv", "--model", "/no/such/model"], "/no/such/model: no such model folder"),
        (["--train", "data.csv", "--max-length", "9999"], "at most 512 tokens"),
        (["--train", "data.csv", "--output", "full"], "full: not empty"),
        (["--train", "data.csv", "--config", "bad.toml"], "unknown setting 'epoch'"),
        (["--train", "data.csv", "--resume", "--output", "new"], "no checkpoint to resume"),
        (["--train", "data.csv", "--precision", "bf16", "--device", "cpu"], "--precision bf16"),
        (["--validation", "data.csv"], "--train is missing"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    tmp_path: Path, minilm: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    (tmp_path / "bad.csv").write_text("text,label\none,a\ntwo,b,c\n")
    (tmp_path / "bad.toml").write_text("epoch = 3\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run_here("minibert.finetune", *arguments, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "new") == before
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run("minibert.finetune", "--train", "none.csv", check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.csv: no such file") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freze", "all"], "--freze all (did you mean --freeze?)"),
        (["--epoch=3"], "did you mean --epochs?"),
        (["reviews.csv"], "reviews.csv (did you mean --train in front of it?)"),
        (["--fp16"], "--fp16 (--precision fp16)"),
        (["--warmup-steps", "100"], "(--warmup-ratio is the fraction of all steps)"),
        (["--overwrite_output_dir", "True"], "True (a switch has no value: --x, or --no-x)"),
        (["--fancy"], "unrecognized arguments: --fancy; see"),
        (["--epochs", "ten"], "--epochs: 'ten' is not auto or a number; see"),
        (["--batch_size", "1.5"], "--batch-size: '1.5' is not an integer; see"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_one_that_was_meant(arguments: list[str], message: str) -> None:
    from minibert.cli import parse_run_config

    with pytest.raises(UserError) as error:
        parse_run_config(arguments)
    assert message in str(error.value)


def test_metrics_by_the_names_of_trainer() -> None:
    assert RunConfig(metric="eval_f1").metric == "f1"


def test_help_has_each_flag_once_under_its_first_name() -> None:
    from minibert.cli import run_parser

    text = run_parser().format_help()
    assert text.count("--learning-rate X") == 1 and "--learning_rate" not in text
    assert "--[no-]length-buckets" in text and "--train FILE" in text and text.count("\n") < 160


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["finetuen", "--train", "x.csv"], 2, "error: no command 'finetuen'; did you mean finetune?"),
        (["juggle"], 2, "error: no command 'juggle'; there are finetune, predict"),
        (["--version"], 0, minibert.__version__),
    ],
)
def test_commands_by_name(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from minibert.cli import main

    assert main(arguments) == code
    said = "".join(capsys.readouterr())
    assert said.startswith(message) and said.count("\n") == 1


def test_spellings_of_flags_and_empty_values(tmp_path: Path) -> None:
    from minibert import predict
    from minibert.cli import parse_run_config

    for spelled in ("--no-length-buckets", "--no_length_buckets", "--no-length_buckets"):
        assert parse_run_config(["--length_buckets", spelled]).length_buckets is False
    texts = predict.parser().parse_args(["x", "--text", "--a_b is no flag", "a_b=--c_d", "--top_k=2"])
    assert texts.text == ["--a_b is no flag", "a_b=--c_d"] and texts.top_k == 2
    for name in ("--model", "--train", "--output", "--label-delimiter"):
        with pytest.raises(UserError, match=f"{name}: is empty"):
            parse_run_config([name, ""])
    (tmp_path / "run.toml").write_text('train = "~/rows.csv"\n')
    assert parse_run_config(["--config", str(tmp_path / "run.toml")]).train == str(Path("~/rows.csv").expanduser())


def test_the_demonstration_gives_way_to_every_flag() -> None:
    from minibert.cli import given_settings
    from minibert.run import demonstration

    given = given_settings(["--epochs", "3", "--test-split", "0"])
    config = RunConfig(**demonstration() | given)
    assert (config.epochs, config.test_split, config.learning_rate) == (3, 0, None)


def test_config_file_and_aliases_set_the_same_flags(tmp_path: Path) -> None:
    from minibert.cli import parse_run_config

    (tmp_path / "off.toml").write_text("no-cls-only = true\nno_temperature = false\n")
    off = parse_run_config(["--config", str(tmp_path / "off.toml")])
    assert off.cls_only is False and off.temperature is True
    (tmp_path / "run.toml").write_text('epochs = 5\nlr = 1e-4\nlabel-column = "target"\nlength_buckets = true\n')
    config = parse_run_config(["--config", str(tmp_path / "run.toml"), "--num_train_epochs", "7"])
    assert (config.epochs, config.learning_rate, config.label_column) == (7, 1e-4, ("target",))
    assert config.length_buckets is True
    off = parse_run_config(["--config", str(tmp_path / "run.toml"), "--no-length-buckets", "--no-quiet"])
    assert off.length_buckets is False and off.quiet is False
    long = ["--model_name_or_path", "m", "--train_file", "t", "--max_seq_length", "9", "--per_device_train_batch_size"]
    config = parse_run_config(
        [*long, "4", "--text_column", "a,b", "--text-column", "c", "--lr_scheduler_type", "cosine"]
    )
    assert (config.model, config.train, config.max_length, config.batch_size) == ("m", "t", 9, 4)
    assert config.text_column == ("a", "b", "c") and config.schedule == "cosine"


def test_help_and_import_are_without_torch() -> None:
    code = """
import contextlib, importlib, sys, minibert
for name in ("finetune", "predict", "evaluate", "embed", "export", "cli"):
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"minibert.{name}").main(["--help"])
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.count("usage: ") == 6


def test_what_a_command_says_names_flags_though_it_calls_the_python_api(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: Any = ()) -> None:
        with messages_in_python():
            raise UserError("use a smaller --max-length")

    assert run_command(fails, []) == 2
    assert capsys.readouterr().err == "error: use a smaller --max-length\n"
    with pytest.raises(UserError, match="use a smaller max_length"):
        fails()
