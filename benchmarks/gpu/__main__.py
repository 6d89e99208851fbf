"""`python3 benchmarks/gpu` or `python3 -m benchmarks.gpu`: find the packages of this checkout, then run the command."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0:1] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "kernels")]  # in place of this folder

from gpu.cli import main  # noqa: E402

main()
