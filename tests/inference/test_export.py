"""Our folders in other people's hands: onnxruntime, transformers' pipeline, sentence-transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import minibert
from minibert.errors import UserError
from minibert.export import export, open_session, session_logits, verify
from minibert.inference import onnx as onnx_graph

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export-and-serve.md"
TEXTS = ["win a free prize now", "see you at the film", "x", "", "the good and the bad " * 9]


def run_export(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minibert.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "quick_gelu", "relu", "silu", "tanh"])
def test_onnxruntime_gives_the_logits_of_transformers(
    tiny: Callable[..., Path], tmp_path: Path, activation: str
) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=3, hidden_act=activation)
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
        assert expected.std() > 1e-3 and np.abs(logits - expected).max() < 1e-4


def test_the_command_exports_an_mlp_head_and_says_what_int8_changes(
    minilm: Path, tmp_path: Path, shared_data: Path
) -> None:
    texts = [f"{word} number {i}" for i in range(30) for word in ("sugar and cream", "a football match")]
    labels = ["food", "sport"] * 30
    recipe = {"freeze": "all", "head": "mlp:16", "epochs": 20, "metric": "loss", "quiet": True}
    classifier = minibert.finetune(texts, labels, model=str(minilm), output=str(tmp_path / "run"), **recipe)
    table = "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "rows.csv").write_text(table)
    out = run_export(str(tmp_path / "run"), "--onnx").stdout
    assert re.search(r"checked in onnxruntime .*1x512.* logits differ by \d", out)
    session = open_session(tmp_path / "run" / "onnx" / "model.onnx")
    expected, tokens = classifier.logits(texts), classifier.encode(texts)
    for by_length in (True, False):
        assert np.abs(session_logits(session, tokens, by_length=by_length) - expected).max() < 1e-4
    pairs = [*reversed(texts)]
    two = session_logits(session, classifier.encode(texts, pairs))
    assert np.abs(two - classifier.logits(texts, pairs)).max() < 1e-4
    metadata = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "run" / "onnx" / "model.onnx").metadata_props}
    assert metadata["labels"] == ["food", "sport"] and metadata["temperature"] == 1.0

    small = tmp_path / "small.onnx"
    flags = ["--onnx", "--int8", "--output", str(small), "--file", str(tmp_path / "rows.csv")]
    out = run_export(str(tmp_path / "run"), *flags).stdout
    agreement, change = re.findall(r"on 60 rows: the same label on ([\d.]+)%, largest change .* ([\d.]+)\n", out)[0]
    logits = session_logits(open_session(small), tokens)
    found = 100 * (logits.argmax(1) == expected.argmax(1)).mean()
    assert found == pytest.approx(float(agreement), abs=0.01) and found > 90 and 0 < float(change) < 0.3
    assert re.search(r"accuracy +fp32 1\.0000 +int8 [01]\.\d{4} +change [-+][01]\.\d{4}", out)
    assert small.stat().st_size < 0.3 * (tmp_path / "run" / "onnx" / "model.onnx").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"run", "rows.csv", "small.onnx"}


def test_windows_are_one_text_for_onnxruntime_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification", num_labels=3), "cpu")
    classifier.max_length, classifier.truncation = 16, "window"
    classifier.save(tmp_path / "run")
    export(classifier, tmp_path / "model.onnx")
    tokens = classifier.encode(TEXTS)
    assert len(tokens) > len(TEXTS)
    found = session_logits(open_session(tmp_path / "model.onnx"), tokens)
    assert np.abs(found - classifier.logits(TEXTS)).max() < 1e-4
    rows = "".join(f'"{text}",LABEL_{i % 3}\n' for i, text in enumerate(TEXTS) if text)
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    out = run_export(str(tmp_path / "run"), "--onnx", "--int8", "--file", str(tmp_path / "rows.csv")).stdout
    assert "int8 against fp32 on 4 rows" in out


def test_int8_without_a_file_is_compared_on_sample_texts(tiny: Callable[..., Path]) -> None:
    multi = tiny("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    assert "sample texts: the same label on " in run_export(str(multi), "--onnx", "--int8").stdout
    assert [path.name for path in (multi / "onnx").iterdir()] == ["model_quantized.onnx"]
    single = tiny("BertForSequenceClassification", num_labels=1)
    assert "sample texts: largest change of a value " in run_export(str(single), "--onnx", "--int8").stdout


def test_a_graph_that_computes_something_else_is_not_written(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification"), "cpu")
    monkeypatch.setitem(onnx_graph.ACTIVATIONS, "gelu", onnx_graph.ACTIVATIONS["gelu_new"])
    with pytest.raises(UserError, match="logits differ from ours by"):
        export(classifier, tmp_path / "wrong.onnx")
    assert verify(classifier.model, tmp_path / "wrong.onnx")[2] > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "say which form to write: --onnx"),
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
    with pytest.raises(UserError, match=r"needs onnxruntime; pip install onnxruntime$"):
        module.main([str(tiny()), "--onnx"])


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_the_pipeline_of_transformers_gives_our_probabilities(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "ours"
    source = tiny("BertForSequenceClassification", num_labels=3, problem_type=kind)
    classifier = minibert.load(source, "cpu")
    classifier.problem.labels = ["praise", "complaint", "question"]
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
