"""The Python API as Python people use it: a typed function, tables and files for data, a result that knows itself."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import shutil
import subprocess
import sys
import sysconfig
import typing
import venv
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import openpyxl
import pandas
import pytest

import minibert
from minibert.api import Settings
from minibert.config import RunConfig
from minibert.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reviews(films: Path) -> list[dict[str, str]]:
    with open(films, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def texts(reviews: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in reviews]


@pytest.fixture(scope="module")
def numbers(reviews: list[dict[str, str]]) -> list[int]:
    return [int(row["label"] == "good") for row in reviews]


@pytest.fixture
def recipe(film_model: Path, tmp_path: Path) -> dict[str, Any]:
    recipe = {"epochs": 3, "learning_rate": 2e-3, "quiet": True, "device": "cpu"}
    return {"model": film_model, "output": tmp_path / "run", "overwrite": True, **recipe}


def right(classifier: minibert.Classifier, texts: list[str], labels: list[Any]) -> float:
    return float(np.mean([p.label == label for p, label in zip(classifier.predict(texts), labels, strict=True)]))


def test_the_module_shows_what_it_has() -> None:
    shown = [name for name in dir(minibert) if not name.startswith("_")]
    assert shown == sorted(minibert.__all__)
    assert all(getattr(minibert, name) is not None for name in shown)
    with pytest.raises(AttributeError):
        minibert.nothing  # noqa: B018


def test_finetune_is_a_function_whichever_way_it_is_imported() -> None:
    code = """
import inspect, sys
import minibert
import minibert.finetune
import minibert.finetune as again
from minibert import finetune
from minibert.finetune import main
assert "torch" not in sys.modules
assert inspect.isfunction(finetune) and finetune is minibert.finetune is again
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_setting_is_a_keyword_with_its_default_and_its_help() -> None:
    parameters = inspect.signature(minibert.finetune).parameters
    settings = {field.name: field for field in dataclasses.fields(RunConfig)}
    for_the_command = {"train", "check"}
    assert settings.keys() - parameters.keys() == for_the_command
    assert settings.keys() - typing.get_type_hints(Settings).keys() == for_the_command | {"validation", "test"}
    for name in Settings.__annotations__:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == settings[name].default
        assert f"\n    {name}: {settings[name].metadata['help']}" in (minibert.finetune.__doc__ or "")
        choices = settings[name].metadata["choices"]
        several = isinstance(settings[name].default, tuple)
        assert not choices or several or typing.get_args(typing.get_type_hints(Settings)[name]) == choices


SNIPPET = """
import minibert

classifier = minibert.finetune(["a", "b"], [0, 1], model="path", epochs=3, schedule="cosine", output="runs/x")
label: object = classifier.predict(["a new text"])[0].label
score: float = classifier.predict("a new text").score
reveal_type(classifier)
reveal_type(minibert.load("runs/x").predict("a"))
minibert.finetune(["a"], [0], schedule="cosinus")
minibert.finetune(["a"], [0], epohcs=3)
"""


def test_mypy_reads_the_types_of_an_installed_package(tmp_path: Path) -> None:
    """As from a wheel. The stubs of torch and numpy are not there, which is as well: they take a minute."""
    for name in ("minibert", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = sysconfig.get_path("purelib", "venv", paths)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*install, str(tmp_path / "clone")], check=True, timeout=300)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--strict", "snippet.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert len(lines) >= 4, done.stdout
    assert 'Revealed type is "minibert.inference.classifier.Classifier"' in lines[0]
    assert 'Revealed type is "minibert.inference.classifier.Prediction"' in lines[1]
    assert 'error: Argument "schedule"' in lines[2]
    assert "epohcs" in lines[3]


@pytest.mark.parametrize("given", [int, float, bool, str, np.int64])
def test_labels_come_back_in_their_type(recipe: Any, texts: list[str], numbers: list[int], given: type) -> None:
    labels = [given(number) for number in numbers]
    trained = minibert.finetune(texts, np.array(labels) if given is np.int64 else labels, **recipe)
    for classifier in (trained, minibert.load(recipe["output"])):
        assert right(classifier, texts, labels) > 0.9
        expected = int if given is np.int64 else given
        assert [type(label) for label in classifier.labels] == [expected] * 2
        prediction = classifier.predict(texts[1])
        assert isinstance(prediction, minibert.Prediction)
        assert type(prediction.label) is expected and prediction.probabilities[prediction.label] == prediction.score


def test_several_labels_come_back_in_their_type(recipe: Any, texts: list[str], numbers: list[int]) -> None:
    for labels in ([[number, 7] for number in numbers], np.stack([numbers, [1] * len(texts)], 1).tolist()):
        classifier = minibert.finetune(texts, labels, **recipe)
        assert all(type(label) is int for p in classifier.predict(texts) for label in p.label)
        assert all(type(label) is int for label in classifier.labels)


def test_the_result_knows_itself(recipe: Any, texts: list[str], numbers: list[int]) -> None:
    names = ["ham", "<spam>"]
    labels = [names[number] for number in numbers]
    trained = minibert.finetune(texts, labels, test=(texts[:40], labels[:40]), **recipe)
    loaded = minibert.load(recipe["output"])
    assert trained.metrics["test"] == loaded.metrics["test"] and trained.metrics["speed"]
    for classifier in (trained, loaded):
        assert classifier.labels == ["<spam>", "ham"] and classifier.folder == recipe["output"]
        assert classifier.evaluate(texts[:40], labels[:40]) == trained.metrics["test"]
        probabilities = classifier.predict_proba(texts)
        assert probabilities.shape == (160, 2)
        chosen = [classifier.labels[i] for i in probabilities.argmax(1)]
        assert chosen == [p.label for p in classifier.predict(texts)]
        score = f"{trained.metrics['test']['macro_f1']:.4f}"
        assert f"test macro_f1 {score}" in repr(classifier) and str(recipe["output"]) in repr(classifier)
        assert score in classifier._repr_html_() and "&lt;spam&gt;" in classifier._repr_html_()
        with pytest.raises(UserError, match=r"test list, text 1: label 'eggs' is unknown to the model"):
            classifier.evaluate(texts[:2], ["ham", "eggs"])


def test_another_model_knows_no_scores(tiny: Any) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification", num_labels=3), "cpu")
    assert classifier.metrics == {} and classifier.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "<table>" not in classifier._repr_html_()


def test_tables(recipe: Any, texts: list[str], numbers: list[int]) -> None:
    frame = pandas.DataFrame({"id": range(160), "words": texts, "opinion": numbers}, index=range(900, 1060))
    named = {"text_column": "words", "label_column": "opinion"}
    classifier = minibert.finetune(frame, validation=frame[:50], test=frame[50:], **named, **recipe)
    assert right(classifier, texts, numbers) > 0.9 and classifier.labels == [0, 1]
    assert sum(map(sum, classifier.metrics["test"]["confusion_matrix"])) == 110
    guessed = frame.rename(columns={"words": "text", "opinion": "label"})
    assert right(minibert.finetune(guessed, **recipe), texts, numbers) > 0.9
    weights = [1.0] * 160
    assert right(minibert.finetune(guessed, sample_weight=weights, **recipe), texts, numbers) > 0.9


def test_datasets_keep_the_names_of_their_classes(recipe: Any, texts: list[str], numbers: list[int]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=features)
    names = [["no", "yes"][number] for number in numbers]
    assert right(minibert.finetune(data.with_format("numpy"), **recipe), texts, names) > 0.9
    both = datasets.DatasetDict(train=data, test=data.select(range(20)))
    assert sum(map(sum, minibert.finetune(both, **recipe).metrics["test"]["confusion_matrix"])) == 20
    several = datasets.Features(features | {"label": datasets.Sequence(datasets.ClassLabel(names=["no", "yes"]))})
    lists = datasets.Dataset.from_dict({"text": texts, "label": [[number] for number in numbers]}, features=several)
    assert minibert.finetune(lists, **recipe).labels == ["no", "yes"]
    unlabelled = datasets.Dataset.from_dict({"text": texts, "label": [-1, *numbers[1:]]}, features=features)
    with pytest.raises(UserError, match="train table, row 0: 1 row has no label"):
        minibert.finetune(unlabelled, **recipe)


def test_files(recipe: Any, films: Path, texts: list[str], reviews: Any, tmp_path: Path) -> None:
    labels = [row["label"] for row in reviews]
    classifier = minibert.finetune(films, test=str(films), **recipe)
    assert right(classifier, texts, labels) > 0.9 and "test" in classifier.metrics
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    for row in reviews:
        book.active.append([row["text"] + ', "quoted"\nand more', 3 if row["label"] == "good" else 4.0])
    book.save(tmp_path / "reviews.xlsx")
    classifier = minibert.finetune(tmp_path / "reviews.xlsx", **recipe)
    assert classifier.labels == ["3", "4"] and len(classifier.predict(texts)) == 160


@pytest.mark.parametrize("shift", [0, 1])
def test_names_for_numbers(recipe: Any, texts: list[str], numbers: list[int], shift: int) -> None:
    labels = [number + shift for number in numbers]
    classifier = minibert.finetune(texts, labels, label_names=["zero", "one"], **recipe)
    assert classifier.labels == ["zero", "one"]
    assert right(classifier, texts, [["zero", "one"][number] for number in numbers]) > 0.9
    with pytest.raises(UserError, match="text 0: label '5' is none of label_names, nor a number from 0 to 1"):
        minibert.finetune(texts, [5, *numbers[1:]], label_names="zero,one", **recipe)
    with pytest.raises(UserError, match="all different"):
        minibert.finetune(texts, numbers, label_names=["a", "a"], **recipe)


MISTAKES = {
    "did you mean epochs": {"epohcs": 3},
    "not empty; give overwrite=True, resume=True or another output": {"overwrite": False},
    "max_length=5: give at least 8": {"max_length": 5},
    "metric='f7': not a metric": {"metric": "f7"},
    "only with truncation='window'": {"window_stride": 9},
    "train list, text 3, 7, 11, .*: 40 rows have no text.*give on_bad_rows='skip'": {"texts": ["a", "b", "c", ""] * 40},
    "labels are missing": {"labels": None},
    "text_column: is for tables": {"text_column": "text"},
    "validation: expected a pair": {"validation": ["a"]},
    "train is for the command line": {"train": "x.csv"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_in_python(recipe: Any, texts: list[str], numbers: list[int], message: str) -> None:
    recipe["output"].mkdir()
    (recipe["output"] / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        minibert.finetune(**{"texts": texts, "labels": numbers, **recipe, **MISTAKES[message]})
    assert "--" not in str(error.value)
