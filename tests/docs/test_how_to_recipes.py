"""The recipes of docs/how-to/recipes.md run, each with a tiny model in place of a real one."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import needed

import minibert

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "recipes.md"
RECIPES = {
    title: code
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M)
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}
TEXTS = [f"a film was {'good' if i % 2 else 'bad'} {i}" for i in range(90)]
LABELS = ["good" if i % 2 else "bad" for i in range(90)]


def run(title: str, film_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the recipe leaves. The tiny model learns in a few steps, if they are large."""
    monkeypatch.chdir(folder)
    if "runs/mine" in RECIPES[title]:
        minibert.finetune(TEXTS, LABELS, model=film_model, epochs=3, learning_rate=2e-3, output="runs/mine", quiet=True)
    code = RECIPES[title].replace('"path/to/bert"', repr(str(film_model)))
    code = code.replace("1e-5, 2e-4", "1e-3, 2e-3").replace('model")', 'model", learning_rate=2e-3)')
    names: dict[str, Any] = {"texts": TEXTS, "labels": LABELS, "__name__": "recipe"}
    exec(compile(code, title, "exec", dont_inherit=True), names)  # without this file's own future imports
    return names


def test_every_recipe_has_its_test() -> None:
    libraries = ["FastAPI", "Optuna", "scikit-learn", "cleanlab", "SHAP"]
    assert [title.split()[-1] for title in RECIPES] == libraries


def test_fastapi(film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("fastapi")
    client = needed("fastapi.testclient").TestClient
    title = "Serve with FastAPI"
    assert len(RECIPES[title].strip().splitlines()) <= 15
    names = run(title, film_model, tmp_path, monkeypatch)
    expected = [p.label for p in names["classifier"].predict(TEXTS)]
    with client(names["app"]) as session, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda i: session.post("/predict", json=TEXTS[i:]).json(), range(24)))
    assert all([each["label"] for each in answer] == expected[i:] for i, answer in enumerate(answers))


def test_optuna(film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run("Tune with Optuna", film_model, tmp_path, monkeypatch)["study"]
    assert len(study.trials) == 4 and study.best_value > 0.5
    assert set(study.best_params) == {"learning_rate", "label_smoothing"}


def test_scikit_learn(film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Cross-validate with scikit-learn", film_model, tmp_path, monkeypatch)
    assert names["scores"].mean() > 0.8 and names["held_out"].shape == (90, 2)


def test_cleanlab(film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("cleanlab")
    issues = run("Find wrong labels with cleanlab", film_model, tmp_path, monkeypatch)["issues"]
    assert len(issues) == 90 and issues["is_label_issue"].mean() < 0.2


@pytest.mark.filterwarnings("ignore")  # of matplotlib's next release, and of transformers
def test_shap(film_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("shap")
    values = run("Explain with SHAP", film_model, tmp_path, monkeypatch)["explanation"]
    words, of_good = [word.strip() for word in values.data[0]], values[0, :, "good"].values
    assert words[max(range(len(words)), key=of_good.__getitem__)] == "good"
