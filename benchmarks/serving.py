"""Prediction on a CPU beside transformers' pipeline and onnxruntime: `python benchmarks/serving.py [--texts 1024]`.

All answer the same messages of SMS spam, of mixed lengths and in the same order, with the same weights: MiniLM with a
classifier on top. The pipeline is used as its documentation says, with batch_size 32 and its own padding, on the
texts as they come and in order of length; so is onnxruntime, with the graph that `minibert.export` writes.
Each runs once to warm up; then they take turns, and each one's figure is the median of its rounds. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from steps import environment
from trainers import sms_spam

import minibert
from minibert.batching.tokenizer import Tokenizer
from minibert.inference.classifier import Classifier
from minibert.inference.onnx import export, open_session, quantize, session_logits
from minibert.model.bert import BertForSequenceClassification
from minibert.model.checkpoint import load_model, save_model
from minibert.runs.setup import demo_weights

PIPELINE = "transformers pipeline"
LABELS = ["ham", "spam"]
Predict = Callable[[list[str]], list[float]]  # texts -> probabilities of spam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1024, help="messages a round, drawn at random")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="write the result to this JSON file")
    arguments = parser.parse_args()
    everything = sms_spam()
    rows = np.random.default_rng(0).permutation(len(everything.texts))[: arguments.texts]
    texts = everything.take(rows).texts
    with tempfile.TemporaryDirectory() as folder:
        predictors, lengths = make_predictors(Path(folder), texts)
        difference = warm_up(predictors, texts)
        seconds = interleave(predictors, texts, arguments.rounds)
    result = report(seconds, len(texts)) | {
        "texts": len(texts),
        "rounds": arguments.rounds,
        "tokens": {
            "median": float(np.median(lengths)),
            "mean": round(float(lengths.mean()), 1),
            "max": int(lengths.max()),
        },
        "largest_difference_of_a_probability": difference,
        **environment(),
        "onnxruntime": onnxruntime.__version__,
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def make_predictors(folder: Path, texts: list[str]) -> tuple[dict[str, Predict], np.ndarray]:
    """Every way to predict, each from texts to probabilities, and the texts' lengths in tokens."""
    model, _ = load_model(demo_weights(), BertForSequenceClassification, num_labels=2, seed=0)
    with torch.no_grad():
        model.classifier.out.weight.mul_(20)  # a new head's probabilities would all be near a half
    save_model(folder, model, LABELS, max_length=512)
    Tokenizer.from_folder(Path(demo_weights())).save(folder, 512)
    classifier = minibert.load(folder, "cpu")
    pipeline = transformers.pipeline("text-classification", str(folder), device="cpu")

    def pipelined(texts: list[str]) -> list[float]:
        answers = pipeline(texts, batch_size=32, truncation=True, top_k=None)
        return [next(row["score"] for row in answer if row["label"] == "spam") for answer in answers]

    def pipelined_by_length(texts: list[str]) -> list[float]:
        order = np.argsort([len(text) for text in texts])
        answers = np.empty(len(texts))
        answers[order] = pipelined([texts[i] for i in order])
        return answers.tolist()

    predictors: dict[str, Predict] = {
        "minibert": lambda texts: [p.probabilities["spam"] for p in classifier.predict(texts)],
        PIPELINE: pipelined,
        f"{PIPELINE}, sorted by length": pipelined_by_length,
    }
    export(classifier, folder / "model.onnx")
    quantize(folder / "model.onnx", folder / "model-int8.onnx")
    for name, file in (("onnxruntime", "model.onnx"), ("onnxruntime int8", "model-int8.onnx")):
        session = open_session(folder / file)
        predictors[name] = onnx_predictor(classifier, session, by_length=False)
        predictors[f"{name}, sorted by length"] = onnx_predictor(classifier, session, by_length=True)
    return predictors, classifier.encode(texts).lengths


def onnx_predictor(classifier: Classifier, session: Any, by_length: bool) -> Predict:
    def predict(texts: list[str]) -> list[float]:
        logits = session_logits(session, classifier.encode(texts), by_length=by_length)
        return classifier.problem.probabilities(logits)[:, 1].tolist()

    return predict


def warm_up(predictors: dict[str, Predict], texts: list[str]) -> dict[str, float]:
    """One round of each; how far its probabilities are from minibert's."""
    answers = {name: np.array(predict(texts)) for name, predict in predictors.items()}
    return {name: float(f"{np.abs(answer - answers['minibert']).max():.2g}") for name, answer in answers.items()}


def interleave(predictors: dict[str, Predict], texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; who starts a round changes."""
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    names = list(predictors)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = time.perf_counter()
            predictors[name](texts)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: dict[str, list[float]], count: int) -> dict[str, Any]:
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    print(f"{'':<36} texts/s   pipeline = 1")
    for name, value in medians.items():
        print(f"{name:<36} {count / value:>7.0f}   {medians[PIPELINE] / value:>11.2f}x")
    return {
        "texts_per_second": {name: round(count / value, 1) for name, value in medians.items()},
        "faster_than_the_pipeline": {name: round(medians[PIPELINE] / value, 2) for name, value in medians.items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


if __name__ == "__main__":
    main()
