"""All measurements on one GPU, in calls of under nine minutes: `PYTHONPATH=.:kernels python benchmarks/gpu.py`.

One call takes what fits of all parts; two, with `--parts 0,1,2,4` and `--parts 3,5,6`, take nearly everything into one
file. Where there is no git, `MINIBERT_COMMIT` says which commit is measured.

| part | what |
|---|---|
| 0 | each kernel beside the plain torch that defines it: error, then time; the machine's ceilings |
| 1 | steps of BERT base and large, 32 texts of 25 tokens, with each engine; the best one's kernels |
| 2 | steps of 32 k tokens at several text lengths: real tokens a second, share of the matmul rate |
| 3 | the same work in transformers: its Trainer as it comes, and its best |
| 4 | each technique switched off in turn |
| 5 | whole runs, from CSV to model folder |
| 6 | whether engines, kernels and precisions learn alike; with `--packed`, on real weights and messages |

The weights are random and the words are made: a GPU's speed does not depend on them. A row that fails is recorded with
its error, one that kills the process or hangs likewise, and the others go on in a new process; what no longer fits in
`--budget` is skipped. The file is rewritten after every row. `--pack FOLDER` writes what part 6 needs, to be carried to
a machine that has neither. `--smoke` runs everything at tiny sizes, also without a GPU. A row's line is printed when it
is there; last line: JSON.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import faulthandler
import gc
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import environment, useful_flop
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from trainers import SHARED, transformers_optimizer

from minibert.batching import plan_epoch
from minibert.checkpoint import load_model, save_model
from minibert.config import BertConfig, RunConfig
from minibert.dataset import Dataset
from minibert.device import choose, fit_attention, keep_freed_memory
from minibert.errors import UserError
from minibert.model import BertForSequenceClassification
from minibert.ops import flash_attention
from minibert.problem import SINGLE, Problem
from minibert.run import demo_weights
from minibert.tokens import Tokenizer, Tokens, offsets_of
from minibert.train import Training
from minibert.vocabulary import CompactVocabulary
from minibert_kernels import adamw, attention, embedding, gelu, layer_norm
from minibert_kernels.backend import use_triton

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"0": 5, "1": 9, "2": 3, "3": 7, "4": 6, "5": 10, "6": 2}  # of the time; what a part leaves goes to the next
ENGINES, ATTENTIONS, PRECISIONS = ("eager", "graph", "compile"), ("sdpa", "flash", "triton"), ("fp32", "tf32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead")  # the second replays CUDA graphs
# Compiling takes longer than the measurement, so an engine that needs this much is used where it is the subject only.
LONG_WARM_UP = 20.0
MOST_PROCESSES, STACKS = 15, "stacks.txt"
DEADLY = ("killed its process", "the device did not recover")  # in the record of a row after which a process ended
MOST_DEADLY = 3  # of a part, before its other rows are given up
# cuDNN's attention with a mask gives NaN gradients at some lengths, so transformers is kept from it.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

VOCABULARY, WHOLE_WORDS, FIRST_WORD = 30_522, 12_000, 5  # ids: 5 special tokens, whole words, endings of longer words
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
SIZES = {"base": (768, 12), "large": (1024, 24)}  # hidden size, layers
SMOKE_SIZES = {"base": (64, 1), "large": (64, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(SHARES), help="which, separated by commas (default all)")
    parser.add_argument("--budget", type=float, default=500, help="seconds; what does not fit is skipped")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--output", type=Path, help="default results/gpu-h200.json, with --smoke gpu-smoke.json")
    parser.add_argument("--pack", type=Path, help="write MiniLM in half precision and SMS spam to this folder, and end")
    parser.add_argument("--packed", type=Path, help="such a folder, for part 6")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a measuring process: where models lie
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)  # and when it must be done
    arguments = parser.parse_args()
    name = "gpu-smoke.json" if arguments.smoke else "gpu-h200.json"
    arguments.output = arguments.output or ROOT / "benchmarks" / "results" / name
    if unknown := set(arguments.parts.split(",")) - set(SHARES):
        parser.error(f"--parts: there is no part {', '.join(sorted(unknown))}; give some of {','.join(SHARES)}")
    if arguments.pack:
        pack(arguments.pack)
    elif arguments.folder:
        measure_parts(arguments)
    else:
        supervise(arguments)


def pack(folder: Path) -> None:
    """48 MB: the demo extra's weights in half precision, its tokenizer, and the messages."""
    from safetensors.torch import load_file, save_file

    source, target = Path(demo_weights()), folder / "minilm"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(source / name, target / name)
    tensors = load_file(source / "model.safetensors")
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(SHARED / "sms_spam" / "spamdata_v2.csv", folder / "sms_spam.csv")


# --- Running: a process that measures, one that starts it again, and the file between them


def supervise(arguments: argparse.Namespace) -> None:
    """Have the parts measured in a process of their own; one that dies is followed by one for the remaining rows."""
    started = time.time()
    header = {**environment(), **gpu(), "smoke": arguments.smoke, "budget_seconds": arguments.budget, "parts": {}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.output.exists() and not arguments.smoke:  # of parts measured in another call
        before = json.loads(arguments.output.read_text())["parts"]
        header["parts"] = {part: rows for part, rows in before.items() if part not in arguments.parts.split(",")}
    write(arguments.output, header)
    ends = started + arguments.budget
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--folder", folder, "--ends", str(ends)]
        for _ in range(MOST_PROCESSES):
            try:
                if subprocess.run(command, timeout=ends + 20 - time.time()).returncode == 0 or time.time() > ends - 20:
                    break
            except subprocess.TimeoutExpired:
                break
            print("the measuring process died; another one goes on with the next row\n" + where(folder), flush=True)
    result = json.loads(arguments.output.read_text())
    result["seconds"] = round(time.time() - started, 1)
    write(arguments.output, result)
    print(json.dumps(summary(result)))


def where(folder: str) -> str:
    """Where a process was that took too long: the top of the main thread's stack, which comes last."""
    path = Path(folder) / STACKS
    return "\n".join(path.read_text().split("Thread 0x")[-1].splitlines()[1:9]) if path.exists() else ""


def gpu() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    except (OSError, IndexError, ValueError):
        name = driver = "none"
    return {"gpu": name, "driver": driver, "cuda": str(torch.version.cuda), "triton": version("triton")}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The last line: the figures that one looks for first, and what has none."""
    rows = {f"{part}: {name}": value for part, of_part in result["parts"].items() for name, value in of_part.items()}
    figures = ("steps_per_second", "share_of_matmul_rate", "minibert_is_faster_by", "wall_seconds", "tflops", "right")
    return {
        **{key: result[key] for key in ("gpu", "commit", "seconds")},
        "figures": {
            name: {key: value[key] for key in figures if key in value}
            for name, value in rows.items()
            if isinstance(value, dict) and any(key in value for key in figures)
        },
        "without_figures": {name: value[:80] for name, value in rows.items() if isinstance(value, str)},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """At once or not at all: a kill in the middle of writing would lose everything."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


class Run:
    """What the parts share: the rows recorded so far, the clock, sizes and the folder of models."""

    def __init__(
        self, output: Path, folder: Path, ends: float, smoke: bool = False, packed: Path | None = None
    ) -> None:
        self.output, self.folder, self.smoke, self.packed = output, folder, smoke, packed
        self.ends = self.part_ends = ends
        self.result: dict[str, Any] = json.loads(output.read_text())
        self.rows: dict[str, Any] = {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def start_part(self, part: str, share: float) -> None:
        """`share`: of the time that is left."""
        self.part = part
        self.part_ends = time.time() + share * (self.ends - time.time())
        self.rows = self.result["parts"].setdefault(part, {})

    @property
    def left(self) -> float:
        return self.part_ends - time.time()

    def row(self, name: str, seconds: float, call: Callable[[], Any], limit: float = 0) -> Any:
        """Record what `call` returns, or why it does not; skipped where less than `seconds` are left.

        A row without an end is one that killed an earlier process. One that takes longer than `limit` ends this one.
        """
        if name in self.rows:
            if self.rows[name] == "running":
                self.record(name, f"error: {DEADLY[0]}, or took too long")
            return self.rows[name]
        if sum(any(words in str(value) for words in DEADLY) for value in self.rows.values()) >= MOST_DEADLY:
            return self.record(name, "skipped: too many rows of this part ended their process")
        if self.left < seconds and not self.smoke:
            return self.record(name, f"skipped: {max(self.left, 0):.0f} s left, {seconds:.0f} s needed")
        self.record(name, "running", silent=True)
        limit = math.inf if self.smoke else limit or max(60, 4 * seconds)
        limit = min(limit, max(self.ends + 10 - time.time(), 1))
        try:
            with open(self.folder / STACKS, "w") as stacks:
                faulthandler.dump_traceback_later(limit, exit=True, file=stacks)
                value = call()
        except (UserError, ImportError) as error:
            value = f"not available: {error}"
        except Exception as error:
            value = f"error: {type(error).__name__}: {error}"[:1000]
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.record(name, value)
        self.tidy_up(name)
        return value

    def record(self, name: str, value: Any, silent: bool = False) -> Any:
        self.rows[name] = value
        write(self.output, self.result)
        if not silent:
            print(f"{self.part}  {name:<58} {brief(value)}", flush=True)
        return value

    def tidy_up(self, name: str) -> None:
        """Free the device's memory. After an error that the device cannot recover from, leave this process."""
        torch._dynamo.reset()  # or the variants of one function add up to its limit, and run uncompiled
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                self.record(name, f"{self.rows[name]} ({DEADLY[1]})")
                os._exit(3)
            if torch.cuda.current_stream() != torch.cuda.default_stream():  # a capture that broke off left it so
                os._exit(3)


def brief(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)[:160]
    return "  ".join(f"{k} {v}" for k, v in value.items() if isinstance(v, int | float | str))[:160]


def measure_parts(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    torch._dynamo.config.disable = arguments.smoke  # compiling takes longer than all the rest
    run = Run(arguments.output, arguments.folder, arguments.ends, arguments.smoke, arguments.packed)
    parts: dict[str, Callable[[Run], None]] = {
        "0": kernels_and_ceilings,
        "1": engines,
        "2": token_rich,
        "3": beside_transformers,
        "4": switched_off,
        "5": whole_runs,
        "6": learning,
    }
    chosen = arguments.parts.split(",")
    for i, part in enumerate(chosen):
        run.start_part(part, SHARES[part] / sum(SHARES[other] for other in chosen[i:]))
        if "part" in run.rows:  # an earlier process could not do it
            continue
        try:
            parts[part](run)
        except Exception as error:  # outside of any row: the other parts still have a chance
            run.record("part", f"error: {type(error).__name__}: {error}"[:1000])
            run.tidy_up("part")


# --- Models and texts: sizes of the real ones, values made up


def config_of(run: Run, size: str) -> BertConfig:
    if size == "minilm":
        return BertConfig.from_dict(json.loads((model_of(run, size) / "config.json").read_text()))
    hidden, layers = (SMOKE_SIZES if run.smoke else SIZES)[size]
    source = {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    return BertConfig.from_dict(source)


def model_of(run: Run, size: str) -> Path:
    """The folder of a model with random weights and a tokenizer of made words, written when first asked for."""
    if size == "minilm" and run.packed:
        return run.packed / size
    folder = run.folder / size
    if not (folder / "vocab.txt").exists():
        with run.device:
            model = BertForSequenceClassification(config_of(run, size), 2, 0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02)
        save_model(folder, model, ["0", "1"])
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
        (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    return folder


def whole_word(i: int) -> str:
    return SYLLABLES[i // 10_000] + SYLLABLES[i // 100 % 100] + SYLLABLES[i % 100]


def vocabulary() -> list[str]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(whole_word, range(WHOLE_WORDS))]
    tokens += [f"##{syllable}" for syllable in SYLLABLES]
    return tokens + [f"[unused{i}]" for i in range(VOCABULARY - len(tokens))]


@cache
def words() -> np.ndarray:
    """The made language's words, common ones first; every sixth is two tokens, as about so many of English are."""
    return np.array(
        [whole_word(i) + (SYLLABLES[i % 97] if i % 6 == 5 else "") for i in range(WHOLE_WORDS)], dtype=object
    )


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Numbers of words, rare ones rarely: their frequencies fall as in any language (Zipf)."""
    share = 1 / (np.arange(WHOLE_WORDS) + 3)
    return np.searchsorted(np.cumsum(share / share.sum()), rng.random(count)).clip(max=WHOLE_WORDS - 1)


@dataclass
class Work:
    """Encoded texts and how they are batched."""

    tokens: Tokens
    batch_size: int
    batch_tokens: int | None = None

    @classmethod
    def of(cls, lengths: np.ndarray, batch_size: int, batch_tokens: int | None = None) -> Work:
        offsets = offsets_of(lengths)
        ids = FIRST_WORD + draw(np.random.default_rng(0), int(offsets[-1])).astype(np.int32)
        ids[offsets[:-1]], ids[offsets[1:] - 1] = 2, 3  # [CLS], [SEP]
        return cls(Tokens(ids, offsets, None, np.zeros(len(lengths), np.int32)), batch_size, batch_tokens)

    @property
    def labels(self) -> np.ndarray:
        return np.random.default_rng(1).integers(0, 2, len(self.tokens))


def equal(run: Run, texts: int, length: int, batches: int = 8) -> Work:
    if run.smoke:
        texts, length, batches = min(texts, 4), max(length // 16, 4), 2
    return Work.of(np.full(texts * batches, length), texts)


def phrases(run: Run) -> Work:
    """32 phrases of SST-2's lengths a batch."""
    texts, batches = (4, 3) if run.smoke else (32, 16)
    words_a_text = phrase_words(np.random.default_rng(2), texts * batches)
    return Work.of(words_a_text * 7 // 6 + 2, texts)  # every sixth word is two tokens


def phrase_words(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.geometric(1 / 9.4, count).clip(1, 52)


def mixed(run: Run, batches: int = 6) -> Work:
    """Lengths from 8 to 512, most of them short, in batches of at most so many tokens."""
    budget = 256 if run.smoke else 1 << 15
    lengths = np.random.default_rng(3).lognormal(4.6, 0.9, batches * budget // 16).astype(np.int64).clip(8, 512)
    lengths = lengths // (8 if run.smoke else 1) + 2
    return Work.of(lengths[np.cumsum(lengths) < batches * budget], 1 << 20, budget)


# --- Clocks


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of `call` on the device, by CUDA events; by the clock on a CPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - before))
    return float(np.median(times))


@dataclass
class Trainer:
    """Something that trains: a call for each batch of a cycle. A window is one cycle."""

    step: Callable[[Any], Any]
    batches: list[Any]
    lengths: np.ndarray  # of all texts of a cycle
    warm_up_seconds: float = 0.0

    def window(self) -> float:
        """Seconds of a cycle."""
        synchronize()
        started = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        synchronize()
        return time.perf_counter() - started

    def warm_up(self, windows: int) -> None:
        self.warm_up_seconds = sum(self.window() for _ in range(windows))

    def figures(self, windows: list[float]) -> dict[str, Any]:
        step = float(np.median(windows)) / len(self.batches)
        return {
            "steps_per_second": round(1 / step, 2),
            "ms_a_step": round(1000 * step, 4),
            "spread": round(float(np.subtract(*np.percentile(windows, [90, 10])) / np.median(windows)), 4),
            "real_tokens_per_second": round(float(self.lengths.sum()) / len(self.batches) / step),
            "tokens_a_step": round(float(self.lengths.sum()) / len(self.batches), 1),
            "windows": len(windows),
            "warm_up_seconds": round(self.warm_up_seconds, 2),
        }


def side_by_side(run: Run, trainers: dict[str, Trainer], seconds: float = 2.0) -> dict[str, dict[str, Any]]:
    """Figures of each; windows in turns, so that a slow moment hits all. `seconds` for each, at least five turns."""
    for trainer in trainers.values():
        trainer.warm_up(1 if run.smoke else 3)
    windows: dict[str, list[float]] = {name: [] for name in trainers}
    ends = time.perf_counter() + (0 if run.smoke else seconds) * len(trainers)
    turns = 0
    while turns < (2 if run.smoke else 5) or (time.perf_counter() < ends and turns < 100):
        for name, trainer in trainers.items():
            windows[name].append(trainer.window())
        turns += 1
    return {name: trainers[name].figures(windows[name]) for name in trainers}


def with_shares(run: Run, figures: dict[str, Any], size: str, lengths: np.ndarray) -> dict[str, Any]:
    """Beside the figures, the rate of useful products: those of all layers, and those that [CLS] alone needs."""
    config = config_of(run, size)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    whole = 72 * layers * hidden**2 * lengths.sum() + 12 * layers * hidden * (lengths**2).sum()
    per_token = figures["real_tokens_per_second"] / lengths.sum() / 1e12
    rate, needed = whole * per_token, useful_flop(lengths, layers, hidden) * per_token
    return {
        **figures,
        "tflops": round(rate, 2),
        "share_of_matmul_rate": round(rate / matmul_ceiling(run.smoke), 4),
        "share_without_what_cls_only_saves": round(needed / matmul_ceiling(run.smoke), 4),
    }


# --- The trainers


def minibert(run: Run, size: str, work: Work, **flags: Any) -> Trainer:
    """minibert as `python -m minibert.finetune` sets it up, on weights of that size, with these flags."""
    options = {"batch_size": work.batch_size, "batch_tokens": work.batch_tokens, "epochs": 1000.0, "quiet": True}
    config = RunConfig(**(options | flags))
    model_config = config_of(run, size)
    head_size = model_config.hidden_size // model_config.num_attention_heads
    longest = int(work.tokens.lengths.max())
    hardware = fit_attention(choose(config), config, head_size, longest, longest)
    dropouts = {"dropout": config.dropout, "head_dropout": config.head_dropout}
    model, _ = load_model(model_of(run, size), BertForSequenceClassification, num_labels=2, **dropouts)
    model.cls_only = config.cls_only
    tokens = replace(work.tokens)
    if config.compact_vocabulary:  # a few batches hold fewer words than a data set, which would flatter us
        every = np.arange(FIRST_WORD + WHOLE_WORDS + len(SYLLABLES), dtype=np.int32)
        whole = Tokens(every, np.array([0, len(every)]), None, np.zeros(1, np.int32))
        CompactVocabulary(model, [tokens, whole])
    data = {"train": Dataset(tokens, work.labels)}
    training = Training(model, Problem(SINGLE, ["0", "1"]), data, config, hardware)
    return Trainer(training._step, training._steps_of_epoch(0), work.tokens.lengths)


def transformers_best(run: Run, size: str, work: Work, attention: str = "sdpa", mode: str = "") -> Trainer:
    """transformers at its best: autocast to bf16, batches of like length padded beforehand, fused AdamW.

    `mode`: of torch.compile, which is left out without one.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if attention == "flash_attention_2" and version("flash-attn") == "none":
        raise UserError("flash-attn is not installed")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_of(run, size), num_labels=2, attn_implementation=attention, dtype=torch.float32
    )
    model = model.to(run.device).train()
    optimizer = transformers_optimizer(model, fused=True)
    rows = plan_epoch(work.tokens.lengths, batch_size=work.batch_size, batch_tokens=work.batch_tokens, buckets=True)
    labels = work.labels
    batches = [padded(run, work.tokens, labels, batch) for batch in rows]
    forward = model
    if mode:
        varied = len({batch["input_ids"].shape for batch in batches}) > 1
        forward = torch.compile(model, dynamic=varied, mode=mode)

    def step(batch: dict[str, torch.Tensor]) -> None:
        batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}
        with sdpa_kernel(BACKENDS) if attention == "sdpa" else nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16):
                loss = forward(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(step, batches, work.tokens.lengths)


def padded(run: Run, tokens: Tokens, labels: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
    lengths = tokens.lengths[rows]
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.concatenate([tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows])
    arrays = {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": labels[rows]}
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: t.pin_memory() for name, t in batch.items()} if run.device.type == "cuda" else batch


def transformers_default(run: Run, size: str, work: Work) -> dict[str, Any]:
    """transformers' Trainer with its defaults, batches padded to their longest text, timed from within."""
    import transformers

    if version("accelerate") == "none":
        raise UserError("accelerate is not installed, and the Trainer needs it")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_of(run, size), num_labels=2)
    tokens, labels = work.tokens, work.labels
    rows = [
        {"input_ids": tokens.ids[start:end].tolist(), "attention_mask": [1] * int(end - start), "labels": int(label)}
        for (start, end), label in zip(pairwise(tokens.offsets), labels, strict=True)
    ]
    steps_a_window, windows = (2, 4) if run.smoke else (10, 12)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps_a_window == 0:
                synchronize()
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(BACKENDS):
        transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=work.batch_size,
                max_steps=steps_a_window * windows,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(
                transformers.AutoTokenizer.from_pretrained(model_of(run, size))
            ),
            callbacks=[Clock()],
        ).train()
    # What a cycle of a Trainer is here, so that its figures are computed as everyone's.
    mean = np.full(steps_a_window, tokens.lengths.mean() * work.batch_size)
    return Trainer(print, [None] * steps_a_window, mean).figures(np.diff(times[1:]).tolist())


# --- Part 0


def kernels_and_ceilings(run: Run) -> None:
    """Errors first: where one is wrong, no time means anything."""
    for name, make in kernels_of(run).items():
        run.row(f"kernel {name}, error", 4, lambda m=make: worst_errors(m()))  # type: ignore[misc]
    run.row("kernel adamw, error", 4, lambda: adamw_error(run))
    ceilings(run)
    for name, make in kernels_of(run).items():
        run.row(f"kernel {name}, time", 3, lambda m=make: times_of(m()))  # type: ignore[misc]
    run.row("kernel adamw, time", 4, lambda: adamw_time(run))


@dataclass
class Kernel:
    """One of ours, the plain torch that defines it, what is usual in its place, and the inputs."""

    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    usual: Callable[..., Tensor]
    tensors: dict[str, Tensor]


def kernels_of(run: Run) -> dict[str, Callable[[], Kernel]]:
    """At BERT base's sizes: for a small batch and for one that fills the device."""
    found: dict[str, Callable[[], Kernel]] = {}
    for rows in (36,) if run.smoke else (800, 1 << 15):
        for make in (norm_kernel, gelu_kernel, embedding_kernel):
            found[f"{make.__name__.removesuffix('_kernel')}, {rows} tokens"] = partial(make, run, rows)
    for texts, length in ((4, 9),) if run.smoke else ((32, 25), (256, 128), (64, 512)):
        found[f"attention, {texts} x {length} tokens"] = partial(attention_kernel, run, texts, length)
    return found


def made(run: Run, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, device=run.device).bfloat16() for name, shape in shapes.items()}


def with_dropout(run: Run) -> dict[str, Any]:
    return {"p": 0.1, "rng": torch.tensor([42, 7], device=run.device), "site": 3}


def norm_kernel(run: Run, rows: int) -> Kernel:
    hidden, options = config_of(run, "base").hidden_size, {"eps": 1e-12, **with_dropout(run)}
    return Kernel(
        partial(layer_norm.dropout_add_layer_norm, **options),
        partial(layer_norm.dropout_add_layer_norm_reference, **options),
        lambda x, residual, weight, bias: F.layer_norm(F.dropout(x, 0.1) + residual, weight.shape, weight, bias, 1e-12),
        made(run, x=(rows, hidden), residual=(rows, hidden), weight=(hidden,), bias=(hidden,)),
    )


def gelu_kernel(run: Run, rows: int) -> Kernel:
    inner = 4 * config_of(run, "base").hidden_size
    tensors = made(run, x=(rows, inner), bias=(inner,))
    return Kernel(gelu.bias_gelu, gelu.bias_gelu_reference, lambda x, bias: F.gelu(x + bias), tensors)


def embedding_kernel(run: Run, rows: int) -> Kernel:
    hidden, options = config_of(run, "base").hidden_size, {"eps": 1e-12, **with_dropout(run)}
    ids = torch.from_numpy(draw(np.random.default_rng(0), rows)).to(run.device)
    places = torch.arange(rows, device=run.device) % 25
    options |= {"input_ids": ids, "position_ids": places, "token_type_ids": None}

    def usual(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = F.embedding(ids, word) + F.embedding(places, position) + token_type[0]
        return F.dropout(F.layer_norm(total, weight.shape, weight, bias, 1e-12), 0.1)

    tables = made(run, word=(WHOLE_WORDS, hidden), position=(512, hidden), token_type=(2, hidden))
    return Kernel(
        partial(embedding.embedding_layer_norm, **options),
        partial(embedding.embedding_layer_norm_reference, **options),
        usual,
        tables | made(run, weight=(hidden,), bias=(hidden,)),
    )


def attention_kernel(run: Run, texts: int, length: int) -> Kernel:
    bounds = length * torch.arange(texts + 1, dtype=torch.int32, device=run.device)
    options = {"cu_seqlens": bounds, "max_seqlen": length, **with_dropout(run)}
    reference = partial(attention.varlen_attention_reference, **options)

    def flash(qkv: Tensor) -> Tensor:
        return flash_attention(*qkv.unbind(1), bounds, bounds, length, length, 0.1)

    return Kernel(
        partial(attention.varlen_attention, **options),
        reference,
        flash if run.device.type == "cuda" else reference,
        made(run, qkv=(texts * length, 3, config_of(run, "base").num_attention_heads, 64)),
    )


def outputs_of(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def worst_errors(kernel: Kernel) -> dict[str, Any]:
    """The largest errors beside fp64, in units of what is allowed: twice plain torch's in bf16, and one rounding."""
    if torch.cuda.is_available() and not use_triton(next(iter(kernel.tensors.values()))):
        raise UserError("Triton is missing")
    torch.use_deterministic_algorithms(True, warn_only=True)  # what nobody wrote is NaN then
    try:
        ours = outputs_of(kernel.ours, kernel.tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    plain = outputs_of(kernel.reference, kernel.tensors)
    exact = outputs_of(kernel.reference, {name: tensor.double() for name, tensor in kernel.tensors.items()})
    errors = {}
    for name, value in exact.items():
        error, usual = (float((other[name].double() - value).abs().max()) for other in (ours, plain))
        errors[name] = error / (2 * usual + torch.finfo(torch.bfloat16).eps * float(value.abs().max()))
    # A NaN is not below anything.
    return {"right": all(error <= 1 for error in errors.values())} | {k: round(v, 3) for k, v in errors.items()}


def times_of(kernel: Kernel) -> dict[str, float]:
    return {
        "microseconds": pass_time(kernel.ours, kernel.tensors),
        "microseconds_of_torch": pass_time(kernel.usual, kernel.tensors),
    }


def pass_time(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> float:
    """Microseconds of a forward and a backward pass on the device, several in a row in one graph."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    upstream = torch.randn_like(function(**leaves))
    repeats = 16 if upstream.is_cuda else 1

    def passes() -> None:
        for _ in range(repeats):
            torch.autograd.grad(function(**leaves), list(leaves.values()), upstream)

    return round(1000 * milliseconds(as_graph(passes)) / repeats, 2)


def flat_buffers(run: Run, count: int) -> tuple[list[Tensor], Any, Tensor]:
    """Parameters, both moments, bf16 gradients and shadow of one parameter; the layout; the learning rate."""
    layout = adamw.FlatLayout.of([torch.Size([count])], [0], [(1.0, 0.01)], run.device)
    buffers = [layout.buffer(), layout.buffer(), layout.buffer(), *(layout.buffer(torch.bfloat16) for _ in range(2))]
    for buffer in buffers[:4]:
        buffer[:count] = torch.randn(count, device=run.device).abs()
    return buffers, layout, torch.tensor(1e-3, device=run.device)


def adamw_error(run: Run) -> dict[str, Any]:
    """Of the change of the parameters, beside plain torch."""
    buffers, layout, lr = flat_buffers(run, 1_000_003)
    changes = []
    for prepare, update in (
        (adamw.prepare_update_, adamw.adamw_),
        (adamw.prepare_update_reference_, adamw.adamw_reference_),
    ):
        own = [buffer.clone() for buffer in buffers]
        update(*own, layout, lr, prepare(own[3], torch.full((), 3.0, device=run.device), max_norm=1.0))
        changes.append(own[0].double() - buffers[0].double())
    error = float((changes[0] - changes[1]).abs().max() / changes[1].abs().max())
    return {"right": error < 1e-3, "param": error}


def adamw_time(run: Run) -> dict[str, float]:
    """Clipping, update, shadow and cleared gradients of all parameters of BERT base, beside torch's fused AdamW."""
    count = 1 << 16 if run.smoke else 109_482_240
    buffers, layout, lr = flat_buffers(run, count)
    step = torch.zeros((), device=run.device)

    def ours() -> None:
        control = adamw.prepare_update_(buffers[3], step, max_norm=1.0)
        adamw.adamw_(*buffers, layout, lr, control, zero_grad=True)

    parameter = torch.nn.Parameter(buffers[0].clone())
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=run.device.type == "cuda")

    def usual() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()

    took = milliseconds(as_graph(ours))
    return {
        "microseconds": round(1000 * took, 1),
        "microseconds_of_torch": round(1000 * milliseconds(as_graph(usual)), 1),
        "gigabytes_per_second": round(32 * count / took / 1e6, 1),  # 3 fp32 both ways, bf16: gradient thrice, shadow
    }


def ceilings(run: Run) -> None:
    run.row("matmul bf16, large and square", 5, lambda: {"tflops": round(matmul_ceiling(run.smoke), 1)})
    for size, tokens in product(SIZES, (800, 3200, 12_800)):
        run.row(f"matmul bf16, {size}, {tokens} tokens", 2, lambda s=size, t=tokens: layer_products(run, s, t))  # type: ignore[misc]
    run.row("copy on the device", 3, lambda: {"gigabytes_per_second_both_ways": round(copy_rate(run), 1)})
    run.row("launch of a small kernel", 2, lambda: {"microseconds": round(launch_time(), 2)})


@cache
def matmul_ceiling(smoke: bool) -> float:
    """TFLOP/s of the largest product that anyone would ask for."""
    size = 128 if smoke else 8192
    return product_rate(size, size, size, sets=3)


def layer_products(run: Run, size: str, tokens: int) -> dict[str, float]:
    """TFLOP/s of the four products of a layer, and of a layer as a whole."""
    hidden = config_of(run, size).hidden_size
    tokens = 16 if run.smoke else tokens
    shapes = {"qkv": (3, 1), "attention output": (1, 1), "intermediate": (4, 1), "output": (1, 4)}
    rates = {name: product_rate(tokens, k * hidden, n * hidden) for name, (n, k) in shapes.items()}
    weights = {name: n * k for name, (n, k) in shapes.items()}
    whole = sum(weights.values()) / sum(weights[name] / rates[name] for name in shapes)
    return {"tflops": round(whole, 2)} | {name: round(rate, 2) for name, rate in rates.items()}


@torch.no_grad()
def product_rate(rows: int, inner: int, columns: int, sets: int = 16) -> float:
    """TFLOP/s of [rows, inner] x [inner, columns], on random numbers and several operands, for caches to be honest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    pairs = [(torch.randn(rows, inner, **options), torch.randn(columns, inner, **options)) for _ in range(sets)]

    def all_products() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    call = as_graph(all_products)
    return 2 * rows * inner * columns * sets / milliseconds(call) / 1e9


def as_graph(call: Callable[[], None]) -> Callable[[], None]:
    """Its kernels without the host's time to launch them."""
    if not torch.cuda.is_available():
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_rate(run: Run) -> float:
    """GB/s, counting what is read and what is written."""
    source = torch.empty(1 << 16 if run.smoke else 1 << 31, dtype=torch.bfloat16, device=run.device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def launch_time(launches: int = 500) -> float:
    """Microseconds of host time for each launch of a kernel that does nearly nothing."""
    x = torch.randn(32, device="cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(100):
        x.add_(1)
    synchronize()
    started = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    host = time.perf_counter() - started
    synchronize()
    return 1e6 * host / launches


# --- Part 1


def engines(run: Run) -> None:
    run.row("what the flags left at auto choose", 1, lambda: str(choose(RunConfig())))
    # Compiling comes last: it takes the longest and may find no time.
    for engine, size in product(ENGINES, SIZES):
        seconds = {"eager": 8, "graph": 12, "compile": 50 if size == "base" else 70}[engine]
        run.row(
            f"{size}, 32 x 25 tokens, {engine}",
            seconds,
            lambda s=size, e=engine: engine_figures(run, s, e),  # type: ignore[misc]
            limit=180,
        )
        if engine == ENGINES[1]:
            run.row(f"{size}, kernels of the best engine", 10, lambda s=size: kernels(run, s))  # type: ignore[misc]


def engine_figures(run: Run, size: str, engine: str) -> dict[str, Any]:
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work = equal(run, 32, 25, batches=16)
    trainer = minibert(run, size, work, engine=engine)
    figures = side_by_side(run, {"": trainer}, seconds=3.0)[""]
    figures["loss"] = round(float(trainer.step(trainer.batches[0])[0]), 4)
    if run.device.type == "cuda":
        figures["peak_gigabytes"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return with_shares(run, figures, size, work.tokens.lengths)


def best_engine(run: Run, size: str) -> str:
    """The fastest of part 1 that is soon warm; `auto` where nothing was measured."""
    rows = {engine: run.result["parts"].get("1", {}).get(f"{size}, 32 x 25 tokens, {engine}") for engine in ENGINES}
    speeds = {
        engine: row["steps_per_second"]
        for engine, row in rows.items()
        if isinstance(row, dict) and row["warm_up_seconds"] < LONG_WARM_UP
    }
    return max(speeds, key=speeds.__getitem__, default="auto")


def kernels(run: Run, size: str) -> dict[str, Any]:
    """Where the device's time goes, by kernel."""
    trainer = minibert(run, size, equal(run, 32, 25, batches=16), engine=best_engine(run, size))
    trainer.warm_up(1 if run.smoke else 3)
    wall = float(np.median([trainer.window() for _ in range(5)])) / len(trainer.batches)
    on_gpu = run.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        trainer.window()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [  # ranges that someone named lie over the kernels and would count twice
        event
        for event in recorded.key_averages()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    steps = len(trainer.batches)
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 / steps for e in events}
    counts = {e.key: e.count / steps for e in events}
    total = sum(times.values())
    return {
        "engine": best_engine(run, size),
        "ms_a_step": round(1000 * wall, 4),
        "ms_in_kernels": round(total, 4),
        "kernels_a_step": round(sum(counts.values()), 1),
        "top": [
            {
                "kernel": name[:160],
                "ms_a_step": round(times[name], 4),
                "calls_a_step": round(counts[name], 2),
                "share": round(times[name] / total, 4),
            }
            for name in sorted(times, key=times.__getitem__, reverse=True)[:15]
        ],
    }


# --- Part 2


def token_rich(run: Run) -> None:
    works: dict[str, Callable[[], Work]] = {
        str(length): lambda length=length: equal(run, (1 << 15) // length, length, batches=4)  # type: ignore[misc]
        for length in (25, 128, 512, 64, 384)
    }
    if run.smoke:
        works.clear()
    works["8 to 512 mixed"] = lambda: mixed(run)
    for size, (name, work) in product(SIZES, works.items()):
        run.row(f"{size}, 32 k tokens, lengths {name}", 8, lambda s=size, w=work: rich_figures(run, s, w()))  # type: ignore[misc]


def rich_figures(run: Run, size: str, work: Work) -> dict[str, Any]:
    engine = best_engine(run, size)
    figures = side_by_side(run, {"": minibert(run, size, work, engine=engine)})[""]
    return {"engine": engine} | with_shares(run, figures, size, work.tokens.lengths)


# --- Part 3


def beside_transformers(run: Run) -> None:
    works: dict[str, Callable[[], Work]] = {
        "32 x 25 tokens": lambda: equal(run, 32, 25, batches=16),
        "32 phrases": lambda: phrases(run),
        "256 x 128 tokens": lambda: equal(run, 256, 128, batches=4),
    }
    for size, name in (("base", "32 x 25 tokens"), ("base", "32 phrases"), ("large", "32 x 25 tokens")):
        run.row(f"{size}, {name}, Trainer", 10, lambda s=size, n=name: transformers_default(run, s, works[n]()))  # type: ignore[misc]

    def side_by_side_with(size: str, name: str, mode: str = "") -> None:
        title, call = f"{size}, {name}, side by side", lambda: contest(run, size, works[name](), mode)
        if mode:  # compiling takes a minute
            run.row(f"{title}, compiled, {mode}", 60, call, limit=180)
        else:
            run.row(title, 15, call)

    side_by_side_with("base", "32 x 25 tokens")
    side_by_side_with("base", "32 x 25 tokens", "reduce-overhead")  # the fairest: it replays CUDA graphs, too
    for size, name in product(SIZES, works):
        side_by_side_with(size, name)
    for (size, name), mode in product((("base", "32 x 25 tokens"), ("large", "256 x 128 tokens")), COMPILE_MODES):
        side_by_side_with(size, name, mode)


def contest(run: Run, size: str, work: Work, mode: str = "") -> dict[str, Any]:
    """minibert and every kind of transformers that there is, in turns; with a `mode` of torch.compile, that one."""
    kinds: dict[str, Callable[[], Trainer]] = {
        "minibert": lambda: minibert(run, size, work, engine=best_engine(run, size))
    }
    if mode:
        kinds[f"transformers, sdpa, {mode}"] = lambda: transformers_best(run, size, work, mode=mode)
    else:
        kinds["transformers, sdpa"] = lambda: transformers_best(run, size, work)
        kinds["transformers, flash"] = lambda: transformers_best(run, size, work, "flash_attention_2")
    trainers: dict[str, Trainer] = {}
    failed: dict[str, str] = {}
    for name, make in kinds.items():
        try:
            trainers[name] = make()
            trainers[name].window()
        except Exception as error:
            trainers.pop(name, None)
            kind = "not available" if isinstance(error, UserError) else f"error: {type(error).__name__}"
            failed[name] = f"{kind}: {error}"[:500]
    figures = side_by_side(run, trainers)
    times = {name: of_trainer["ms_a_step"] for name, of_trainer in figures.items()}
    ratios = {}
    if "minibert" in times and len(times) > 1:
        best = min(of_trainer for name, of_trainer in times.items() if name != "minibert")
        ratios = {"minibert_is_faster_by": round(best / times["minibert"], 3)}
    return ratios | times | failed | {"engine": best_engine(run, size), "figures": figures}


# --- Part 4


def switched_off(run: Run) -> None:
    engine = best_engine(run, "base")
    works = {
        "32 x 25 tokens": equal(run, 32, 25, batches=16),
        "32 phrases": phrases(run),
    }
    if not run.smoke:
        works["256 x 128 tokens"] = equal(run, 256, 128, batches=4)
    for work_name, work in works.items():
        reference = cache(lambda w=work: minibert(run, "base", w, engine=engine))  # made in the first row's guard
        for name, flags in variants().items():
            if ("length_buckets" in flags) == (work_name == "32 phrases"):
                run.row(
                    f"base, {work_name}, {name}",
                    40 if flags.get("engine") == "compile" else 4,
                    lambda w=work, f=flags, r=reference: beside_reference(run, r(), w, {"engine": engine} | f),  # type: ignore[misc]
                )
    compiled_kernels(run)


def compiled_kernels(run: Run) -> None:
    """What torch.compile makes of what our kernels do: one that is no faster than this has no place."""
    for name, make in kernels_of(run).items():
        if "attention" not in name:
            run.row(f"kernel {name}, torch.compile's", 12, lambda m=make: compiled_time(m()))  # type: ignore[misc]


def compiled_time(kernel: Kernel) -> dict[str, float]:
    return {
        "microseconds": pass_time(kernel.ours, kernel.tensors),
        "microseconds_compiled": pass_time(torch.compile(kernel.usual, dynamic=False), kernel.tensors),
    }


def variants() -> dict[str, dict[str, Any]]:
    """Name of a variant -> flags. A flag for kernels is found by its name, for there may be none."""
    found: dict[str, dict[str, Any]] = {"unchanged": {}, "length_buckets on": {"length_buckets": True}}
    for name in ("compact_vocabulary", "cls_only"):
        found[f"{name} off"] = {name: False}
    for field in dataclasses.fields(RunConfig):
        if "kernel" in field.name or "fused" in field.name:
            values = field.metadata["choices"] or ((True, False) if isinstance(field.default, bool) else ())
            found |= {f"{field.name} {value}": {field.name: value} for value in values}
    for name, values in (("attention", ATTENTIONS), ("precision", PRECISIONS), ("engine", ENGINES)):
        found |= {f"{name} {value}": {name: value} for value in values}
    return found | {"dropout 0": {"dropout": 0.0, "head_dropout": 0.0}}


def beside_reference(run: Run, reference: Trainer, work: Work, flags: dict[str, Any]) -> dict[str, Any]:
    figures = side_by_side(run, {"changed": minibert(run, "base", work, **flags), "as is": reference}, seconds=1.0)
    changed, as_is = figures["changed"]["ms_a_step"], figures["as is"]["ms_a_step"]
    return {"times_as_long": round(changed / as_is, 4), "ms_a_step": changed, "ms_a_step_as_is": as_is}


# --- Part 5


def whole_runs(run: Run) -> None:
    few = run.smoke
    plans = [
        ("67 k phrases, base, 3 epochs", "base", "phrases", 67_349, 3, 32, 0.4),
        ("67 k phrases, large, 3 epochs, batches of 1024", "large", "phrases", 67_349, 3, 1024, 0.5),
        ("1.3 M questions, base, 1 epoch, batches of 256", "base", "questions", 1_306_122, 1, 256, 1.0),
    ]
    for name, size, kind, rows, epochs, batch, share in plans[-1:] if few else plans:
        seconds = max(share * run.left, 20)
        until = time.time() + seconds
        flags = ["--epochs", str(epochs), "--batch-size", str(min(batch, 16) if few else batch)]
        flags += ["--engine", best_engine(run, size)]
        run.row(
            name,
            20,
            lambda s=size, k=kind, r=rows, f=flags, t=until: whole_run(run, s, k, 64 if few else r, f, t),  # type: ignore[misc]
            limit=seconds + 60,
        )


def whole_run(run: Run, size: str, kind: str, rows: int, flags: list[str], until: float) -> dict[str, Any]:
    """The command in a process of its own; stopped at the time `until`, with what it had reached by then."""
    validation = min(872, rows)
    data = [write_texts(run.folder / f"{kind}-{n}.csv", kind, n) for n in (rows, validation)]
    flags = ["--train", str(data[0]), "--validation", str(data[1]), *flags, "--no-token-cache"]
    return {"rows": rows} | finetune(run, [*flags, "--model", str(model_of(run, size))], until)


def finetune(run: Run, flags: list[str], until: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "minibert.finetune", *flags, "--output", str(output)]
        started, seconds = time.perf_counter(), max(until - time.time(), 10)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=seconds,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            log = output / "train_log.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            return {"stopped_after_seconds": round(seconds, 1), "last_line": json.loads(lines[-1]) if lines else None}
        wall = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-800:]}")
        metrics = json.loads((output / "metrics.json").read_text())
        return {"wall_seconds": round(wall, 2), **metrics["speed"], "test": metrics.get("test", {})}


def write_texts(path: Path, kind: str, rows: int, at_once: int = 100_000) -> Path:
    """A CSV of made texts: phrases of SST-2's lengths, or questions of 17 tokens on average."""
    rng = np.random.default_rng(rows)
    if kind == "phrases":
        counts = phrase_words(rng, rows)
    else:
        counts = np.rint(rng.lognormal(2.43, 0.5, rows)).astype(np.int64).clip(3, 60)
    with open(path, "w", encoding="utf-8") as file:
        file.write("sentence,label\n" if kind == "phrases" else "question_text,target\n")
        for start in range(0, rows, at_once):
            ends = offsets_of(counts[start : start + at_once])
            text = words()[draw(rng, int(ends[-1]))].tolist()
            file.writelines(
                f"{' '.join(text[a:b])},{label}\n"
                for (a, b), label in zip(pairwise(ends.tolist()), rng.integers(0, 2, len(ends) - 1), strict=True)
            )
    return path


# --- Part 6


def learning(run: Run) -> None:
    """Losses of the first steps without dropout, beside the eager engine's in fp32 (of real weights: on the CPU)."""
    run.row("MiniLM on SMS spam", 20, lambda: sms_spam(run), limit=120)
    size = "minilm" if run.packed else "base"
    work = messages(run, run.packed) if run.packed else equal(run, 32, 25, batches=16)
    plain = {"engine": "eager", "attention": "sdpa", "precision": "fp32", "device": "cpu" if run.packed else "auto"}
    reference = cache(lambda: losses(run, size, work, plain))
    fastest = {"engine": best_engine(run, "base")}
    ways = [{"engine": engine} for engine in ENGINES if engine != "compile"]
    ways += [fastest | {"attention": attention} for attention in ATTENTIONS]
    ways += [fastest | {"precision": precision} for precision in PRECISIONS]
    ways += [fastest | {name: False} for name in ("kernels", "cls_only", "compact_vocabulary")]
    for way in ways:
        name = f"{size}, losses, " + ", ".join(f"{key} {value}" for key, value in way.items())
        run.row(name, 5, lambda w=way: compared(losses(run, size, work, w), reference()))  # type: ignore[misc]


def messages(run: Run, packed: Path) -> Work:
    """The first messages of SMS spam."""
    with open(packed / "sms_spam.csv", encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][: 8 if run.smoke else 512]
    return Work(Tokenizer.from_folder(packed / "minilm").encode(texts, None, 512), 32)


def losses(run: Run, size: str, work: Work, flags: dict[str, Any], rounds: int = 2) -> list[float]:
    trainer = minibert(run, size, work, dropout=0.0, head_dropout=0.0, warmup_ratio=0.0, **flags)
    return [float(trainer.step(batch)[0]) for _ in range(rounds) for batch in trainer.batches]


def compared(ours: list[float], reference: list[float]) -> dict[str, Any]:
    return {
        "largest_difference": round(max(abs(a - b) for a, b in zip(ours, reference, strict=True)), 6),
        "first": [round(ours[0], 5), round(reference[0], 5)],
        "last": [round(ours[-1], 5), round(reference[-1], 5)],
    }


def sms_spam(run: Run) -> dict[str, Any]:
    if run.packed is None:
        raise UserError("give --packed, a folder that --pack has written")
    sms, minilm = run.packed / "sms_spam.csv", str(run.packed / "minilm")
    with open(sms, encoding="utf-8", newline="") as file:
        rows = len(list(csv.DictReader(file)))
    flags = ["--train", str(sms), "--model", minilm, "--test-split", "0.15", "--epochs", "1", "--lr", "1e-4"]
    flags += ["--max-train-samples", "64"] if run.smoke else []
    return {"rows": rows} | finetune(run, flags, time.time() + min(run.left, 110))


if __name__ == "__main__":
    main()
