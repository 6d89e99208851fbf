"""What a run says on the terminal."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minibert.config import RecipeSettings
from minibert.model.checkpoint import OWN_HEAD, LoadReport
from minibert.reporting.format import fixed, shorten
from minibert.runtime.device import Hardware, duration
from minibert.runtime.files import printable
from minibert.training.loop import Training
from minibert.version import __version__

logger = logging.getLogger(__name__)
# The metrics worth a place on the terminal, where a problem has them; metrics.json has all.
PRINTED_METRICS = """accuracy micro_f1 macro_f1 weighted_f1 subset_accuracy mcc roc_auc pearson spearman mse mae
loss""".split()
CLASSES, NAME_LENGTH = 30, 40  # of the table of classes


class ConsoleHandler(logging.Handler):
    """Information on standard output, above the progress bar; warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Errors are the caller's, but for a reader that went away, as after `| head`: the run goes on."""
        is_warning = record.levelno >= logging.WARNING
        try:
            with tqdm.external_write_mode():
                text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
                print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def console(quiet: bool) -> Iterator[None]:
    """Show what minibert logs until the block ends; with `quiet`, warnings alone."""
    root, handler = logging.getLogger("minibert"), ConsoleHandler()
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]


@contextmanager
def only_warnings() -> Iterator[None]:
    """Log no information until the block ends, as for one of many trials."""
    root = logging.getLogger("minibert")
    before = root.level
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(before)


def describe(config: RecipeSettings, report: LoadReport, hardware: Hardware, frozen: int, given: bool) -> None:
    """The head of a run: what computes, and which model; `inspection` says the rest."""
    logger.info(f"minibert {__version__} · {hardware}")
    logger.info(f"model   {config.model}{'' if given else ', as no --model is given'}")
    logger.info(f"        {report}")
    if frozen >= 0:
        logger.info(f"frozen  embeddings and {frozen} layers")


class Progress:
    """A line for each evaluation, so that a run shows that it moves where there is no terminal for a bar."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.started, self.first = time.monotonic(), training.state.step
        self.loss = ""

    def log(self, line: dict[str, Any]) -> None:
        """A line of train_log.jsonl."""
        if line.get("loss") is not None:
            self.loss = f"loss {line['loss']:.4f} · "
        name = f"validation_{self.training.metric}"
        if name not in line:
            return
        value = "-" if line[name] is None else f"{line[name]:.4f}"
        if line["step"] == 0:
            logger.info(f"linear probe alone: {name.replace('_', ' ', 1)} {value}")
            return
        best = " (best so far)" if self.training.state.best_step == line["step"] else ""
        taken, total = time.monotonic() - self.started, self.training.total_steps
        left = taken / max(line["step"] - self.first, 1) * (total - line["step"])
        times = f"{duration(taken)}, {duration(left)} left" if line["step"] < total else duration(taken)
        where = f"epoch {line['epoch']:<3.3g} step {line['step']} of {total}"
        logger.info(f"{where} · {self.loss}{name.replace('_', ' ', 1)} {value}{best} · {times}")


def summarise(output: Path, metrics: dict[str, Any], mlp_size: int, pairs: bool, headline: str, metric: str) -> None:
    """The end of a run: metrics, a row for each class, speed, and what to do next."""
    logger.info("")
    logger.info(headline)
    for part in ("validation", "test"):
        if part in metrics:
            names = printed_metrics(metrics[part], metric)
            numbers = [f"{name} {fixed(metrics[part][name])}" for name in names]
            logger.info(f"{part:<11}" + " · ".join(numbers))
    if "linear_probe" in metrics:
        probe = metrics["linear_probe"]["validation"]
        numbers = [f"{name} {fixed(probe[name])}" for name in PRINTED_METRICS if name in probe]
        logger.info(f"{'probe':<11}" + " · ".join(numbers) + " (the linear probe alone, on validation)")
    for line in metrics["train"]["advice"]:
        logger.info(line)
    if "at_threshold_0.5" in metrics.get("validation", {}):
        logger.info("           thresholds: the best F1 of each label on validation, kept in config.json for predict")
    part = "test" if "test" in metrics else "validation"
    for line in class_lines(part, metrics.get(part, {}).get("per_class", {})):
        logger.info(line)
    timing = metrics["speed"]
    logger.info(
        f"\ntrained in {timing['train_seconds']:.1f} s, {timing['examples_per_second']:.0f} examples/s, "
        f"{timing['tokens_per_second']:.0f} tokens/s · whole run {timing['total_seconds']:.1f} s"
    )
    logger.info(f"saved to {output} · loaded again, its logits differ by {metrics['reload_max_difference']:.1g}")
    if mlp_size:
        logger.info(OWN_HEAD)
    logger.info(f"\nreport:  {output / 'report.html'}")
    second = ' --text-pair "Its second text"' if pairs else ""
    logger.info(f'predict: python -m minibert.predict {shlex.quote(str(output))} --text "A text to classify"{second}')


def printed_metrics(known: Mapping[str, Any], metric: str) -> list[str]:
    """The names of the metrics that the terminal shows of those known, the one that chooses the weights among them."""
    names = PRINTED_METRICS if metric in PRINTED_METRICS else [metric, *PRINTED_METRICS]
    return [name for name in names if name in known]


def class_lines(part: str, per_class: dict[str, dict[str, Any]]) -> list[str]:
    """The final table: a row for each class, of very many for the first ones."""
    if not per_class:
        return []
    names = [terminal_name(name) for name in list(per_class)[:CLASSES]]
    width = max(map(len, [*names, f"{part} rows"])) + 2
    lines = [f"\n{part + ' rows':<{width}} precision  recall      f1  support"]
    for name, row in zip(names, per_class.values(), strict=False):
        numbers = " ".join(f"{row[key]:>{space}.4f}" for key, space in (("precision", 9), ("recall", 7), ("f1", 7)))
        lines.append(f"{name:<{width}} {numbers} {row['support']:>8}")
    rest = len(per_class) - CLASSES
    return [*lines, f"... and {rest} more in metrics.json"] if rest > 0 else lines


def terminal_name(label: str) -> str:
    """A label on one line, without what a terminal would obey, and not longer than a column."""
    return shorten(" ".join(printable(label).split()), NAME_LENGTH)
