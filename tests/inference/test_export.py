"""Our folders in other people's hands: onnxruntime, transformers' pipeline, sentence-transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import minibert
from minibert.errors import UserError
from minibert.export import describe_change, main
from minibert.inference.onnx import PaddedClassifier, export, open_session, session_logits, verify
from minibert.model.bert import ACTIVATIONS, ClassificationHead
from minibert.problem.problem import REGRESSION, Problem

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export-and-serve.md"
TEXTS = ["win a free prize now", "see you at the film", "x", "", "the good and the bad " * 9]


def run_export(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minibert.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_onnxruntime_gives_the_logits_of_transformers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=3)
    path = tmp_path / "model.onnx"
    export(minibert.load(folder, "cpu"), path)
    onnx.checker.check_model(str(path), full_check=True)
    session = open_session(path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    for batch, length in ((1, 1), (1, 9), (4, 2), (7, 64)):
        ids = torch.randint(0, 211, (batch, length), generator=generator)
        types = torch.randint(0, 2, (batch, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        with torch.no_grad():
            expected = theirs(**inputs).logits.numpy()
        logits = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        assert expected.std() > 1e-3 and np.abs(logits - expected).max() < 1e-5


def test_every_activation_is_exported(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One layer with each, as an export takes seconds; test_model.py compares each with transformers."""
    names = ("gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh")  # the others are aliases
    classifier = minibert.load(tiny("BertForSequenceClassification", num_hidden_layers=len(names)), "cpu")
    for layer, name in zip(classifier.model.encoder.layers, names, strict=True):
        layer.activation = ACTIVATIONS[name]
    assert "logits differ by" in export(classifier, tmp_path / "model.onnx")
    assert verify(classifier.model, tmp_path / "model.onnx")[2] < 1e-5


def test_an_mlp_head_with_pairs_and_windows(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of several windows is one text for onnxruntime, too."""
    classifier = minibert.load(tiny("BertForSequenceClassification", num_labels=3), "cpu")
    classifier.model.classifier, classifier.model.mlp_size = (
        ClassificationHead(classifier.model.config, 3, 24).eval(),
        24,
    )
    classifier.max_length, classifier.truncation = 16, "window"
    classifier.write(tmp_path / "run")
    main([str(tmp_path / "run")])
    assert re.search(r"checked in onnxruntime .*1x64.* logits differ by \d", capsys.readouterr().out)
    path = tmp_path / "run" / "onnx" / "model.onnx"
    session, tokens = open_session(path), classifier.encode(TEXTS)
    assert len(tokens) > len(TEXTS)
    for by_length in (True, False):
        found = session_logits(session, tokens, by_length=by_length)
        assert np.abs(found - classifier.logits(TEXTS)).max() < 1e-5
    two = session_logits(session, classifier.encode(TEXTS, TEXTS[::-1]))
    assert np.abs(two - classifier.logits(TEXTS, TEXTS[::-1])).max() < 1e-5
    metadata = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    assert metadata["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and metadata["temperature"] == 1.0


def test_the_command_says_what_int8_changes(minilm: Path, tmp_path: Path) -> None:
    texts = [f"{word} number {i}" for i in range(30) for word in ("sugar and cream", "a football match")]
    labels = ["food", "sport"] * 30
    recipe = {"freeze": "all", "epochs": 20, "metric": "loss", "quiet": True}
    classifier = minibert.finetune(texts, labels, model=str(minilm), output=str(tmp_path / "run"), **recipe)
    table = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "rows.csv").write_text(table)
    small = tmp_path / "small.onnx"
    flags = ["--onnx", "--int8", "--output", str(small), "--file", str(tmp_path / "rows.csv")]
    out = run_export(str(tmp_path / "run"), *flags).stdout
    agreement, change = re.findall(r"on 60 rows: the same label on ([\d.]+)%, largest change .* ([\d.]+)\n", out)[0]
    expected, logits = classifier.logits(texts), session_logits(open_session(small), classifier.encode(texts))
    found = 100 * (logits.argmax(1) == expected.argmax(1)).mean()
    assert found == pytest.approx(float(agreement), abs=0.01) and found > 90 and 0 < float(change) < 0.3
    assert re.search(r"accuracy +fp32 1\.0000 +int8 [01]\.\d{4} +change [-+][01]\.\d{4}", out)
    assert small.stat().st_size < 0.3 * (tmp_path / "run" / "model.safetensors").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"run", "rows.csv", "small.onnx"}


def test_int8_of_windows_is_compared_text_by_text(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification", num_labels=3), "cpu")
    classifier.max_length, classifier.truncation = 16, "window"
    classifier.write(tmp_path / "run")
    rows = "".join(f'"{text}",LABEL_{i % 3}\n' for i, text in enumerate(TEXTS) if text)
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    main([str(tmp_path / "run"), "--int8", "--file", str(tmp_path / "rows.csv")])
    assert "int8 against fp32 on 4 rows" in capsys.readouterr().out


def test_int8_without_a_file_is_compared_on_sample_texts(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    multi = tiny("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    main([str(multi), "--int8"])
    assert "sample texts: the same label on " in capsys.readouterr().out
    assert [path.name for path in (multi / "onnx").iterdir()] == ["model_quantized.onnx"]
    regression, logits = Problem(REGRESSION, ["score"]), np.array([[1.0], [2.0]], dtype=np.float32)
    assert describe_change(regression, logits, logits + 0.25) == "largest change of a value 0.2500"


def test_a_graph_that_computes_something_else_is_not_written(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification"), "cpu")
    forward = PaddedClassifier.forward
    monkeypatch.setattr(PaddedClassifier, "forward", lambda self, a, b, c: forward(self, a, b, c) + 0.01)
    with pytest.raises(UserError, match="logits differ from ours by"):
        export(classifier, tmp_path / "wrong.onnx")
    assert verify(classifier.model, tmp_path / "wrong.onnx")[2] > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--onnx", "--file", "rows.csv"], "--file: is for --int8"),
        (["x", "--onnx", "--output", "/no/such/folder/m.onnx"], "/no/such/folder: no such folder"),
        (["/no/such/run", "--onnx"], "--output: is needed"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run_export(*arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_onnx_that_is_not_installed_is_named(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from minibert import export as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match=r"exporting needs onnxruntime; pip install onnxruntime$"):
        module.main([str(tiny()), "--onnx"])


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_the_pipeline_of_transformers_gives_our_probabilities(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "ours"
    source = tiny("BertForSequenceClassification", num_labels=3, problem_type=kind)
    classifier = minibert.load(source, "cpu")
    classifier.problem = replace(classifier.problem, labels=["praise", "complaint", "question"])
    classifier.save(folder)
    classify = transformers.pipeline("text-classification", str(folder), device="cpu")
    for theirs, ours in zip(classify(TEXTS, top_k=None, truncation=True), classifier.predict(TEXTS), strict=True):
        assert {row["label"]: row["score"] for row in theirs} == pytest.approx(ours.probabilities, abs=1e-5)


def test_sentence_transformers_gives_our_embeddings(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("sentence_transformers")
        classifier = minibert.load(tiny("BertForSequenceClassification"), "cpu")
        classifier.max_length = 24
        classifier.save(tmp_path / "ours")
        encoder = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
        vectors = encoder.encode(TEXTS)
    assert np.abs(vectors - classifier.embed(TEXTS, pooling="mean")).max() < 1e-5


def test_the_examples_of_the_how_to_run(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minibert.load(tiny("BertForSequenceClassification"), "cpu").save(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    examples = [code for code in blocks if "transformers import" in code]
    assert len(examples) == 2
    for code in examples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, {})
