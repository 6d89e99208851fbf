"""Real weights, real data and tiny random checkpoints for the tests."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run in two processes, and start more
if not re.search(r"-m\W*gpu", " ".join(sys.argv)) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all other tests compute on the CPU, also where a GPU is

if "MINIBERT_TESTS_HOME" not in os.environ:  # else made by the process that started this one
    os.environ["MINIBERT_TESTS_HOME"] = tempfile.mkdtemp(prefix="minibert-tests-")
    os.environ["MINIBERT_TESTS_OWNER"] = str(os.getpid())
os.environ["HOME"] = os.environ["MINIBERT_TESTS_HOME"]  # neither the tests nor what they start write anyone's caches
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["HOME"], ".cache")
os.environ["HF_HOME"] = os.path.join(os.environ["XDG_CACHE_HOME"], "huggingface")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is first imported: kernels run on the CPU, as in no user's run
    )

import transformers

from minibert.errors import UserError
from minibert.runs.setup import demo_weights
from minibert_kernels import backend

torch.manual_seed(0)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tests benchmarks/ is left out of a plain `pytest` and of `-m "not slow"`."""
    for item in items:
        if item.path.parent.name == "benchmarks":
            item.add_marker("benchmarks")
        if item.get_closest_marker("benchmarks"):
            item.add_marker("slow")


def pytest_unconfigure() -> None:
    if os.environ.get("MINIBERT_TESTS_OWNER") == str(os.getpid()):
        shutil.rmtree(os.environ["MINIBERT_TESTS_HOME"], ignore_errors=True)


def missing(what: str) -> None:
    """Skip with a reason, except under CI, where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


def needed(package: str) -> Any:
    """A package that is not in the test extra."""
    if find_spec(package.partition(".")[0]) is None:
        missing(f"the package {package}")
    return import_module(package)


def skip_without_interpreter() -> None:
    """Triton 3.6, which torch 2.11 for CUDA brings, takes one-element arrays for numbers, and numpy 2.4 does not."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("Triton's interpreter is used from 3.7 on")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        missing("the folder of shared data beside the project")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Real pretrained weights: all-MiniLM-L6-v2."""
    try:
        return Path(demo_weights())
    except UserError:
        missing("the demo extra")
        raise


def tiny_config(**changes: object) -> transformers.BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    limits = {"vocab_size": 211, "max_position_embeddings": 64}
    return transformers.BertConfig(**{**sizes, **limits, **changes})


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights large enough, biases included, that a mistake anywhere shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny random checkpoint of a transformers class, with a tokenizer, and give its folder."""

    def make(kind: str = "BertModel", **changes: object) -> Path:
        return save_tiny(tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}", kind, **changes)

    return make


def made(kind: str, **changes: object) -> transformers.PreTrainedModel:
    """A tiny model of transformers' own random weights, the same whichever tests ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(tiny_config(**changes))


def save_tiny(folder: Path, kind: str = "BertModel", **changes: object) -> Path:
    lively(made(kind, **changes)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words += "the a of and good bad film very not is was spam free call now see you at money win prize".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 short reviews that a tiny model learns to tell apart in a second."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "films.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(160):
            words = rng.sample("the a of and film very is was see you at now".split(), 5)
            writer.writerow([" ".join([*words, "bad" if i % 2 else "good", str(i)]), "bad" if i % 2 else "good"])
    return path


@pytest.fixture(scope="session")
def film_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of random weights, with the words of the reviews in its vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    made("BertModel").save_pretrained(folder)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the a of and film very is was see you at now good bad".split()
    words += [prefix + digit for prefix in ("", "##") for digit in "0123456789"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def references_of_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' references stand in for them: Triton's interpreter takes a second where a GPU takes microseconds.

    Not in a test that is marked `interpreter`.
    """
    if "interpreter" in request.keywords:
        skip_without_interpreter()
    else:
        monkeypatch.setattr(backend, "INTERPRET", False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: in Triton's interpreter on the CPU, or on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    if request.param == "cpu":
        skip_without_interpreter()
        assert backend.INTERPRET
    if request.param == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("too large for the interpreter")
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == "bf16" and device == "cpu":
        pytest.skip("the interpreter's bf16 is not the GPU's")
    if request.param == "fp16" and device == "cpu" and not is_first_case(request):
        pytest.skip("one shape of each kernel is enough in fp16 for the interpreter")
    return DTYPES[request.param]


def is_first_case(request: pytest.FixtureRequest) -> bool:
    """Whether the test's own parameters are the first of their lists."""
    indices = request.node.callspec.indices
    return not any(index for name, index in indices.items() if name not in ("device", "dtype"))


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with NaN, so that an element no kernel wrote shows."""

    def poison(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 40 rows with two labels."""
    path = tmp_path / "rows.csv"
    words = "good bad film very not free call now".split()
    lines = [f"{' '.join(words[: 1 + i % 8])} {i},{'ab'[i % 2]}" for i in range(40)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def arguments(tiny: Callable[..., Path], rows: Path) -> Callable[..., list[str]]:
    """Arguments of finetune for a run of ten steps on `rows` with a tiny model."""
    model = tiny()

    def make(output: Path, *flags: str) -> list[str]:
        fixed = ["--train", str(rows), "--model", str(model), "--output", str(output), "--quiet", "--device", "cpu"]
        return [*fixed, "--epochs", "2", "--batch-size", "8", "--save-steps", "2", *flags]

    return make
