"""The report and the model card: true figures, escaped text, bounded size, a page that a real browser shows well."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Page, browser
from conftest import save_tiny
from finished import add_predictions, finished, log_of
from huggingface_hub import ModelCard
from markupsafe import escape
from sklearn.metrics import average_precision_score, roc_auc_score

import minibert
from minibert.problem.problem import MULTI, REGRESSION, SINGLE
from minibert.reporting import html_report as report
from minibert.reporting.charts import Series, chart, drawable, limits_of, rounded, ticks
from minibert.reporting.format import compact
from minibert.reporting.model_card import write_card
from minibert.reporting.render import pieces
from minibert.reporting.results import Finished

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
EVIL = '<script>alert("x")</script><img src=http://127.0.0.1:9/x onerror=alert(1)></style>'
NAMES = {"spam": f"<b>spam</b> | `{EVIL}`", "ham": "---\nham & \"co\": 'é' ✓ \u202e"}


def texts_of(rng: np.random.Generator, count: int) -> list[str]:
    words = "the a of and good bad film very not is was free call now see you at money win prize".split()
    texts = [" ".join(rng.choice(words, rng.integers(3, 40))) for _ in range(count)]
    return [f"{text} {EVIL}" if i % 5 == 0 else text for i, text in enumerate(texts)]


def write_rows(path: Path, kind: str) -> list[str]:
    """A file of 160 rows whose labels can partly be learnt, and the flags that read it."""
    rng = np.random.default_rng(3)
    rows = []
    for text in texts_of(rng, 160):
        money, noise = "money" in text, rng.random() < 0.15
        if kind == "single":
            label: Any = NAMES["spam" if money != noise else "ham"]
        elif kind == "multi":
            label = [name for name, has in ((NAMES["spam"], money), (NAMES["ham"], "film" in text)) if has != noise]
        else:
            label = text.count("money") + rng.normal() / 4
        rows.append(json.dumps({"text": text, "label": label}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    kinds = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    return ["--problem-type", kinds[kind]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each problem type, with hostile names wherever a name can be chosen."""
    from minibert.finetune import main

    folder = tmp_path_factory.mktemp("report")
    model = save_tiny(folder / "tiny")
    outputs = {}
    for kind in ("single", "multi", "regression"):
        path = folder / f"{kind} <script>alert(1)<.jsonl"
        flags = write_rows(path, kind)
        outputs[kind] = folder / f"{kind}<script>"
        recipe = ["--epochs", "8", "--lr", "3e-3", "--batch-size", "16", "--max-length", "32", "--test-split", "0.2"]
        arguments = ["--train", str(path), "--model", str(model), "--output", str(outputs[kind]), "--quiet"]
        main([*arguments, *flags, *recipe, "--validation-split", "0.3"])
    return outputs


HEADLINES = {
    "single": ["Training", "Data", "On test", "Calibration", "Each class", "Most confidently wrong"],
    "multi": ["Training", "Data", "On test", "Calibration", "Each class", "Most confidently wrong"],
    "regression": ["Training", "Data", "On test", "Furthest off"],
}
FIGURES = {
    "single": "Loss|Metrics on validation|Learning rate|Labels|Token lengths|Confusion matrix|Precision and recall|ROC|"
    "Thresholds|Reliability|Distribution of confidence|Padding|Time by part",
    "multi": "Loss|Metrics on validation|Learning rate|Labels|Token lengths|Precision and recall|ROC|"
    "Reliability|Distribution of stated probability|Padding|Time by part",
    "regression": "Loss|Metrics on validation|Learning rate|Values|Token lengths|"
    "Predicted and true|Errors|Padding|Time by part",
}


def spilled(page: Page, width: int) -> list[str]:
    """What stands out of the window; what scrolls in, or is cut by, a box of its own may be wider."""
    return page.evaluate(
        """[...document.querySelectorAll('html, body *')].filter(e => {
            const box = e.getBoundingClientRect(), own = e.closest('.scroll, .key')
            return !own && (box.right > WIDTH + 1 || box.left < -1 || e.scrollWidth > WIDTH)
        }).map(e => e.outerHTML.slice(0, 80))""".replace("WIDTH", str(width))
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the report with")
def test_odd_reports_fit_into_the_window(tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        for name, make in ODD_RUNS.items():
            run, path = make(), tmp_path / f"{name}.html"
            path.write_text(report.page(run, log_of(run), name), encoding="utf-8", errors="replace")
            for width in (1200, 390):
                page.open(path, width, 800, width == 390)
                assert (spilled(page, width), page.complaints()) == ([], []), (name, width)
                rows = "[...document.querySelectorAll('.heat tr:not(:first-child)')].map(e => e.offsetHeight)"
                assert max(page.evaluate(rows), default=0) < 150, (name, width)  # names in lines, not letter by letter


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the report with")
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_a_browser_shows_the_report(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    path = runs[kind] / "report.html"
    with browser(tmp_path / "profile") as page:
        for width, dark in ((1200, False), (1200, True), (390, False), (390, True)):
            page.open(path, width, 800, dark)
            page.screenshot(ARTEFACTS / f"report-{kind}-{width}-{'dark' if dark else 'light'}.png")
            assert page.complaints() == []
            assert page.requests() == [path.as_uri()]  # nothing else was asked for
            assert spilled(page, width) == []
            assert page.evaluate("document.querySelectorAll('script, img, iframe, b, link, a').length") == 0
            assert EVIL in page.evaluate("document.body.textContent")
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) < 200) is dark
        headlines = page.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
        assert [name for name in headlines if name != "Least certain"] == [*HEADLINES[kind], "Speed", "Reproduce"]
        assert (
            page.evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent).join('|')")
            == FIGURES[kind]
        )
        small = "[...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().height < 9).length"
        assert page.evaluate(small) == 0  # on a phone


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the report with")
def test_the_browser_tests_would_notice(tmp_path: Path) -> None:
    """A page with all the faults that are looked for."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('no'); nothing()</script><img src='none.png'><p style='width: 2000px'>wide")
    with browser(tmp_path / "profile") as page:
        page.open(bad, 390, 800, False)
        assert len(page.complaints()) >= 2 and len(page.requests()) == 2
        assert len(spilled(page, 390)) == 2


def test_report_holds_the_figures_of_the_metrics(runs: dict[str, Path]) -> None:
    metrics = json.loads((runs["single"] / "metrics.json").read_text())
    page = (runs["single"] / "report.html").read_text()
    test = metrics["test"]
    for text in (
        f"{test['macro_f1']:.3f}",
        f"{test['accuracy']:.1%} of",
        f" {test['roc_auc']:.3f}</span>",
        f" {test['average_precision']:.3f}</span>",
    ):
        assert text in page
    error = metrics["calibration"]["test"]["expected_calibration_error"]
    assert f"{error['before']:.4f} without temperature" in page
    assert f"{error['after']:.4f} with temperature {metrics['calibration']['temperature']:.3g}" in page
    assert "--batch-size 16" in page and "finetune" in page
    assert "<script" not in page and "<img" not in page and 'http-equiv="Content-Security-Policy"' in page
    seconds = metrics["speed"]["seconds_by_part"]
    assert (
        len(seconds) == 4 and sum(seconds.values()) >= metrics["speed"]["total_seconds"] - 0.01
    )  # nothing is left out


def test_most_confidently_wrong_rows_are_so(runs: dict[str, Path]) -> None:
    """The first text of the table is the wrong row of the highest probability in the predictions' files."""
    import csv

    wrong = []
    for part in ("validation", "test"):
        with open(runs["single"] / f"predictions-{part}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["label"] != row["predicted"]:
                    wrong.append((float(row[f"probability_{row['predicted']}"]), row["text"]))
    assert wrong
    page = (runs["single"] / "report.html").read_text().split("Most confidently wrong")[1]
    first = re.findall(r'<td class="text"[^>]*><bdi>(.*?)</bdi>', page, re.DOTALL)[0]
    probability, _ = max(wrong)
    assert first in {escape(text) for p, text in wrong if p > probability - 1e-5}
    assert f"{probability:.3f}" in page


def test_a_large_run_has_a_small_report() -> None:
    run = finished(labels=[f"class {i} " + "long name " * 20 for i in range(150)], rows=20_000, texts=["word " * 400])
    log = log_of(run) + [{"step": i, "epoch": i / 1000, "validation_loss": 0.5} for i in range(5000)]
    page = report.page(run, log, "big")
    assert len(page.encode()) < 400_000
    assert "others)" in page and "Most often confused" in page and "3 of 150 labels" in page


def without_labels() -> Finished:
    run = finished(MULTI, ["a", "b"])
    run.sets["test"].targets[:] = 0
    add_predictions(run, "test", np.full((300, 2), -9, np.float32))  # nothing to find, and nothing given
    return run


def seconds_since_1970() -> Finished:
    """Values so large that float32 tells only every 128th apart."""
    run = finished(REGRESSION)
    for part, dataset in run.sets.items():
        dataset.targets = (1.6e9 + np.arange(300) % 3 * 128).astype(np.float32)
        if part != "train":
            add_predictions(run, part, dataset.targets[:, None].copy())
    return run


ODD_RUNS: dict[str, Callable[[], Finished]] = {
    "one class of two in test": lambda: finished(classes=[0]),
    "one class of three in test": lambda: finished(labels=list("abc"), classes=[1]),
    "150 classes": lambda: finished(labels=[f"class {i}" for i in range(150)]),
    "28 labels": lambda: finished(MULTI, [f"label {i}" for i in range(28)]),
    "labels that no row has": without_labels,
    "regression": lambda: finished(REGRESSION),
    "large values": seconds_since_1970,
    "hostile labels": lambda: finished(labels=[*NAMES.values(), "x" * 500, "عربي", "😀\r\n| pipe", ""]),
    "odd texts": lambda: finished(texts=[EVIL, "", "x" * 5000, "عربي", "😀" * 300, "a\r\nb", "\x1b[31m"]),
    "a frozen run with an MLP head": lambda: finished(freeze="all", head="mlp:512"),
}


@pytest.mark.parametrize("name", ODD_RUNS)
def test_odd_runs_have_a_report_and_a_card(name: str, tmp_path: Path) -> None:
    run = ODD_RUNS[name]()
    page = report.page(run, log_of(run), "odd")
    numbers = re.findall(r' (?:x|y|cx|cy|x1|y1|r|width|height|points)="([^"]*)"', page)
    assert numbers and not any(re.search("nan|inf", number) for number in numbers)
    assert "<script" not in page and "\x1b" not in page and "\r" not in page
    write_card(tmp_path, run)
    card = ModelCard.load(tmp_path / "README.md")
    assert "nan" not in card.text and card.data.library_name == ("minibert" if "MLP" in name else "transformers")
    assert ("learning rate | 0.001," in card.text) is ("MLP" in name)  # what a frozen run's head learns with
    tables = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {3, 4, 6}


def test_curves_of_several_labels_are_those_of_scikit_learn() -> None:
    for kind in (SINGLE, MULTI):
        run = finished(kind, [f"label {i}" for i in range(6)])
        targets, logits = run.sets["test"].targets, run.logits["test"]
        truth = targets if kind == MULTI else np.eye(6)[targets]
        scores = run.problem.probabilities(logits)
        page = report.page(run, log_of(run), "x")
        precision, roc = page.split("<figcaption>Precision and recall")[1].split("<figcaption>ROC")
        each = average_precision_score(truth, scores, average=None)
        worst = np.argsort(each)[:3]
        wanted = ["micro average", *(f"label {i}" for i in worst)]
        for text, score, all_together in (
            (precision, each, average_precision_score(truth, scores, average="micro")),
            (roc, roc_auc_score(truth, scores, average=None), roc_auc_score(truth, scores, average="micro")),
        ):
            numbers = [all_together, *score[worst]]
            legend = re.findall(r"</i>(.*?)</span>", text.split("</div>")[0])
            assert legend[:4] == [f"{name} {number:.3f}" for name, number in zip(wanted, numbers, strict=True)]


def test_card_is_one_that_the_hub_reads(runs: dict[str, Path]) -> None:
    for kind, wanted in (("single", "Accuracy"), ("multi", "micro F1"), ("regression", "Spearman")):
        card = ModelCard.load(runs[kind] / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-classification"
        assert card.data.base_model is None  # a folder here is nothing to others
        results = {result.metric_name.lower(): result for result in card.data.eval_results}
        metrics = json.loads((runs[kind] / "metrics.json").read_text())["test"]
        name = {"single": "accuracy", "multi": "micro_f1", "regression": "spearman"}[kind]
        assert results[wanted.lower()].metric_value == pytest.approx(metrics[name], abs=1e-6)
        assert results[wanted.lower()].dataset_split == "test"
        for headline in ("Data", "Recipe", "Metrics", "Intended use", "Limits", "Reproduce"):
            assert f"\n## {headline}\n" in card.text
        assert "<b>" not in card.text.split("## Reproduce")[0] and "<img" not in card.text
        tables = [line for line in card.text.splitlines() if line.startswith("|")]
        assert tables and not any(re.search(r"(?<!\\)`", line) for line in tables)
        assert str(runs[kind].parent) not in card.text


def test_a_run_without_validation_has_a_report_and_a_card(tmp_path: Path) -> None:
    texts = [f"good film {i}" if i % 2 else f"bad film {i}" for i in range(40)]
    model, output = str(save_tiny(tmp_path / "tiny")), tmp_path / "run"
    flags = {"model": model, "output": str(output), "validation_split": 0.0, "quiet": True, "epochs": 1.0}
    minibert.finetune(texts, [i % 2 for i in range(40)], **flags)
    page = (output / "report.html").read_text()
    assert "nothing to judge" in page and "Calibration" not in page and "Confusion" not in page
    assert "minibert.finetune(texts, labels" in page and "validation_split=0.0" in page
    assert ModelCard.load(output / "README.md").data.eval_results is None


def test_text_that_is_no_valid_unicode_is_reported(tmp_path: Path) -> None:
    """Half an emoji, as JSON can hold: it cannot be written to a file as it is."""
    texts = [f"good film {i} \ud83d" if i % 2 else f"bad film {i}" for i in range(40)]
    flags = {"model": str(save_tiny(tmp_path / "tiny")), "quiet": True, "max_steps": 1, "head_init": "random"}
    minibert.finetune(texts, [i % 2 for i in range(40)], output=str(tmp_path / "run"), **flags)
    assert "good film" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "\\ud83d" in (tmp_path / "run" / "predictions-validation.csv").read_text(encoding="utf-8")


def test_escaping_leaves_nothing_that_is_markup_or_cannot_be_written() -> None:
    def shown(text: str) -> str:
        return pieces.muted(text).removeprefix('<p class="muted">').removesuffix("</p>")

    assert shown("<a href='x'>&\"") == "&lt;a href=&#39;x&#39;&gt;&amp;&#34;"
    assert shown("a\x00b\ud83dc").encode() == "a\ufffdb?c".encode()
    assert pieces.muted(pieces.muted("<")).count("&lt;") == 1
    assert shown("a\r\nb\rc") == "a\nb\nc"


def test_ticks_and_curves() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [compact(v) for v in (0, 5e-5, 0.25, 1500, 25_000, 3e6)] == ["0", "5e-5", "0.25", "1500", "25k", "3M"]
    assert compact(3e38) == "3e38" and compact(-2e12) == "-2e12"
    low, high = rounded(limits_of([np.array([0.9, 0.9000000000000001])]))  # two ways to add up the same
    assert low <= 0.5 and high >= 1
    x = np.linspace(0, 1, 100_000)
    thin = drawable(Series("steep", x, np.minimum(x * 1000, 1)))
    assert len(thin.x) < 300 and thin.y[-1] == 1 and (thin.x < 0.001).sum() > 50  # the steep part keeps its points
    assert "nan" not in chart([Series("x", np.array([0, math.nan, 1]), np.array([1, 2, math.inf]))], "x", "y")
    assert "nan" not in chart([Series("none", np.zeros(0), np.zeros(0))], "x", "y")
