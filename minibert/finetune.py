"""`python -m minibert.finetune`: a data file in, a trained model folder out. With no arguments, a demonstration."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from minibert.cli import given_settings, run_command
from minibert.config import RunConfig
from minibert.errors import UserError


def main(argv: Sequence[str]) -> None:
    try:
        given = given_settings(argv)
        RunConfig(**given)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # started by torchrun beside another that says the same
            time.sleep(2)
            raise SystemExit(2) from None
        raise
    from minibert.run import run_from_files  # torch loads here, after the flags have been checked

    run_from_files(given, ["python", "-m", "minibert.finetune", *argv])


if __name__ == "__main__":
    sys.exit(run_command(main))
