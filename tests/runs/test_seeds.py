"""--seeds: real runs of the command, the summary against the runs' own files, baselines against scikit-learn."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from interrupted import interrupted
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import f1_score, log_loss, mean_absolute_error, mean_squared_error

import minibert
from minibert.cli import run_command
from minibert.config import RunConfig
from minibert.data.columns import Columns
from minibert.data.examples import Examples
from minibert.data.loading import RunData
from minibert.errors import UserError
from minibert.finetune import main
from minibert.problem.baseline import collapsed, majority_baseline
from minibert.problem.problem import MULTI, REGRESSION, SINGLE, Problem
from minibert.runs.seeds import summarise_seeds


@dataclass
class Done:
    stdout: str
    stderr: str


def finetune(*arguments: str, code: int = 0) -> Done:
    """The command, in this process: torch is loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run_command(main, arguments) == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def flags(films: Path, film_model: Path, output: Path, *more: str) -> list[str]:
    recipe = ["--epochs", "8", "--lr", "5e-3", "--batch-size", "16", "--test-split", "0.2", "--length-buckets"]
    recipe += ["--head-init", "random"]  # else a seed may end with its probe, which is the same for all
    return ["--train", str(films), "--model", str(film_model), "--output", str(output), *recipe, *more]


@pytest.fixture(scope="module")
def trained(films: Path, film_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("runs") / "three"
    return output, finetune(*flags(films, film_model, output, "--seeds", "3,1,2")).stdout


def test_each_seed_leaves_a_run_and_the_summary_adds_them_up(trained: tuple[Path, str]) -> None:
    output, out = trained
    summary = json.loads((output / "seeds.json").read_text())
    assert summary["seeds"] == [3, 1, 2]
    runs = {seed: json.loads((output / f"seed-{seed}" / "metrics.json").read_text()) for seed in (3, 1, 2)}
    for part in ("validation", "test"):
        for name in ("accuracy", "macro_f1", "loss"):
            values = [run[part][name] for run in runs.values()]
            assert summary[part][name]["mean"] == pytest.approx(np.mean(values))
            assert summary[part][name]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["validation"]["loss"]["std"] > 0  # the seeds do differ
    scores = {seed: run["validation"]["macro_f1"] for seed, run in runs.items()}
    best = summary["best_seed"]
    assert scores[best] == max(scores.values()) and f"best seed: {best}" in out
    mean, std = (summary["test"]["accuracy"][key] for key in ("mean", "std"))
    rows = {line.split()[0]: line.split()[1:] for line in out.split("\ntest ")[-1].splitlines() if line}
    assert rows["mean"][0] == f"{mean:.4f}" and rows["std"][0] == f"{std:.4f}"
    assert summary["warnings"] == [] and "warning" not in out


def test_all_seeds_train_on_the_same_rows(trained: tuple[Path, str]) -> None:
    output, _ = trained
    for part in ("validation", "test"):
        tables = []
        for seed in (1, 2, 3):
            with open(output / f"seed-{seed}" / f"predictions-{part}.csv", encoding="utf-8", newline="") as file:
                tables.append([(row["row"], row["text"]) for row in csv.DictReader(file)])
        assert tables[0] == tables[1] == tables[2] and tables[0]


def test_the_best_model_is_at_the_top(trained: tuple[Path, str]) -> None:
    output, _ = trained
    best = json.loads((output / "seeds.json").read_text())["best_seed"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.json", "predictions-test.csv"):
        top = output / name
        assert top.read_bytes() == (output / f"seed-{best}" / name).read_bytes() and not top.is_symlink()
    texts = ["the film is good", "the film was very bad"]
    command = [sys.executable, "-m", "minibert.predict", str(output), "--text", *texts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["good", "bad"], done.stderr


def test_one_seed_of_several_is_the_plain_run_with_that_seed(
    trained: tuple[Path, str], films: Path, film_model: Path, tmp_path: Path
) -> None:
    finetune(*flags(films, film_model, tmp_path / "plain", "--seed", "2"))
    weights = [folder / "model.safetensors" for folder in (tmp_path / "plain", trained[0] / "seed-2")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resume_trains_only_what_is_missing(
    trained: tuple[Path, str], films: Path, film_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained[0], output)
    before = {seed: (output / f"seed-{seed}" / "model.safetensors").read_bytes() for seed in (1, 2, 3)}
    times = {seed: (output / f"seed-{seed}" / "model.safetensors").stat().st_mtime_ns for seed in (3, 1)}
    shutil.rmtree(output / "seed-2")
    out = finetune(*flags(films, film_model, output, "--seeds", "3,1,2", "--resume")).stdout
    assert out.count("finished before") == 2
    assert {seed: (output / f"seed-{seed}" / "model.safetensors").stat().st_mtime_ns for seed in (3, 1)} == times
    assert (output / "seed-2" / "model.safetensors").read_bytes() == before[2]
    whole, again = (json.loads((folder / "seeds.json").read_text()) for folder in (trained[0], output))
    assert again == whole
    changed = finetune(*flags(films, film_model, output, "--seeds", "3,1", "--resume", "--epochs", "4"), code=2)
    assert "changed: epochs (was 8.0, is 4.0)" in changed.stderr and changed.stderr.count("\n") == 1


def test_an_interrupted_seed_goes_on_where_it_stopped(film_model: Path, films: Path, tmp_path: Path) -> None:
    arguments = flags(films, film_model, tmp_path / "s", "--seeds", "1,2", "--max-steps", "20", "--epochs", "999")
    out = interrupted(30, arguments)
    assert f"--resume --output {tmp_path / 's'}\n" in out
    assert not (tmp_path / "s" / "model.safetensors").exists()
    done = finetune(*arguments, "--resume").stdout
    assert "resumed at step 10 of 20" in done and "seed 1 (1 of 2): finished" in done
    assert (tmp_path / "s" / "model.safetensors").exists()


def test_a_seed_killed_before_its_checkpoint_starts_again(film_model: Path, films: Path, tmp_path: Path) -> None:
    arguments = flags(films, film_model, tmp_path / "x", "--seeds", "1,2", "--epochs", "1")
    finetune(*arguments)
    summary = json.loads((tmp_path / "x" / "seeds.json").read_text())
    for name in ("metrics.json", "model.safetensors"):
        (tmp_path / "x" / "seed-2" / name).unlink()
    assert "no checkpoint yet: from the beginning" in finetune(*arguments, "--resume").stdout
    assert json.loads((tmp_path / "x" / "seeds.json").read_text()) == summary


def test_resume_of_seeds_wants_the_whole_command(trained: tuple[Path, str]) -> None:
    before = (trained[0] / "model.safetensors").read_bytes()
    for more in ([], ["--seeds", "3,1,2"]):
        error = finetune("--resume", "--output", str(trained[0]), *more, code=2).stderr
        assert "with --seeds, give the whole command again, and --resume" in error
    assert (trained[0] / "model.safetensors").read_bytes() == before


def test_overwrite_leaves_nothing_of_earlier_seeds(
    trained: tuple[Path, str], films: Path, film_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained[0], output)
    (output / "seed-notes").mkdir()  # not ours
    assert "not empty" in finetune(*flags(films, film_model, output, "--seeds", "1"), code=2).stderr
    finetune(*flags(films, film_model, output, "--seeds", "1", "--overwrite", "--metric", "bleu"), code=2)
    assert (output / "seed-2" / "model.safetensors").exists()  # a mistake left the earlier run alone
    finetune(*flags(films, film_model, output, "--seeds", "7", "--overwrite", "--test-split", "0"))
    assert sorted(path.name for path in output.glob("seed*")) == ["seed-7", "seed-notes", "seeds.json"]
    assert not (output / "predictions-test.csv").exists()
    assert json.loads((output / "seeds.json").read_text())["validation"]["accuracy"]["std"] is None


def test_one_command_at_a_time_writes_to_the_folder_of_all_seeds(
    trained: tuple[Path, str], films: Path, film_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained[0], output)
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    error = finetune(*flags(films, film_model, output, "--seeds", "9", "--overwrite"), code=2).stderr
    os.close(descriptor)
    assert "another run is writing here" in error and (output / "seed-2" / "model.safetensors").exists()
    mistaken = flags(films, film_model, tmp_path / "new" / "one", "--seeds", "1", "--metric", "bleu")
    finetune(*mistaken, code=2)
    assert not (tmp_path / "new" / "one").exists()


def test_collapsed_runs_are_named(film_model: Path, films: Path, tmp_path: Path) -> None:
    """A learning rate far too high: every answer becomes the same class."""
    wild = ["--lr", "100", "--max-grad-norm", "0", "--warmup-ratio", "0", "--seeds", "1,2"]
    arguments = flags(films, film_model, tmp_path / "x", *wild)
    out = finetune(*arguments).stdout
    assert "warning: seed 1 collapsed" in out and "warning: seed 2 collapsed" in out
    assert len(json.loads((tmp_path / "x" / "seeds.json").read_text())["warnings"]) == 2


def test_seeds_from_python_and_mistakes(film_model: Path, films: Path, tmp_path: Path) -> None:
    with open(films, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    flags = {"model": str(film_model), "epochs": 1, "quiet": True, "validation_split": 0}
    clf = minibert.finetune(texts, labels, seeds=[1, 2], output=str(tmp_path / "x"), **flags)
    assert np.array_equal(clf.logits(texts[:5]), minibert.load(tmp_path / "x" / "seed-1").logits(texts[:5]))
    for bad in ("1,x", "1,1", "1,01", f"1,{1 << 63}"):
        with pytest.raises(UserError, match="give different integers"):
            RunConfig(seeds=tuple(bad.split(",")))
    error = finetune("--train", str(films), "--seeds", "8", "--resume", "--output", str(tmp_path / "x"), code=2)
    assert "no checkpoint to resume" in error.stderr


def run_data(kind: str, names: list[str], train: list[object], validation: list[object]) -> RunData:
    parts = {
        part: Examples(part, ["x"] * len(labels), None, labels)
        for part, labels in (("train", train), ("validation", validation))
    }
    return RunData(parts, Problem(kind, names), Columns(("text",), None, ("label",)), [])


def test_the_baseline_of_several_labels_has_tuned_thresholds_as_a_run_has() -> None:
    rows: list[object] = [[name for j, name in enumerate("abc") if i % (j + 2) == 0] for i in range(60)]
    share = np.array([sum(name in row for row in rows) for name in "abc"]) / 60  # type: ignore[operator]
    logits = np.tile(np.log(share / (1 - share)), (60, 1)).astype(np.float32)
    problem = Problem(MULTI, list("abc"))
    problem = problem.tuned(logits, problem.targets(rows))
    metrics = problem.metrics(logits, problem.targets(rows))
    assert majority_baseline(problem, problem.targets(rows))["micro_f1"] == pytest.approx(metrics["micro_f1"])
    assert metrics["micro_f1"] > 0.4


def test_the_baseline_is_that_of_scikit_learn_on_the_rows_that_are_judged() -> None:
    rows, x = list("abbca"), np.zeros((5, 1))
    problem = Problem(SINGLE, ["a", "b", "c"])
    ours = majority_baseline(problem, problem.targets(rows))
    dummy = DummyClassifier(strategy="prior").fit(x, rows)
    assert ours["accuracy"] == pytest.approx(dummy.score(x, rows))
    assert ours["macro_f1"] == pytest.approx(f1_score(rows, dummy.predict(x), average="macro"))
    assert ours["loss"] == pytest.approx(log_loss(rows, dummy.predict_proba(x)), abs=1e-2)
    values = np.array([1.0, 2.5, 4.5], dtype=np.float32)
    ours = majority_baseline(Problem(REGRESSION, ["score"]), values)
    mean, median = (DummyRegressor(strategy=way).fit(x[:3], values).predict(x[:3]) for way in ("mean", "median"))
    assert ours["mse"] == pytest.approx(mean_squared_error(values, mean)) and ours["spearman"] is None
    assert ours["mae"] == pytest.approx(mean_absolute_error(values, median))


@pytest.mark.parametrize(
    ("values", "baseline", "lower", "expected"),
    [
        ([0.90, 0.91, 0.47], 0.46, False, ["", "", "collapsed"]),
        ([0.90, 0.91, 0.60], 0.46, False, ["", "", "far below"]),
        ([0.90, 0.91, 0.80], 0.46, False, ["", "", ""]),
        ([0.85, None], None, False, ["", "collapsed"]),  # a correlation of equal predictions
        ([0.5, 2.19, 0.6], 2.2, True, ["", "collapsed", ""]),
        ([0.5, 1.6, 0.6], 2.2, True, ["", "far below", ""]),
        ([1.0, 1.0], 1.0, False, ["", ""]),  # rows of one class: any answer may be as good
    ],
)
def test_what_counts_as_collapsed(
    values: list[float | None], baseline: float | None, lower: bool, expected: list[str]
) -> None:
    for found, wanted in zip(collapsed(values, baseline, lower), expected, strict=True):
        assert wanted in found if wanted else found == ""


def test_a_lower_loss_is_the_better_seed() -> None:
    data = run_data(SINGLE, ["a", "b"], list("ab"), list("ab"))
    runs = [{"seed": seed, "validation": {"loss": loss}} for seed, loss in ((1, 0.5), (2, 0.3), (3, 0.4))]
    assert summarise_seeds(runs, data, "loss")["best_seed"] == 2
