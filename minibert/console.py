"""What a run says on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minibert import __version__
from minibert.checkpoint import LoadReport
from minibert.config import RunConfig
from minibert.device import Hardware

Say = Callable[[str], None]


def silence(line: str) -> None:
    """Say nothing, as --quiet asks."""


def describe(say: Say, config: RunConfig, report: LoadReport, hardware: Hardware, frozen: int) -> None:
    """The head of a run: what computes, and which model; `inspection` says the rest."""
    say(f"minibert {__version__} · {hardware}")
    say(f"model   {config.model}")
    say(f"        {report}")
    if frozen >= 0:
        say(f"frozen  embeddings and {frozen} layers")


def summarise(say: Say, output: Path, metrics: dict[str, Any], mlp_size: int) -> None:
    """The end of a run: metrics, a row for each class, speed, and what to do next."""
    say("")
    for part in ("validation", "test"):
        if part in metrics:
            numbers = [f"{k} {v:.4f}" for k, v in metrics[part].items() if isinstance(v, float)]
            say(f"{part:<11}" + " · ".join(numbers[:5]))
    if "at_threshold_0.5" in metrics.get("validation", {}):
        say("           thresholds: the best F1 of each label on validation, kept in config.json for predict")
    part = "test" if "test" in metrics else "validation"
    per_class = metrics.get(part, {}).get("per_class", {})
    if per_class:
        width = max(len(name) for name in per_class) + 2
        say(f"\n{part + ' rows':<{width}} precision  recall      f1  support")
        for name, row in list(per_class.items())[:30]:
            say(f"{name:<{width}} {row['precision']:>9.4f} {row['recall']:>7.4f} {row['f1']:>7.4f} {row['support']:>8}")
    timing = metrics["speed"]
    say(
        f"\ntrained in {timing['train_seconds']:.1f} s, {timing['examples_per_second']:.0f} examples/s, "
        f"{timing['tokens_per_second']:.0f} tokens/s · whole run {timing['total_seconds']:.1f} s"
    )
    say(f"saved to {output} · reloaded logits differ by {metrics['reload_max_difference']:.1g}")
    if mlp_size:
        say("the mlp head is minibert's own: transformers cannot load this folder as a classifier")
    example = "A text to classify"
    say(f'\npredict: python -m minibert.predict {output} --text "{example}"')
