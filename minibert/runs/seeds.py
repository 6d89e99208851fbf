"""--seeds: one run for each seed on the same split, what they say together, and the best one named.

A seed's run is a full run folder, `seed-N`. `seeds.json` is written after each, so --resume knows what is done.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from minibert.config import RunConfig
from minibert.data.loading import RunData
from minibert.errors import UserError
from minibert.filenames import CHECKPOINTS, METRICS, SEEDS
from minibert.inference.classifier import Classifier, load
from minibert.problem.baseline import collapsed, majority_baseline
from minibert.reporting.console import printed_metrics
from minibert.reporting.format import fixed
from minibert.runs.folder import clear, output_folder, remove_runs, remove_trials, seed_folder
from minibert.runs.record import common_fingerprint
from minibert.runtime.files import atomic, locked, read_json, write_json, writing
from minibert.training.best import LOWER_IS_BETTER
from minibert.training.resume import STATE_FILE, check_same_run, remove_checkpoint

logger = logging.getLogger(__name__)


def run_each_seed(
    config: RunConfig, data: RunData, command: list[str], run: Callable[[RunConfig, RunData, list[str]], Classifier]
) -> Classifier:
    """--seeds: a run for each in a folder of its own; the best one's files also at the top."""
    output = output_folder(config)
    config = replace(config, output=str(output))

    def run_one(one: RunConfig) -> None:
        run(one, data, command)

    fingerprint = common_fingerprint(config, data)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output):  # each seed's run locks its own folder, too
            best = run_seeds(config, data, fingerprint, run_one)
            clear(output)
            remove_trials(output)
            copy_run(best, output)
    finally:
        with suppress(OSError):  # it holds something, but after a mistake that was seen before the first step
            output.rmdir()
    logger.info(f"its files are also in {output}\n")
    logger.info(f'predict: python -m minibert.predict {shlex.quote(str(output))} --text "A text to classify"')
    return load(output, config.device)


def run_seeds(
    config: RunConfig, data: RunData, fingerprint: dict[str, Any], run: Callable[[RunConfig], object]
) -> Path:
    """Run once with each seed, write `seeds.json`, print the table; returns the best run's folder.

    `fingerprint` is what the runs must have in common with those that --resume finds finished.
    """
    assert config.output is not None
    output, seeds = Path(config.output), [int(seed) for seed in config.seeds]
    common = {key: value for key, value in fingerprint.items() if key not in ("seed", "seeds")}
    common = json.loads(json.dumps(common))  # as the summary holds it
    finished = _finished(output, common) if config.resume else set()
    runs: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        folder = seed_folder(output, seed)
        logger.info(f"\nseed {seed} ({number} of {len(seeds)}){': finished before' if seed in finished else ''}")
        if seed not in finished:
            try:
                run(_of_seed(config, seed, folder))
            except KeyboardInterrupt:
                logger.info(f"for all seeds: the same command with --resume --output {output}")
                raise
            finally:
                if number == 1 and not config.resume and not isinstance(sys.exception(), UserError):
                    remove_runs(output, keep=folder)  # not before: a mistake leaves an earlier run alone
        runs.append({"seed": seed, "folder": folder.name, **_results(folder)})
        summary = summarise_seeds(runs, data, config.metric) | {"settings": common}
        write_json(output / SEEDS, summary)
        if not config.keep_checkpoint:
            remove_checkpoint(folder)  # only now: without it, a run that is not in the summary would be lost
    show(summary)
    return seed_folder(output, summary["best_seed"])


def _of_seed(config: RunConfig, seed: int, folder: Path) -> RunConfig:
    name = f"{config.run_name or folder.parent.name}-{folder.name}"
    killed = (folder / CHECKPOINTS / STATE_FILE).is_file() or not (folder / METRICS).exists()
    resume = config.resume and killed and folder.is_dir()
    return replace(config, seeds=(), seed=seed, output=str(folder), resume=resume, run_name=name, keep_checkpoint=True)


def _finished(output: Path, settings: dict[str, Any]) -> set[int]:
    """The seeds that an earlier seeds.json names; UserError where it is of other flags or data."""
    path = output / SEEDS
    if not path.is_file():
        return set()
    try:
        summary = read_json(path)
        saved, seeds = dict(summary["settings"]), {int(run["seed"]) for run in summary["runs"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a summary of seeds; remove it and give --resume again") from None
    check_same_run(saved, settings)
    return {seed for seed in seeds if (seed_folder(output, seed) / METRICS).is_file()}


def _results(folder: Path) -> dict[str, Any]:
    """The plain numbers of a run's metrics, by part."""
    metrics = read_json(folder / METRICS)
    return {
        part: {name: value for name, value in metrics[part].items() if not isinstance(value, dict | list)}
        for part in ("validation", "test")
        if part in metrics
    }


def summarise_seeds(runs: list[dict[str, Any]], data: RunData, metric: str | None = None) -> dict[str, Any]:
    """What `seeds.json` holds: mean and spread of each metric, the best seed, and warnings."""
    metric = metric or data.problem.default_metric
    parts = [part for part in ("validation", "test") if part in runs[0]]
    summary: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "metric": metric}
    summary |= {"best_seed": _best_seed(runs, metric), "chosen_by": "validation" if "validation" in parts else None}
    warnings = []
    if parts:
        part = parts[0]
        targets = data.problem.targets(data.splits[part].labels or [])
        baseline = majority_baseline(data.problem, targets)[metric]
        values = [run[part][metric] for run in runs]
        summary["baseline"] = {"part": part, metric: baseline}
        for run, problem in zip(runs, collapsed(values, baseline, metric in LOWER_IS_BETTER), strict=True):
            if problem:
                warnings.append(f"seed {run['seed']} {problem} ({part} {metric} {fixed(run[part][metric])})")
    summary["warnings"] = warnings
    for part in parts:
        summary[part] = {name: _spread([run[part][name] for run in runs]) for name in runs[0][part]}
    return summary | {"runs": runs}


def _best_seed(runs: list[dict[str, Any]], metric: str) -> int:
    """By the validation metric; the first seed where there is no validation: test rows must not choose."""
    if "validation" not in runs[0]:
        return int(runs[0]["seed"])
    sign = -1 if metric in LOWER_IS_BETTER else 1
    known = [run for run in runs if run["validation"][metric] is not None] or runs[:1]
    return int(max(known, key=lambda run: sign * (run["validation"][metric] or 0))["seed"])


def _spread(values: list[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; None where a run has no value or one run shows no spread."""
    known = [value for value in values if value is not None]
    whole = bool(known) and len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if whole else None,
        "std": statistics.stdev(known) if whole and len(known) > 1 else None,
        "values": values,
    }


def show(summary: dict[str, Any]) -> None:
    """A table for each part, warnings, and which seed was the best."""
    for part in ("validation", "test"):
        if part in summary:
            logger.info("\n" + "\n".join(table_lines(part, summary)))
    for warning in summary["warnings"]:
        logger.info(f"warning: {warning}")
    why = f"by validation {summary['metric']}" if summary["chosen_by"] else "the first: no validation rows to choose by"
    logger.info(f"best seed: {summary['best_seed']} ({why})")


def table_lines(part: str, summary: dict[str, Any]) -> list[str]:
    """A row for each seed, then mean and standard deviation."""
    names = printed_metrics(summary[part], summary["metric"])
    rows = {f"seed {run['seed']}": [run[part][name] for name in names] for run in summary["runs"]}
    rows |= {key: [summary[part][name][key] for name in names] for key in ("mean", "std")}
    first = max(map(len, [part, *rows]))
    widths = [max(len(name), 8) + 2 for name in names]
    lines = [f"{part:<{first}}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for label, values in rows.items():
        cells = (f"{fixed(value):>{width}}" for value, width in zip(values, widths, strict=True))
        lines.append(f"{label:<{first}}{''.join(cells)}")
    return lines


def copy_run(folder: Path, output: Path) -> None:
    """Copy the files of a run, all but its checkpoint, to `output`: it is then a run folder of its own."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            with atomic(output / path.name) as temporary:
                shutil.copyfile(path, temporary)
