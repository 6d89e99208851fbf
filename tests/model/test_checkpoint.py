"""Weights in and out: every key accounted for, both ways, and nothing unsafe read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minibert
from minibert.errors import UserError
from minibert.model.bert import BertForSequenceClassification, BertModel
from minibert.model.checkpoint import load_model, model_folder, save_model, their_tensors

KINDS = ["BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def encode(model: BertModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25).view(2, 10)).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_every_bert_class_loads_with_its_prefix(tiny: Callable[..., Path], kind: str) -> None:
    folder = tiny(kind)
    theirs = getattr(transformers, kind).from_pretrained(folder)
    body = theirs if kind == "BertModel" else theirs.bert
    with torch.no_grad():
        expected = body(torch.arange(5, 25).view(2, 10)).last_hidden_state
    model, report = load_model(folder, BertModel)
    assert float((encode(model) - expected).abs().max()) < 1e-5
    assert report.loaded == 5 + 3 * 16 + (2 if kind != "BertForMaskedLM" else 0)
    assert report.new == ([] if kind != "BertForMaskedLM" else ["pooler.dense.weight", "pooler.dense.bias"])
    assert all(name.startswith(("cls.", "classifier.", "bert.embeddings.position_ids")) for name in report.ignored)


def test_saved_folder_loads_in_transformers_with_equal_logits(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny()
    model, report = load_model(folder, BertForSequenceClassification, num_labels=3)
    assert report.new == ["classifier.out.weight", "classifier.out.bias"]
    save_model(tmp_path / "saved", model, ["no", "maybe", "yes"])
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert theirs.config.problem_type == "single_label_classification"
    assert set(their_tensors(model)) == set(theirs.state_dict())
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert float((model(ids).logits - theirs.eval()(ids).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_base_in_half_precision_is_not_saved_as_such(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: "float16"}))
    model, _ = load_model(folder, BertForSequenceClassification, num_labels=3)
    save_model(tmp_path / "saved", model, ["no", "maybe", "yes"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert theirs.dtype == torch.float32


def test_round_trip_keeps_every_bit(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = load_model(tiny("BertForSequenceClassification", num_labels=2), BertForSequenceClassification)
    save_model(tmp_path / "saved", model, ["a", "b"])
    again, report = load_model(tmp_path / "saved", BertForSequenceClassification)
    assert not report.new and not report.ignored
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_old_names_and_half_precision_load(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    before = encode(load_model(folder, BertModel)[0])
    rewrite(folder, lambda tensors: {
        re.sub("LayerNorm.bias$", "LayerNorm.beta", re.sub("LayerNorm.weight$", "LayerNorm.gamma", name)): t.half()
        for name, t in tensors.items()
    })  # fmt: skip
    model, _ = load_model(folder, BertModel)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float((encode(model) - before).abs().max()) < 5e-2
    rewrite(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert all(p.dtype == torch.float32 for p in load_model(folder, BertModel)[0].parameters())


def shard(folder: Path) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_what_distillation_left_in_a_checkpoint_is_left_there(tiny: Callable[..., Path]) -> None:
    """The projections that TinyBERT was distilled through."""
    folder = tiny()
    before = encode(load_model(folder, BertModel)[0])
    rewrite(folder, lambda tensors: tensors | {"fit_denses.0.weight": torch.ones(2), "fit_dense.bias": torch.ones(2)})
    model, report = load_model(folder, BertModel)
    assert torch.equal(encode(model), before) and {"fit_denses.0.weight", "fit_dense.bias"} <= set(report.ignored)


def test_a_model_of_another_task_is_no_classifier(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"lacks .*pooler.*; give a classifier of texts, or train one on this model"):
        minibert.load(tiny("BertForTokenClassification"))


def test_saving_goes_to_the_home_folder_and_onto_no_file(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = minibert.load(tiny("BertForSequenceClassification"))
    monkeypatch.setenv("HOME", str(tmp_path))
    classifier.save("~/mine")
    assert np.array_equal(minibert.load(tmp_path / "mine").logits(["a film"]), classifier.logits(["a film"]))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; give the name of a folder"):
        classifier.save(tmp_path / "file")


def test_a_folder_without_safetensors_says_how_to_make_them(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors here.*save_pretrained"):
        load_model(folder, BertModel)


def test_sharded_weights_load(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    before = encode(load_model(folder, BertModel)[0])
    shard(folder)
    assert torch.equal(encode(load_model(folder, BertModel)[0]), before)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_a_shard_outside_the_folder_is_refused(tiny: Callable[..., Path], name: str) -> None:
    folder = tiny()
    weight_map = shard(folder)
    weight_map[next(iter(weight_map))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="not a plain file name"):
        load_model(folder, BertModel)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


def test_wrong_tensors_are_named(tiny: Callable[..., Path]) -> None:
    key = "encoder.layer.1.attention.self.key.weight"
    cases = {
        "lacks .*" + re.escape(key): drop(key),
        "lacks embeddings.word_embeddings.weight": drop("embeddings.word_embeddings.weight"),
        "unknown tensor encoder.layer.7.extra": lambda t: {**t, "encoder.layer.7.extra": torch.zeros(2)},
        re.escape(key) + r" is \[32, 31\] where \[32, 32\]": lambda t: {**t, key: torch.zeros(32, 31)},
        r"embeddings.word_embeddings.weight is \[7, 32\]": lambda t: {
            **t,
            "embeddings.word_embeddings.weight": torch.zeros(7, 32),
        },
    }
    for message, change in cases.items():
        folder = tiny()
        rewrite(folder, change)
        with pytest.raises(UserError, match=message):
            load_model(folder, BertModel)


def test_a_head_of_another_size_is_an_error_unless_a_new_one_is_asked_for(tiny: Callable[..., Path]) -> None:
    folder = tiny("BertForSequenceClassification", num_labels=3)
    with pytest.raises(UserError, match=r"classifier.weight is \[3, 32\] where \[5, 32\]"):
        load_model(folder, BertForSequenceClassification, num_labels=5)
    model, report = load_model(folder, BertForSequenceClassification, num_labels=5, new_head=True)
    assert model.num_labels == 5 and report.ignored == ["classifier.bias", "classifier.weight"]


def test_pickled_weights_are_refused_with_the_way_out(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled .*save_pretrained"):
        load_model(folder, BertModel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "'roberta' is not supported"),
        ({"model_type": "distilbert"}, "'distilbert' is not supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_size": -1}, "hidden_size must be"),
        ({"vocab_size": "many"}, "vocab_size must be"),
    ],
)
def test_other_architectures_are_named(tiny: Callable[..., Path], change: dict[str, object], message: str) -> None:
    folder = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_model(folder, BertModel)


def test_broken_files_are_one_line(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"not a header")
    with pytest.raises(UserError, match="cannot be read as safetensors") as caught:
        load_model(folder, BertModel)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_model(folder, BertModel)


def test_an_unknown_name_without_network_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("runs/spam", "./bert"):  # no hub is asked for what can only be a path
        with pytest.raises(UserError, match=f"^{path}: no such model folder"):
            model_folder(path)
    with pytest.raises(UserError, match="not a local folder and not found on the Hub"):
        model_folder("somebody/no-such-bert")
    with pytest.raises(UserError, match="no such model folder"):
        model_folder("/no/such/folder")
