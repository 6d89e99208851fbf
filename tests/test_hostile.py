"""Files from strangers: every kind damaged at random, and each hole that was found by hand or by fuzzing."""

from __future__ import annotations

import ast
import gzip
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minibert.cli import parse_run_config
from minibert.data import sources
from minibert.data.tables import read_table, stream_table
from minibert.errors import UserError
from minibert.inference.classifier import load
from minibert.model.checkpoint import read_weights
from minibert.problem.problem import SINGLE, Problem, class_weights

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

CASES = 100 if os.environ.get("CI") else 25


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    """No exception but UserError, no hang, no write or program outside; hypothesis shrinks what it finds."""
    fuzz.prepare(kind, tmp_path)
    _, valid, damage, _ = fuzz.KINDS[kind]
    source = valid()
    fuzz.try_one(kind, tmp_path, source)

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=True))
    def damaged(rng: random.Random) -> None:
        fuzz.try_one(kind, tmp_path, damage(rng, source))

    damaged()


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that raises, hangs, writes elsewhere or runs a program fails its case."""

    def fails(reader: Callable[[Path], Any], match: str) -> None:
        monkeypatch.setitem(fuzz.KINDS, "toml", ("run.toml", lambda: b"", fuzz.damaged, reader))
        (tmp_path / "in").mkdir(exist_ok=True)
        with pytest.raises(BaseException, match=match):
            fuzz.try_one("toml", tmp_path / "in", b"")

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    fails(lambda folder: 1 // 0, "by zero")
    fails(lambda folder: [None for _ in iter(int, 1)], "more than 1 s of CPU time")
    fails(lambda folder: (folder.parent / "out").write_text("x"), "open for writing")
    fails(lambda folder: (folder / ".." / "out").write_text("x"), "open for writing")
    fails(lambda folder: (folder.parent / "out").unlink(), "os.remove")
    fails(lambda folder: os.system("true"), "os.system")
    fails(lambda folder: (folder / "more").write_text("x"), "files appeared")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    fuzz.write_model(folder)
    return folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        load(folder, "cpu").predict(["a b"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 1 << 23}, "at most 512"),
        ({"classifier_dropout": "much"}, "classifier_dropout"),
        ({"classifier_dropout": 7}, "classifier_dropout"),
        ({"id2label": None, "num_labels": 1 << 40}, "num_labels"),
        ({"id2label": None, "num_labels": "two"}, "num_labels"),
        ({"id2label": {"0": "a", "1": "a"}}, "same name"),
        ({"minibert": {"temperature": "hot"}}, "temperature"),
        ({"minibert": {"thresholds": [1, 2, 3]}}, "thresholds"),
    ],
)
def test_absurd_configurations(model: Path, changes: dict[str, Any], match: str) -> None:
    (model / "config.json").write_text(json.dumps(fuzz.CONFIG | changes))
    refused(model, match)


@pytest.mark.parametrize(
    ("stage", "part", "match"),
    [
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            "Split",
        ),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa" * 99}, "Replace"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}]}, "Prepend"),
        ("model", {"max_input_chars_per_word": 10**9}, "max_input_chars_per_word"),
    ],
)
def test_tokenizers_that_never_end_or_explode(model: Path, stage: str, part: dict[str, Any], match: str) -> None:
    source = json.loads(fuzz.tokenizer())
    source[stage] = source[stage] | part if stage == "model" else part
    (model / "tokenizer.json").write_text(json.dumps(source))
    refused(model, match)


def test_a_model_that_gives_no_numbers(model: Path) -> None:
    """Weights that are finite, each of them; argmax would have answered with the first label."""
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(model, "gives NaN or infinity")


def test_a_vocabulary_without_unknown_token(model: Path) -> None:
    source = json.loads(fuzz.tokenizer())
    del source["model"]["vocab"]["[UNK]"]
    source["added_tokens"] = [token for token in source["added_tokens"] if token["content"] != "[UNK]"]
    (model / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="cannot encode these texts"):
        load(model, "cpu").predict(["zzz"])


def test_token_ids_beyond_the_model(model: Path) -> None:
    source = json.loads(fuzz.tokenizer())
    source["model"]["vocab"]["good"] = 4_000_000_000
    (model / "tokenizer.json").write_text(json.dumps(source))
    refused(model, "the tokenizer has 4000000001 tokens, the model 12")


def test_tokens_may_hold_any_line_separator_but_the_newline(model: Path) -> None:
    (model / "vocab.txt").write_text("\n".join([*fuzz.WORDS[:-1], "x\u2028y"]) + "\n", encoding="utf-8")
    assert load(model, "cpu").tokenizer.backend.token_to_id("x\u2028y") == len(fuzz.WORDS) - 1


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_header_that_claims_terabytes(model: Path, size: int) -> None:
    (model / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
    refused(model, "cannot be read as safetensors")
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(model, "cannot be read as safetensors")


@pytest.mark.parametrize(
    "name", ["../part.safetensors", "/etc/passwd", "..", "", "a/../part.safetensors", "a\0b", "\ud800"]
)
def test_an_index_that_leaves_its_folder(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model.parent / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"classifier.bias": name}}))
    with pytest.raises(UserError, match="must lie in the folder"):
        read_weights(model)


def test_shards_behind_links(model: Path, tmp_path: Path) -> None:
    """A link out of the folder is refused; the hub's cache, where every file is a link, is read."""
    index = fuzz.index()
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "part.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError, match="a link out of the folder"):
        read_weights(model)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "elsewhere.safetensors").rename(blobs / "123")
    (snapshot / "part.safetensors").symlink_to(blobs / "123")
    (snapshot / "model.safetensors.index.json").write_bytes(index)
    assert "classifier.bias" in read_weights(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_pipes_and_devices_are_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, "regular file|no such|lacks|no tokenizer|no model")
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    refused(model, "regular file|no such|lacks|no tokenizer|no model")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "rows.csv.gz", "rows.zip", "rows.txt"])
def test_data_from_a_pipe_that_never_delivers(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        read_table(tmp_path / name)


def test_settings_from_a_pipe_that_never_delivers(tmp_path: Path, checkpointed: Path) -> None:
    os.mkfifo(tmp_path / "run.toml")
    with pytest.raises(UserError, match="not a regular file"):
        parse_run_config(["--config", str(tmp_path / "run.toml")])
    with pytest.raises(UserError, match="not a regular file"):
        class_weights(Problem(SINGLE, ["a", "b"]), str(tmp_path / "run.toml"), np.zeros(2))
    (checkpointed / "state.safetensors").unlink()
    os.mkfifo(checkpointed / "state.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        fuzz.read_checkpoint(checkpointed)


def zeros(path: Path, size: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(size >> 20):
            file.write(b"a,b\n" * (1 << 18))


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "EXPANSION_FREE", 8 << 20)
    zeros(tmp_path / "bomb.csv.gz", 64 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", b"a,b\n" * (16 << 20))
    for name in ("bomb.csv.gz", "bomb.zip"):
        with pytest.raises(UserError, match="grows more than 200-fold"):
            read_table(tmp_path / name)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 10 GB takes no disk; its one line is refused after MAX_LINE_LENGTH characters."""
    monkeypatch.setattr(sources, "_detected", lambda path: "latin-1")  # that reads it all, in constant memory
    for name in ("a.csv", "a.jsonl", "a.txt"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(10 << 30)
        with fuzz.cpu_limit(60), fuzz.memory_limit(2 << 30), pytest.raises(UserError, match=r"NUL|longer than"):
            read_table(tmp_path / name)


def test_a_stray_quote_before_many_lines_takes_no_time(tmp_path: Path) -> None:
    """What tells quoting from the first characters looks at each of them once."""
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"begins\t0\n' + "\n" * (1 << 18))
    with fuzz.cpu_limit(20), pytest.raises(UserError, match="line 2: a quote is not closed"):
        read_table(path)


def test_tables_too_wide_to_hold(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(map(str, range(300_000))) + "\n")
    rows = [json.dumps({f"{i}-{j}": 1 for j in range(10)}) for i in range(10_000)]
    (tmp_path / "wide.jsonl").write_text("\n".join(rows))
    (tmp_path / "ragged.csv").write_text("a,b\n" * 5000 + "a" + ",b" * 300_000 + "\n")
    for name, header in (("wide.csv", True), ("wide.jsonl", True), ("ragged.csv", False)):
        with fuzz.cpu_limit(20), pytest.raises(UserError, match=r"reads at most 4096|300001 cells where most"):
            read_table(tmp_path / name, header=header)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", "text,label\n")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        list(stream_table(tmp_path / "a.zip"))


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 50_000,
        "epochs = 1" + "0" * 400,
        "batch_size = 1" + "0" * 400,
        "seed = 1" + "0" * 400,
        'train = "a\\u0000b"',
        "a = 1\n" * 200_000,
    ],
    ids=["deep", "epochs", "batch", "seed", "nul", "large"],
)
def test_absurd_config_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with fuzz.cpu_limit(10), pytest.raises(UserError):
        parse_run_config(["--config", str(tmp_path / "run.toml")])


def test_half_characters_do_not_stop_a_run(tmp_path: Path, model: Path) -> None:
    r"""JSON may hold "\ud800", which no UTF-8 file can: the whole run would end in its last write."""
    from minibert.run import run_from_files

    rows = [{"text": f"good \ud800 {i}", "label": ["a\ud800", "b"][i % 2]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"train": str(tmp_path / "rows.jsonl"), "model": str(model), "output": str(tmp_path / "run")}
    run_from_files({**flags, "epochs": 1, "quiet": True, "device": "cpu"}, [])
    assert load(tmp_path / "run", "cpu").problem.labels == ["a?", "b"]


@pytest.fixture
def checkpointed() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "state.safetensors").write_bytes(fuzz.checkpoint())
        yield Path(folder)


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        return load_file(folder / "state.safetensors"), file.metadata()


def test_a_checkpoint_beyond_the_end_of_its_run(checkpointed: Path) -> None:
    """To find the epoch of step 10**18, its epochs would be counted one by one."""
    tensors, metadata = contents(checkpointed)
    state = json.loads(metadata["state"]) | {"step": 10**18}
    save_file(tensors, checkpointed / "state.safetensors", metadata | {"state": json.dumps(state)})
    with fuzz.cpu_limit(10), pytest.raises(UserError, match=r"step 1000000000000000000 of 2"):
        fuzz.read_checkpoint(checkpointed)


@pytest.mark.parametrize("count", [float("nan"), float("inf")])
def test_a_checkpoint_whose_counts_are_no_numbers(checkpointed: Path, count: float) -> None:
    tensors, metadata = contents(checkpointed)
    tensors["skipped"].fill_(count)
    save_file(tensors, checkpointed / "state.safetensors", metadata)
    with pytest.raises(UserError, match="skipped is missing or does not fit"):
        fuzz.read_checkpoint(checkpointed)


def test_a_checkpoint_whose_tensors_would_be_stretched(checkpointed: Path) -> None:
    """`copy_` broadcasts: one number would have become a whole matrix."""
    tensors, metadata = contents(checkpointed)
    tensors["model.pooler.dense.weight"] = tensors["model.pooler.dense.weight"][:1]
    save_file(tensors, checkpointed / "state.safetensors", metadata)
    with pytest.raises(UserError, match=r"model\.pooler\.dense\.weight is missing or does not fit"):
        fuzz.read_checkpoint(checkpointed)


def test_nothing_is_unpickled() -> None:
    """No module that can run code from a file is ever imported or called."""
    for path in (Path(__file__).parents[1] / "minibert").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "np.load", "numpy.load", "eval", "exec"}, path
