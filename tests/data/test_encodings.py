"""Files in the encodings that people have, through the commands themselves: found out, not told."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minibert.finetune import main as finetune
from minibert.predict import main as predict

# A few dozen short rows, as in a small file of reviews: texts and the two labels.
RUSSIAN = ("Это очень хороший фильм", "Ужасная еда и плохое обслуживание", "хорошо", "плохо")
POLISH = ("Zażółć gęślą jaźń, świetny film", "Okropne jedzenie i zła obsługa, żałuję", "świetny", "zły")
SIMPLIFIED = ("这部电影非常好看", "服务太差了不会再来", "好", "坏")
JAPANESE = ("この映画はとても面白かったです", "サービスがひどかったので二度と行きません", "良い", "悪い")
TRADITIONAL = ("這部電影非常好看", "服務太差了不會再來", "好", "壞")
FRENCH = ("Un très bon film, déjà vu", "Le service était très mauvais, à éviter", "élevé", "raté")
FILES = {
    "cp1251": RUSSIAN,
    "cp1250": POLISH,
    "gbk": SIMPLIFIED,
    "shift_jis": JAPANESE,
    "big5": TRADITIONAL,
    "cp1252": FRENCH,
    "utf-8": RUSSIAN,
    "utf-8-sig": JAPANESE,
    "utf-16": RUSSIAN,  # with a mark
    "utf-16-le": RUSSIAN,
    "utf-16-be": TRADITIONAL,
}


def write(path: Path, encoding: str) -> list[tuple[str, str]]:
    good, bad, yes, no = FILES[encoding]
    rows = [(f"{bad if i % 2 else good} {i}", no if i % 2 else yes) for i in range(40)]
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return rows


@pytest.mark.parametrize("encoding", FILES)
@pytest.mark.slow
def test_commands_read_every_encoding(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    data, run = tmp_path / "data.csv", tmp_path / "run"
    rows = write(data, encoding)
    recipe = "--max-steps 1 --head-init random --device cpu --quiet".split()
    finetune(["--model", str(tiny()), "--train", str(data), "--output", str(run), *recipe])
    with open(run / "predictions-validation.csv", encoding="utf-8", newline="") as file:
        trained = {(row["text"], row["label"]) for row in csv.DictReader(file)}
    assert trained and trained <= {*rows}
    predict([str(run), "--file", str(data), "--output", str(tmp_path / "out.csv")])
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        predicted = list(csv.DictReader(file))
    assert [row["text"] for row in predicted] == [text for text, _ in rows]
    assert {row["predicted"] for row in predicted} <= {label for _, label in rows}
    assert "40 predictions written" in capsys.readouterr().out


@pytest.mark.slow
def test_an_encoding_is_said_and_the_flag_wins(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A run in a process of its own, as a user starts it."""
    write(tmp_path / "data.csv", "cp1251")
    command = [sys.executable, "-m", "minibert.finetune", "--check", "--model", str(tiny()), "--train", "data.csv"]

    def said(*flags: str) -> str:
        return subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "data.csv is not UTF-8; read as cp1251" in said() and RUSSIAN[2] in said()
    assert RUSSIAN[2] not in (told := said("--encoding", "koi8-r")) and "not UTF-8" not in told
