"""The model card: README.md with the Hub's metadata, for whoever finds the folder."""

from __future__ import annotations

from pathlib import Path

from minibert.report import Finished


def write_card(output: Path, run: Finished) -> None:
    pass
