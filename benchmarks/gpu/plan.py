"""The rows, the most valuable first: what decides the defaults, then what explains it, then what completes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import ceilings, kernels, minibert_steps, profiling, transformers_steps, whole_runs
from .workloads import (
    MANY_SENTENCES,
    MIXED,
    SENTENCES,
    SENTENCES_SORTED,
    TEXTS_128,
    TEXTS_128_LARGE_BATCH,
    TEXTS_512,
    Setting,
)

WORKLOADS = {
    "32 sentences": SENTENCES,
    "32 sentences of like length": SENTENCES_SORTED,
    "32 x 128 tokens": TEXTS_128,
    "128 x 128 tokens": TEXTS_128_LARGE_BATCH,
    "32 x 512 tokens": TEXTS_512,
    "1024 sentences": MANY_SENTENCES,
    "16 k tokens, mixed lengths": MIXED,
}
SHORTEST_LIMIT = 120.0  # seconds: the first row of a kernel compiles it
RATES = "the machine's rates"


@dataclass(frozen=True)
class Row:
    """One measurement, in a process of its own."""

    name: str
    measure: Callable[[Setting], dict[str, Any]] = field(repr=False)
    seconds: int  # expected, the start of the process included
    needs: str = ""  # a package that is not among minibert's own

    @property
    def limit(self) -> float:
        """Seconds after which it is taken for hanging."""
        return max(SHORTEST_LIMIT, 3.0 * self.seconds)


def ours(size: str, work: str, seconds: int = 16, name: str = "", **flags: Any) -> Row:
    """minibert's steps; the flags are the command's."""
    title = name or ", ".join(str(value) for value in flags.values())
    return Row(
        f"{size}, {work}: minibert {title}",
        partial(minibert_steps.train, size=size, workload=WORKLOADS[work], **flags),
        seconds,
    )


def peer(size: str, work: str, seconds: int = 20, mode: str = "", attention: str = "sdpa", needs: str = "") -> Row:
    """transformers' steps; batches padded to multiples of 32 tokens where every length is captured."""
    multiple = 32 if mode == "reduce-overhead" else 8
    train = partial(transformers_steps.train, attention=attention, mode=mode, multiple=multiple)
    return Row(
        f"{size}, {work}: transformers {attention}{mode and f', compiled, {mode}'}",
        partial(train, size=size, workload=WORKLOADS[work]),
        seconds,
        needs or "transformers",
    )


def profiled(size: str, work: str, engine: str) -> Row:
    call = partial(profiling.kernels_of_step, size=size, workload=WORKLOADS[work], engine=engine)
    return Row(f"{size}, {work}: kernels of minibert {engine}", call, 16)


def whole_run(model: str, seconds: int, **flags: Any) -> Row:
    title = ", ".join(f"{name} {value}" for name, value in flags.items())
    return Row(f"whole run, {model}, {title}", partial(whole_runs.finetune, model=model, **flags), seconds)


def rows() -> list[Row]:
    found = [*deciding(), *explaining(), *switched(), *completing()]
    assert len({row.name for row in found}) == len(found)
    return found


def deciding() -> list[Row]:
    """Which engine `auto` should take, and whether minibert is faster than transformers at its best."""
    return [
        ours("base", "32 sentences", engine="eager"),
        ours("base", "32 sentences", 40, engine="graph"),
        peer("base", "32 sentences"),
        peer("base", "32 sentences of like length"),
        ours("base", "32 sentences of like length", engine="eager"),
        ours("base", "32 x 128 tokens", engine="eager"),
        ours("base", "32 x 128 tokens", 25, engine="graph"),
        peer("base", "32 x 128 tokens"),
        whole_run("minilm", 30, engine="eager", epochs=3),
        whole_run("minilm", 40, engine="graph", epochs=3),
        Row(
            "whole run, minilm, transformers at its best, epochs 3",
            partial(whole_runs.finetune_transformers, model="minilm", epochs=3),
            40,
            "transformers",
        ),
        Row(RATES, ceilings.rates, 14),
        peer("base", "32 sentences", 90, mode="reduce-overhead"),
        peer("base", "32 x 128 tokens", 50, mode="reduce-overhead"),
        ours("base", "32 sentences", 40, engine="compile"),
    ]


def explaining() -> list[Row]:
    """Where the time goes, and whether each kernel pays."""
    return [
        profiled("base", "32 sentences", "eager"),
        profiled("base", "32 sentences", "graph"),
        Row("kernel adamw", kernels.adamw_times, 12),
        *(Row(f"kernel {name}", partial(kernels.times, name=name), 25) for name in ("norm", "gelu", "attention")),
        Row("kernel embedding", partial(kernels.times, name="embedding"), 25),
        ours("large", "32 sentences", 20, engine="eager"),
        ours("large", "32 sentences", 25, engine="graph"),
        peer("large", "32 sentences", 22),
        ours("large", "128 x 128 tokens", 22, engine="eager"),
        ours("large", "128 x 128 tokens", 25, engine="graph"),
        peer("large", "128 x 128 tokens", 25),
    ]


def switched() -> list[Row]:
    """Each technique off in turn, beside the same with it."""
    work = "32 sentences"
    return [
        ours("base", work, name="graph without our kernels", engine="graph", kernels=False),
        ours("base", work, name="graph, sdpa", engine="graph", attention="sdpa"),
        ours("base", work, name="graph, flash", engine="graph", attention="flash"),
        ours("base", work, name="eager, sdpa", engine="eager", attention="sdpa"),
        ours("base", work, name="eager, triton attention", engine="eager", attention="triton"),
        ours("base", work, name="eager without cls_only", engine="eager", cls_only=False),
        ours("base", work, name="eager without compact_vocabulary", engine="eager", compact_vocabulary=False),
        ours("base", work, name="eager, fp16", engine="eager", precision="fp16"),
        ours("base", work, name="eager, tf32", engine="eager", precision="tf32"),
        ours("base", work, name="eager, dropout 0", engine="eager", dropout=0.0, head_dropout=0.0),
    ]


def completing() -> list[Row]:
    """Further shapes, whole runs of random weights, and the ways of transformers that are expected to be slower."""
    return [
        whole_run("base", 35, engine="eager", epochs=3),
        ours("base", "16 k tokens, mixed lengths", 20, engine="eager"),
        peer("base", "16 k tokens, mixed lengths", 22),
        ours("base", "32 x 512 tokens", 20, engine="eager"),
        peer("base", "32 x 512 tokens", 22),
        ours("large", "1024 sentences", 30, engine="eager"),
        *(Row(f"products of a layer, base, {n} tokens", layer_products("base", n), 12) for n in (800, 4096)),
        Row("products of a layer, large, 16384 tokens", layer_products("large", 16_384), 12),
        peer("base", "32 sentences", 60, mode="default"),
        peer("base", "32 sentences", attention="flash_attention_2", needs="flash_attn"),
        trainer("base", "32 sentences"),
        ours("base", "32 sentences", name="eager, once more", engine="eager"),  # how far the machine has drifted
    ]


def layer_products(size: str, tokens: int) -> Callable[[Setting], dict[str, Any]]:
    return partial(ceilings.layer_products, size=size, tokens=tokens)


def trainer(size: str, work: str) -> Row:
    call = partial(transformers_steps.train_with_trainer, size=size, workload=WORKLOADS[work])
    return Row(f"{size}, {work}: transformers Trainer", call, 30, "accelerate")
