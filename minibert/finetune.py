"""`python -m minibert.finetune`: a data file in, a trained model folder out. With no arguments, a demonstration."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minibert.api import finetune
from minibert.cli import given_settings, run_command
from minibert.config import RunConfig
from minibert.errors import UserError

if TYPE_CHECKING:
    from minibert.inference.classifier import Classifier


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


class _CallableModule(ModuleType):
    """Importing this module sets `minibert.finetune` to it, which is to remain the function that people call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Classifier:
        return finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(run_command(main))
