"""The results file: what was measured on what, rows of several calls merged, and a table of what it says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minibert.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "accelerate")
MUST_AGREE = ("device", "torch", "triton", "transformers", "smoke")  # between files that are merged
FAILURES = ("error", "not_available")


@dataclass
class Results:
    """A header, and for every row its figures or why it has none."""

    path: Path
    header: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, content["header"], content["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a results file of this program ({error}); give another") from None

    def write(self) -> None:
        """At once or not at all: a kill in the middle of writing would lose everything."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"header": self.header, "rows": self.rows}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def has(self, name: str, retry: bool = False) -> bool:
        """Whether the row needs no further call; with `retry` it does where it failed."""
        return name in self.rows and not (retry and failed(self.rows[name]))

    def add(self, other: Results) -> None:
        """Take the other's rows too; of two results of a row, the later one that has figures."""
        for key in MUST_AGREE:
            if self.header.get(key) != other.header.get(key):
                raise UserError(
                    f"{other.path}: {key} is {other.header.get(key)}, but {self.header.get(key)} in {self.path}; "
                    "merge files of one device and one installation"
                )
        for name, row in other.rows.items():
            if name not in self.rows or not failed(row) or failed(self.rows[name]):
                self.rows[name] = row


def failed(row: dict[str, Any]) -> bool:
    return any(key in row for key in FAILURES)


def merge(paths: list[Path], folder: Path) -> Results:
    """One file in `folder` of what is there already and the given ones, the latest last."""
    merged: Results | None = None
    files = [Results.read(path) for path in paths]
    target = folder / file_name(files[0].header)
    for each in [Results.read(target), *files] if target.exists() else files:
        if merged is None:
            merged = Results(target, each.header)
        merged.add(each)
    assert merged is not None
    merged.write()
    return merged


def open_results(folder: Path, header: dict[str, Any]) -> Results:
    """The file of this device in the folder, with the rows of earlier calls."""
    results = Results(folder / file_name(header), header)
    if results.path.exists():
        results.add(Results.read(results.path))
    results.write()
    return results


def file_name(header: dict[str, Any]) -> str:
    """gpu-<device>.json, by the name that torch reports; tiny sizes on a GPU get a file of their own."""
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return f"gpu-{device}{'-smoke' if header['smoke'] and device != 'cpu' else ''}.json"


def describe(smoke: bool) -> dict[str, Any]:
    """The header, by the process that calls it: it starts the GPU."""
    import torch

    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": driver() if cuda else "none",
        "memory_gigabytes": round(properties.total_memory / 1e9, 1) if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version(name) for name in PACKAGES},
        "smoke": smoke,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit that is measured, with a + where files differ from it; without git what MINIBERT_COMMIT says."""
    try:
        found = git("rev-parse", "--short", "HEAD")
        return found + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MINIBERT_COMMIT", "unknown")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(results: Results) -> list[str]:
    """A line for every row with steps, beside transformers at its best on the same batches; then what failed."""
    lines = [f"{'steps':<62} {'ms':>8} {'faster than transformers':>26} {'tokens/s':>10} {'of matmul rate':>15}"]
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in results.rows.items():
        if "ms_per_step" in row:
            groups.setdefault(name.partition(": ")[0], {})[name] = row
    rate = next((row["matmul_tflops"] for row in results.rows.values() if "matmul_tflops" in row), None)
    for group in groups.values():
        peers = [row["ms_per_step"] for name, row in group.items() if ": transformers" in name]
        for name, row in group.items():
            ratio = f"{min(peers) / row['ms_per_step']:.2f}x" if peers else ""
            share = f"{row['tflops'] / rate:.0%}" if rate else ""
            lines.append(
                f"{name:<62} {row['ms_per_step']:>8.2f} {ratio:>26} {row['tokens_per_second']:>10} {share:>15}"
            )
    lines += [f"{name}: {row[key]}"[:200] for name, row in results.rows.items() for key in FAILURES if key in row]
    return lines
