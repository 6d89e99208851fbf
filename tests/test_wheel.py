"""What a built wheel holds is enough: the commands run from it, away from the source."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new virtual environment with the wheel, which sees this one's packages for what the wheel needs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, "-q"], check=True, cwd=folder)
    (wheel,) = folder.glob("minibert-*.whl")
    environment = folder / "venv"
    venv.create(environment, symlinks=True, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([*install, "-q"], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment / "bin" / "python"


@pytest.mark.slow
def test_the_commands_run_from_a_wheel(python: Path, minilm: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def minibert(name: str, *arguments: str) -> str:
        command = [str(python), "-m", f"minibert.{name}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(python), "-c", "import minibert, minibert_kernels as k; print(minibert.__file__, k.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True).stdout
    assert found.count(str(python.parents[1])) == 2
    (tmp_path / "new.csv").write_text("text,label\nwhere is my parcel,delivery\nyou charged me twice,billing\n")
    minibert("finetune", "--max-steps", "2", "--head-init", "random", "--output", "run")
    assert "Traceback" not in minibert("predict", "run", "--file", "new.csv")
    assert "accuracy" in minibert("evaluate", "run", "--file", "new.csv")
    minibert("embed", "run", "--file", "new.csv", "--output", "new.npy")
    minibert("export", "run", "--onnx")
    assert (tmp_path / "new.npy").exists() and list((tmp_path / "run").rglob("*.onnx"))
    assert (tmp_path / "run" / "report.html").exists()
