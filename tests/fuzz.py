"""Hostile input, made by the thousand: whatever a stranger's file holds, a reader returns or raises `UserError`.

    python tests/fuzz.py --cases 10000            every kind of file
    python tests/fuzz.py --cases 10000 --kind csv
    python tests/fuzz.py --kind csv --engine atheris --cases 100000   guided by coverage (pip install atheris)

A case is a valid file with random damage: bytes changed, pieces doubled or cut, JSON values replaced by absurd ones.
It fails on any other exception, on more than 10 seconds of CPU time, on more than 3 GB, on a write outside its folder,
and on anything that smells of running code. The damaged file of a failure is kept and named.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minibert.errors import UserError

SECONDS, MEMORY = 10, 3 << 30
FORBIDDEN = "os.system os.exec os.posix_spawn subprocess.Popen pickle.find_class socket.connect".split()
FORBIDDEN += "os.remove os.rename os.mkdir os.rmdir os.link os.symlink os.chmod os.truncate".split()
NUMBERS = [0, -1, 1, 2, 3, 255, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 63, 1 << 64, 10**30, 0.5, -0.0, 1e308, 1e-320]
ABSURD: list[Any] = [*NUMBERS, None, True, False, "", "a", "\0", "\ud800", "../../etc/passwd", "/dev/zero", "x" * 5000]
ABSURD += [[], {}, [[]], {"a": {}}, [1, "a", None], float("nan"), float("inf"), {"type": "Sequence"}, ["a"] * 300]
PIECES = [b'"', b",", b"\n", b"\r", b"\t", b"\0", b"{", b"[", b"]", b"}", b"\xff\xfe", b"\xef\xbb\xbf", b"\\", b"'"]
PIECES += [b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"1e999", b"\\ud800", b"a," * 5000, b"\xf0\x9f\x98", b"#"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##a", "##b", "good", "bad"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "classifier_dropout": None,
    "problem_type": "single_label_classification",
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "minibert": {"mlp_size": 0, "max_length": 16, "truncation": "head", "thresholds": [0.5, 0.5], "temperature": 1.0},
}


def absurd(rng: random.Random, value: Any) -> Any:
    """A parsed JSON value with one to three of its parts replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        pending = [value]
        while pending:
            node = pending.pop()
            children = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
            places += [(node, key) for key, _ in children]
            pending += [child for _, child in children if isinstance(child, dict | list)]
        if not places:
            return rng.choice(ABSURD)
        node, key = rng.choice(places)
        action = rng.random()
        if action < 0.7:
            node[key] = copy.deepcopy(rng.choice(ABSURD))
        elif action < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(["", "type", "a", "\ud800"])] = node.pop(key)
        else:
            node.append(copy.deepcopy(node[key]))
    return value


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(result))
        action = rng.randrange(6)
        if action == 0 and at < len(result):
            result[at] = rng.randrange(256)
        elif action == 1 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            result[at:at] = rng.choice(PIECES)
        elif action == 3:
            del result[at : at + rng.choice([1, 2, 8, 64, 1 << 20])]
        elif action == 4:
            stop = rng.randint(at, min(len(result), at + 64))
            result[at:at] = result[at:stop] * rng.choice([1, 2, 50])
        else:
            result[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1]))
    return bytes(result)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """Mostly well-formed, so that the damage is met behind the parser."""
    if rng.random() < 0.25:
        return damaged(rng, data)
    return as_json(absurd(rng, json.loads(data)))


def damaged_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines, some of them absurd."""
    if rng.random() < 0.4:
        return damaged(rng, data)
    return b"\n".join(as_json(absurd(rng, json.loads(line))) for line in data.splitlines())


def damaged_tensors(rng: random.Random, data: bytes) -> bytes:
    """The safetensors header is JSON behind its length."""
    if rng.random() < 0.3:
        return damaged(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header and rng.random() < 0.5:
        name = rng.choice(list(header["__metadata__"]))
        text = header["__metadata__"][name]
        new_text = as_json(absurd(rng, json.loads(text))).decode() if text.startswith("{") else rng.choice(["", "np"])
        header["__metadata__"][name] = new_text
    else:
        header = absurd(rng, header)
    new = as_json(header)
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


# Valid files


@cache
def weights() -> bytes:
    from safetensors.torch import save
    from torch import randn

    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (12, 8),
        "embeddings.position_embeddings.weight": (16, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "pooler.dense.weight": (8, 8),
    }
    norms = ["embeddings.LayerNorm", "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"]
    shapes |= {f"{norm}.weight": (8,) for norm in norms} | {f"{norm}.bias": (8,) for norm in norms}
    linear = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]
    linear += [f"encoder.layer.0.{name}.dense" for name in ("attention.output", "intermediate", "output")]
    shapes |= {f"{name}.weight": (8, 8) for name in linear} | {
        f"{name}.bias": (8,) for name in [*linear, "pooler.dense"]
    }
    tensors = {f"bert.{name}": randn(shape) for name, shape in shapes.items()}
    return save({**tensors, "classifier.weight": randn(2, 8), "classifier.bias": randn(2)}, {"format": "pt"})


@cache
def tokenizer() -> bytes:
    from minibert.batching.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(WORDS) + "\n")
        return Tokenizer.from_folder(Path(folder)).backend.to_str().encode()


def table(kind: str) -> bytes:
    import pyarrow
    from pyarrow import parquet

    texts = ["good film", 'a "b", c', "two\nlines", "é 漢 🙂", "x" * 300, "bad"] * 3
    rows = [{"text": text, "label": "ab"[i % 2], "n": i / 2} for i, text in enumerate(texts)]
    if kind == "jsonl":
        return b"\n".join(map(as_json, rows))
    if kind == "json":
        return as_json(rows)
    if kind == "parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    lines = ["text,label", *('"{}",{}'.format(row["text"].replace('"', '""'), row["label"]) for row in rows)]
    return "\n".join(lines).encode()


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", data)
    return sink.getvalue()


TOML = b"""epochs = 5
lr = 1e-4
label-column = "target"
text_column = ["a", "b"]
length_buckets = true
seed = 7
"""


# Readers


def read_model(folder: Path) -> None:
    """All that predict does with a stranger's folder."""
    from minibert.inference.classifier import load

    classifier = load(folder, "cpu")
    classifier.predict(["good film", "bad " * 50, "漢 é"])


def read_data(folder: Path) -> None:
    """All that finetune does with a file before it trains, and the table of predictions."""
    from minibert.config import RunConfig
    from minibert.data.loading import load_data
    from minibert.inference.predictions import Predicted, prediction_columns, write_csv
    from minibert.inference.stream import stream_examples

    path = next(path for path in folder.iterdir() if path.name.startswith("rows."))
    for header in (True, False):
        config = RunConfig(train=str(path), no_header=not header)
        for examples in stream_examples(str(path), config):
            str(examples.texts[:3]).encode(errors="replace")
    data = load_data(RunConfig(train=str(path)))
    examples = data.splits["train"]
    targets = data.problem.targets(examples.labels or [])
    logits = np.zeros((len(examples), len(data.problem.labels)), np.float32)
    data.problem.metrics(logits, targets)
    table = io.StringIO(newline="")
    columns = prediction_columns(Predicted(examples, logits), data.problem, targets)
    write_csv(table, columns, spreadsheet_safe=True)
    table.getvalue().encode("utf-8", "backslashreplace")


def read_toml(folder: Path) -> None:
    from minibert.cli import parse_run_config

    parse_run_config(["--config", str(folder / "run.toml")])


@cache
def training() -> Any:
    from minibert.batching.dataset import Dataset
    from minibert.batching.tokens import Tokens, offsets_of
    from minibert.config import RunConfig
    from minibert.model.bert import BertForSequenceClassification
    from minibert.model.checkpoint import load_model
    from minibert.problem.problem import SINGLE, Problem
    from minibert.runtime.device import choose
    from minibert.training.loop import Training

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        model, _ = load_model(folder, BertForSequenceClassification)
    lengths = np.full(8, 4)
    tokens = Tokens(np.full(32, 5, np.int32), offsets_of(lengths), None, np.zeros(8, np.int32))
    data = {"train": Dataset(tokens, np.arange(8) % 2)}
    config = RunConfig(device="cpu", batch_size=4, epochs=1, quiet=True)
    job = Training(model, Problem(SINGLE, ["a", "b"]), data, config, choose(config))
    with tempfile.TemporaryDirectory() as folder:
        job.run(Path(folder) / "train_log.jsonl", lambda: None)
    return job


@cache
def checkpoint() -> bytes:
    from minibert.training.resume import STATE_FILE, save_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), training(), {"version": "1", "seed": 42})
        return Path(folder, STATE_FILE).read_bytes()


def read_checkpoint(folder: Path) -> None:
    from minibert.training.resume import host_tensors, load_checkpoint

    job = training()
    load_checkpoint(folder, job, {"version": "1", "seed": 42})
    next(job.remaining_steps(), None)
    int(job.optimizer.skipped)
    host_tensors(job)


def write_model(folder: Path) -> None:
    (folder / "config.json").write_bytes(as_json(CONFIG))
    (folder / "model.safetensors").write_bytes(weights())
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def index() -> bytes:
    names = json.loads(weights()[8 : 8 + int.from_bytes(weights()[:8], "little")])
    return as_json({"weight_map": {name: "part.safetensors" for name in names if name != "__metadata__"}})


Kind = tuple[str, Callable[[], bytes], Callable[[random.Random, bytes], bytes], Callable[[Path], None]]
KINDS: dict[str, Kind] = {  # the file's name, a valid one, how to damage it, and who reads it
    "config": ("config.json", lambda: as_json(CONFIG), damaged_json, read_model),
    "tokenizer": ("tokenizer.json", tokenizer, damaged_json, read_model),
    "vocab": ("vocab.txt", lambda: "\n".join(WORDS).encode(), damaged, read_model),
    "safetensors": ("model.safetensors", weights, damaged_tensors, read_model),
    "index": ("model.safetensors.index.json", index, damaged_json, read_model),
    "csv": ("rows.csv", lambda: table("csv"), damaged, read_data),
    "jsonl": ("rows.jsonl", lambda: table("jsonl"), damaged_lines, read_data),
    "json": ("rows.json", lambda: table("json"), damaged_json, read_data),
    "parquet": ("rows.parquet", lambda: table("parquet"), damaged, read_data),
    "zip": ("rows.zip", lambda: zipped(table("csv")), damaged, read_data),
    "gz": ("rows.csv.gz", lambda: gzip.compress(table("csv"), mtime=0), damaged, read_data),
    "toml": ("run.toml", lambda: TOML, damaged, read_toml),
    "checkpoint": ("state.safetensors", checkpoint, damaged_tensors, read_checkpoint),
}


# Watching


class Watch:
    """Notes what a reader must not do: write outside its folder, move or delete, start a program, unpickle, connect."""

    def __init__(self) -> None:
        self.folder = ""
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:300])
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and not os.path.abspath(os.fsdecode(arguments[0])).startswith(self.folder + os.sep):
                self.seen.append(f"open for writing {arguments[0]!r}")


@cache
def watch() -> Watch:
    return Watch()  # an audit hook stays for good, so there is one


class TooSlow(BaseException):
    """A case takes too much work."""


@contextmanager
def cpu_limit(seconds: int) -> Iterator[None]:
    """Of this process's own work, however busy the machine is."""

    def stop(_number: int, _frame: object) -> None:
        raise TooSlow(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Address space beyond what the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def prepare(kind: str, folder: Path) -> None:
    """What surrounds the damaged file: a whole model, if the file is a model's."""
    _, _, _, reader = KINDS[kind]
    if reader is read_model:
        write_model(folder)
    if kind == "index":
        (folder / "model.safetensors").rename(folder / "part.safetensors")
    training()  # and all modules: nothing is to be loaded under watch


def try_one(kind: str, folder: Path, data: bytes) -> None:
    """Read one damaged file; returns if that ends as it should."""
    name, _, _, reader = KINDS[kind]
    (folder / name).write_bytes(data)
    before = sorted(folder.iterdir())
    watch().folder, watch().seen = str(folder), []
    try:
        with cpu_limit(SECONDS):
            reader(folder)
    except UserError as error:
        assert str(error)
    finally:
        watch().folder = ""
    assert not watch().seen, watch().seen
    assert sorted(folder.iterdir()) == before, "files appeared"


def short(text: str) -> str:
    return "\n".join(line[:200] for line in text.splitlines())


def fuzz(kind: str, cases: int, seed: int) -> int:
    """Random cases of one kind; returns the number that failed."""
    _, valid, damage, _ = KINDS[kind]
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(kind, folder)
        source = valid()
        try_one(kind, folder, source)
        with memory_limit(MEMORY):
            for number in range(cases):
                data = damage(random.Random(f"{kind}-{seed}-{number}"), source)
                try:
                    try_one(kind, folder, data)
                except (Exception, TooSlow):
                    failures += 1
                    kept = Path(tempfile.gettempdir(), f"fuzz-{kind}-{seed}-{number}")
                    kept.write_bytes(data)
                    print(f"{kind} case {number}: {kept}\n{short(traceback.format_exc(limit=-3))}", flush=True)
                    if failures >= 20:
                        break
    return failures


def isolated(kind: str, cases: int, seed: int) -> int:
    """`fuzz` in a process of its own: a crash of a library is a failure too."""
    child = os.fork()
    if child == 0:
        os._exit(min(fuzz(kind, cases, seed), 100))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"{kind:<12} {cases} cases: {'ok' if code == 0 else f'failed ({code})'}", flush=True)
    return int(code != 0)


def guided(kind: str, cases: int) -> None:
    """libFuzzer through atheris: it keeps the cases that reach new lines, and damages those further."""
    import atheris

    with atheris.instrument_imports(include=["minibert"]):
        pass
    _, valid, damage, _ = KINDS[kind]
    folder = Path(tempfile.mkdtemp())
    corpus = Path(tempfile.mkdtemp())
    prepare(kind, folder)
    (corpus / "valid").write_bytes(valid())

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        try:
            return damage(random.Random(seed), data)[:max_size]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            # no longer of the kind that it damages
            return damaged(random.Random(seed), data)[:max_size]

    options = [f"-runs={cases}", f"-timeout={SECONDS}", "-rss_limit_mb=4096", "-max_len=200000", str(corpus)]
    atheris.Setup([sys.argv[0], *options], lambda data: try_one(kind, folder, data), custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged files against minibert's readers.")
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    arguments = parser.parse_args()
    kinds = arguments.kind or list(KINDS)
    if arguments.engine == "atheris":
        guided(kinds[0], arguments.cases)
        return 0
    return int(sum(isolated(kind, arguments.cases, arguments.seed) for kind in kinds) > 0)


if __name__ == "__main__":
    sys.exit(main())
