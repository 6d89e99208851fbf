"""The commands as people run them: real processes, real weights, real messages."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from commands import run, run_here
from interrupted import interrupted

import minibert
from minibert.errors import UserError


@pytest.fixture(scope="session")
def messages(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 short messages of the spam file, every second one spam."""
    with open(shared_data / "sms_spam" / "spamdata_v2.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"]) < 120]
    chosen = [row for label in ("0", "1") for row in rows if row["label"] == label]
    spam, ham = chosen[::-1][:130], chosen[:270]
    path = tmp_path_factory.mktemp("data") / "messages.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row["text"], "spam" if row["label"] == "1" else "ham") for row in spam + ham)
    return path


RECIPE = ["--epochs", "2", "--lr", "2e-4", "--batch-size", "16", "--max-length", "64"]


@pytest.fixture(scope="session")
def trained(messages: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "spam"
    arguments = ["--train", str(messages), "--test-split", "0.2", "--output", str(output), *RECIPE]
    done = run("minibert.finetune", *arguments)
    assert "minibert.predict" in done.stdout and done.stderr == ""
    return output


def test_the_folder_holds_what_the_contract_names(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.json",
        "train_log.jsonl",
        "run.json",
        "predictions-validation.csv",
        "predictions-test.csv",
    }
    assert "checkpoints" not in names  # of a finished run nothing can be resumed
    assert not [name for name in names if "tmp" in name]
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {"0": "ham", "1": "spam"} and config["label2id"] == {"ham": 0, "spam": 1}
    assert config["problem_type"] == "single_label_classification"


def test_metrics_are_good_and_complete(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    for part in ("validation", "test"):
        assert metrics[part]["accuracy"] > 0.9
        assert {"macro_f1", "weighted_f1", "mcc", "loss", "roc_auc", "confusion_matrix"} <= set(metrics[part])
        assert set(metrics[part]["per_class"]) == {"ham", "spam"}
    assert metrics["reload_max_difference"] < 1e-5
    assert metrics["speed"]["tokens_per_second"] > 0 and metrics["speed"]["precision"] == "fp32"
    assert 0 <= metrics["speed"]["padding_fraction"] < 0.3
    record = json.loads((trained / "run.json").read_text())
    assert record["flags"]["learning_rate"] == 2e-4 and len(record["data"]["train"]["sha256"]) == 64


def read_predictions(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_transformers_loads_the_folder_and_gives_the_same_predictions(trained: Path) -> None:
    rows = read_predictions(trained / "predictions-test.csv")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained).eval()
    texts = [row["text"] for row in rows]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
    assert np.abs(minibert.load(trained).logits(texts) - logits.numpy()).max() < 1e-5
    probabilities = torch.softmax(logits / model.config.minibert["temperature"], 1)
    for row, theirs in zip(rows, probabilities.tolist(), strict=True):
        assert float(row["probability_spam"]) == pytest.approx(theirs[1], abs=1e-5)
        assert row["predicted"] == model.config.id2label[int(theirs[1] > theirs[0])]


def test_predictions_name_the_rows_of_the_file(trained: Path, messages: Path) -> None:
    with open(messages, encoding="utf-8", newline="") as file:
        lines = {number: row for number, row in enumerate(csv.DictReader(file), start=2)}
    rows = read_predictions(trained / "predictions-test.csv")
    for row in rows:
        assert lines[int(row["row"])] == {"text": row["text"], "label": row["label"]}
        truth = float(row[f"probability_{row['label']}"])
        assert float(row["loss"]) == pytest.approx(-np.log(truth), abs=1e-3)


def test_predict_on_text_and_file(trained: Path, messages: Path, tmp_path: Path) -> None:
    texts = ["WIN a FREE prize now! Call 0900 123", "see you at eight, mum"]
    done = run("minibert.predict", str(trained), "--text", *texts)
    labels = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert labels == ["spam", "ham"] == [p.label for p in minibert.load(trained).predict(texts)]
    run("minibert.predict", str(trained), "--file", str(messages), "--output", str(tmp_path / "out.csv"))
    rows = read_predictions(tmp_path / "out.csv")
    truth = read_predictions(messages)
    assert [row["text"] for row in rows] == [row["text"] for row in truth]
    right = [row["predicted"] == wanted["label"] for row, wanted in zip(rows, truth, strict=True)]
    assert np.mean(right) > 0.9
    piped = run("minibert.predict", str(trained), "--file", str(messages)).stdout
    assert piped.splitlines()[0] == "row,text,predicted,probability,probability_ham,probability_spam"


def test_evaluate_prints_the_metrics(trained: Path, messages: Path) -> None:
    metrics = json.loads(run("minibert.evaluate", str(trained), "--file", str(messages)).stdout)
    assert metrics["accuracy"] > 0.9 and sum(map(sum, metrics["confusion_matrix"])) == 400


def test_embed_equals_mean_pooling_of_transformers(minilm: Path, messages: Path, tmp_path: Path) -> None:
    output = tmp_path / "emb.npy"
    run("minibert.embed", str(minilm), "--file", str(messages), "--output", str(output))
    vectors = np.load(output)
    texts = [row["text"] for row in read_predictions(messages)][:20]
    tokenizer, model = (c.from_pretrained(minilm) for c in (transformers.AutoTokenizer, transformers.AutoModel))
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    assert vectors.shape == (400, 384) and np.abs(vectors[:20] - expected.numpy()).max() < 1e-5


@pytest.mark.slow
def test_five_lines_of_python(minilm: Path, messages: Path, tmp_path: Path) -> None:
    rows = read_predictions(messages)
    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    clf = minibert.finetune(
        texts, labels, model=str(minilm), freeze="all", head="mlp:32", output=str(tmp_path / "x"), quiet=True
    )
    predictions = clf.predict(texts[:5])
    assert predictions[0].label in ("ham", "spam") and set(predictions[0].probabilities) == {"ham", "spam"}
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    with pytest.warns(UserWarning, match="transformers refuses this folder"):
        clf.save(tmp_path / "copy")
    again = minibert.load(tmp_path / "copy")
    assert np.array_equal(again.logits(texts[:9]), clf.logits(texts[:9]))
    assert clf.embed(texts[:3], pooling="cls").shape == (3, 384)
    assert clf.predict([]) == []
    with pytest.raises(UserError, match="3 texts but 2 labels"):
        minibert.finetune(["a", "b", "c"], [0, 1])
    with pytest.raises(UserError, match="2 texts but 1 second texts"):
        clf.predict(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'"),
        ({"train": "data.csv"}, "train is for the command line; the data is the first argument"),
        ({"check": True}, "check is for the command line"),
        ({"text_column": "body"}, "text_column: is for tables and files"),
        ({"test": (["a"],)}, r"test: expected a pair, \(texts, labels\)"),
        ({"validation": 5}, r"validation: expected a pair"),
        ({"validation_file": "d.csv"}, r"give validation=, \(texts, labels\)"),
        ({"test": ([], [])}, "test: no texts; leave it out"),
        ({"model": object()}, "model is object; expected a name, a path or a number"),
    ],
)
def test_mistakes_from_python(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        minibert.finetune(["a", "b"], [0, 1], **more)


@pytest.mark.slow
def test_a_run_is_reproducible(messages: Path, tmp_path: Path, minilm: Path) -> None:
    for name in ("a", "b"):
        run(
            "minibert.finetune",
            "--train",
            str(messages),
            "--output",
            str(tmp_path / name),
            "--max-steps",
            "4",
            "--quiet",
        )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_bits(messages: Path, tmp_path: Path, minilm: Path) -> None:
    common = ["--train", str(messages), "--max-steps", "40", "--batch-size", "8", "--eval-steps", "15"]
    run("minibert.finetune", *common, "--output", str(tmp_path / "whole"))
    stopped = [*common, "--output", str(tmp_path / "stopped")]
    assert "--resume" in interrupted(7, stopped)
    resumed = run("minibert.finetune", *stopped, "--resume")
    assert "resumed at step 7 of 40" in resumed.stdout
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    interrupted(7, [*common, "--output", str(tmp_path / "changed")])
    other = [*common, "--output", str(tmp_path / "changed"), "--resume", "--lr", "1e-3"]
    changed = run("minibert.finetune", *other, check=False)
    assert changed.returncode == 2 and "learning_rate" in changed.stderr


def test_resume_and_output_alone_go_on_with_the_flags_of_the_run(
    films: Path, film_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minibert.finetune import main

    folder = tmp_path / "films"
    flags = ["--train", str(films), "--model", str(film_model), "--epochs", "2", "--batch-size", "16", "--lr", "1e-3"]
    flags.append("--keep-checkpoint")
    main([*flags, "--output", str(folder)])
    said = capsys.readouterr().out
    assert said.count("validation macro_f1") == 3 and "epoch 1   step 9 of 18 · loss" in said
    assert "always answering" in said and f"report:  {folder / 'report.html'}" in said
    before = (folder / "model.safetensors").read_bytes()
    main(["--resume", "--output", str(folder)])
    assert "resumed at step 18 of 18" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == before
    for epochs in ("4", "3"):  # 3 is the default: it is given all the same
        with pytest.raises(UserError, match=rf"changed: epochs \(was 2.0, is {epochs}.0\).*its own flags"):
            main(["--resume", "--output", str(folder), "--epochs", epochs])
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command[3:-2] == flags  # the card tells how to do the run again, not how to end it


def test_resume_does_not_take_the_demonstration_for_a_run_it_knows_nothing_of(
    films: Path, film_model: Path, tmp_path: Path
) -> None:
    from minibert.finetune import main

    with open(films, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    folder, settings = tmp_path / "listed", {"model": str(film_model), "epochs": 1, "quiet": True}
    minibert.finetune([row["text"] for row in rows], [row["label"] for row in rows], output=str(folder), **settings)
    (tmp_path / "empty").mkdir()
    before = (folder / "model.safetensors").read_bytes()
    for output in (folder, tmp_path / "empty"):
        with pytest.raises(UserError, match="with a training file to go on with; give the flags"):
            main(["--resume", "--output", str(output)])
    assert (folder / "model.safetensors").read_bytes() == before and not any((tmp_path / "empty").iterdir())


def test_an_mlp_head_is_kept_for_the_same_labels_unless_another_is_asked_for(
    films: Path, film_model: Path, tmp_path: Path
) -> None:
    from minibert.finetune import main

    fast = ["--train", str(films), "--epochs", "1", "--freeze", "all", "--quiet"]
    main([*fast, "--model", str(film_model), "--head", "mlp:8", "--output", str(tmp_path / "first")])
    for name, more in (("kept", []), ("wider", ["--head", "mlp:16"]), ("plain", ["--head", "linear"])):
        main([*fast, "--model", str(tmp_path / "first"), "--output", str(tmp_path / name), *more])
    saved = {name: minibert.load(tmp_path / name).model.mlp_size for name in ("kept", "wider", "plain")}
    assert saved == {"kept": 8, "wider": 16, "plain": 0}
    for name in ("first", "kept"):
        with pytest.raises(RuntimeError, match=r"(?s)classifier.weight.*torch.Size\(\[0\]\)|mismatch"):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "library_name: minibert" in card and "transformers lacks and refuses" in card
        assert "transformers does not know" not in card and "of transformers loads" not in card
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "kept" / "run.json").read_text())["flags"]["head"] == "mlp:8"


def test_a_mistake_with_overwrite_leaves_the_earlier_run_alone(trained: Path, messages: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    arguments = ["--train", str(messages), "--output", str(trained), "--overwrite"]
    for mistake in (["--metric", "bleu"], ["--class-weights", "none.json"]):
        assert run_here("minibert.finetune", *arguments, *mistake, check=False).returncode == 2
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_minibert_finetune_is_a_module_and_a_function() -> None:
    code = """
import minibert.finetune
from minibert import finetune
from minibert.finetune import main
assert callable(minibert.finetune) and callable(finetune) and callable(main)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_output_goes_through_a_closed_pipe_quietly(trained: Path, messages: Path) -> None:
    command = f"{sys.executable} -m minibert.predict {trained} --file {messages} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.startswith("row,text") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_demo_without_arguments(tmp_path: Path, minilm: Path) -> None:
    """The README's first command: from nothing to a model that is right nine times of ten."""
    done = run("minibert.finetune", "--output", str(tmp_path / "demo"))
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.9
    assert "python -m minibert.predict" in done.stdout
