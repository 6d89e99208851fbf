"""What a run was, as JSON: run.json to do it again, the split, and the fingerprint that a resumed run must share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch

from minibert.batching.dataset import Dataset
from minibert.batching.tokenizer import Tokenizer
from minibert.cli import checked_values
from minibert.config import PATHS, DataSettings, RunConfig
from minibert.data.examples import Examples
from minibert.data.loading import RunData
from minibert.data.rows import BadRow
from minibert.errors import UserError
from minibert.filenames import CHECK, RECORD, SEARCH, SEEDS, SPLITS
from minibert.model.config import BertConfig
from minibert.reporting.data_summary import Inspection
from minibert.runtime.device import Hardware
from minibert.runtime.files import file_hash, read_json, write_json, write_text
from minibert.training.resume import code_digest
from minibert.version import __version__

SKIPPED_NAMED = 20  # rows that could not be used, in run.json


def begun_with(output: Path, config: RunConfig) -> dict[str, Any]:
    """--resume without --train: the settings of the run in `output`, by its run.json."""
    if config.seeds or (output / SEEDS).is_file():
        raise UserError(f"{output}: with --seeds, give the whole command again, and --resume")
    path = output / SEARCH
    path = path if path.is_file() else output / RECORD
    record = read_json(path) if path.is_file() else None
    record = record if isinstance(record, dict) else {}
    if not isinstance(record.get("flags"), dict) or not record["flags"].get("train"):
        raise UserError(f"{output}: no run.json with a training file to go on with; give the flags of the run again")
    settings = checked_values(record["flags"], str(path))
    folder = Path(str(record.get("folder") or "."))  # where its paths begin
    paths = {name: folder / settings[name] for name in PATHS if settings.get(name)}
    return settings | {name: str(path) for name, path in paths.items() if os.path.exists(path)}


def run_record(config: RunConfig, data: RunData, command: list[str]) -> dict[str, Any]:
    """run.json: all that is needed to do the run again."""
    files = {part: getattr(config, part) for part in ("train", "validation", "test") if getattr(config, part)}
    return {
        "flags": config.to_dict(),
        "command": command,
        "folder": os.getcwd(),
        "seed": config.seed,
        "data": {part: {"file": path, "sha256": file_hash(path)} for part, path in files.items()},
        "columns": dataclasses.asdict(data.columns),
        "rows": {part: len(examples) for part, examples in data.splits.items()},
        "skipped_rows": {part: skipped_record(bad) for part, bad in data.skipped.items()},
        "labels": data.problem.labels,
        "versions": {
            "minibert": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads()},
    }


def first_command(output: Path, command: list[str]) -> list[str]:
    """The command line that began the run in `output`, which is the one to do it again; `command` if none is known."""
    try:
        words = read_json(output / RECORD)["command"]
    except (UserError, LookupError, TypeError):
        return command
    return words if isinstance(words, list) and words and all(isinstance(word, str) for word in words) else command


def splits_record(config: DataSettings, data: RunData) -> dict[str, Any]:
    """splits.json: which rows of which file are in which part, by the line they start on, as in the predictions."""
    parts = {part: {"file": examples.source, "rows": examples.lines} for part, examples in data.splits.items()}
    return {"split_seed": config.split_seed, "parts": parts}


def write_record(
    output: Path, record: dict[str, Any], inspection: Inspection, config: DataSettings, data: RunData
) -> None:
    """What a run is, written down as it begins: run.json, check.json, splits.json."""
    write_json(output / RECORD, record)
    write_json(output / CHECK, inspection.to_dict())
    write_text(output / SPLITS, json.dumps(splits_record(config, data)) + "\n")


def skipped_record(bad: list[BadRow]) -> dict[str, Any]:
    return {"rows": len(bad), "first": [{"line": row.line, "reason": row.reason} for row in bad[:SKIPPED_NAMED]]}


def fingerprint_of(
    config: RunConfig,
    data: RunData,
    tokenizer: Tokenizer,
    hardware: Hardware,
    start: str,
    weights: np.ndarray | None,
) -> dict[str, Any]:
    """All that decides the bits of a run: what a resumed one must share with the one that was begun."""
    return {
        "version": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": str(hardware),
        "starting weights": start,
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:12],
        "class weights": None if weights is None else weights.tolist(),
        "labels": data.problem.labels,
        **{f"{part} rows": rows_digest(examples) for part, examples in data.splits.items()},
        **settings_of(config),
    }


def common_fingerprint(config: RunConfig, data: RunData) -> dict[str, Any]:
    """What several runs of one command have in common with those that --resume finds finished."""
    rows = {f"{part} rows": rows_digest(examples) for part, examples in data.splits.items()}
    named = {name: getattr(config, name) for name in PATHS}
    named |= {name: str(Path(value).absolute()) for name, value in named.items() if value and os.path.exists(value)}
    return {"version": __version__, **rows, **named, **settings_of(config)}


def rows_digest(examples: Examples) -> str:
    """A hash of every text, label and weight of a part, in order."""
    digest = hashlib.sha256()
    weights = [] if examples.weights is None else [examples.weights]
    for column in (examples.texts, examples.pairs, examples.labels, *weights):
        for cell in column or ():  # one by one: as a whole it would be a copy of the data
            digest.update(json.dumps(cell).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()[:12]


def must_be_alike(fingerprint: dict[str, Any], bert: BertConfig, sets: dict[str, Dataset]) -> dict[str, Any]:
    """What no process may have otherwise than the first."""
    return fingerprint | {
        "architecture": repr(bert),
        "encoded texts": [zlib.crc32(dataset.tokens.ids.tobytes()) for dataset in sets.values()],
    }


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The flags that a resumed run must share with the one that was begun; of files their content counts."""
    free = (
        "resume",
        "overwrite",
        "quiet",
        "output",
        "report_to",
        "run_name",
        "check",
        "save_steps",
        "keep_checkpoint",
        "push_to_hub",
        *PATHS,
    )
    return {key: value for key, value in config.to_dict().items() if key not in free}
