"""The cache gives what tokenizing gives, notices every change, and stays within its limit."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from minibert.batching import token_cache
from minibert.batching.tokens import Tokenizer, Tokens

TEXTS = ["one", "two words", "", "naïve 😀"]


@pytest.fixture
def tokenizer(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "SMALLEST", 1)
    return Tokenizer.from_folder(minilm)


def same(a: Tokens, b: Tokens) -> bool:
    types = (a.type_ids is None) == (b.type_ids is None) and np.array_equal(a.type_ids or [], b.type_ids or [])
    return types and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ids", "offsets", "cut"))


def test_second_time_comes_from_disk(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = token_cache.encode(tokenizer, TEXTS, None, 16, "head")
    assert same(first, tokenizer.encode(TEXTS, None, 16, "head"))
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("tokenized again"))
    assert same(first, token_cache.encode(tokenizer, TEXTS, None, 16, "head"))


def test_every_change_is_another_key(tokenizer: Tokenizer) -> None:
    def key(texts: list[str], pairs: list[str] | None = None, length: int = 16, truncation: str = "head") -> str:
        return token_cache.key(tokenizer, texts, pairs, length, truncation)

    keys = [key(TEXTS), key(TEXTS[::-1]), key(["one", "two", " words", ""]), key(["onetwo words", ""])]
    keys += [key(TEXTS, TEXTS), key(TEXTS + TEXTS), key(TEXTS, length=17), key(TEXTS, truncation="tail")]
    assert len(set(keys)) == len(keys)
    assert key(["lone \ud800"]) != key(["lone ?"])


def test_a_damaged_file_is_made_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = token_cache.encode(tokenizer, TEXTS, None, 16, "head")
    (file,) = (tmp_path / "minibert").iterdir()
    file.write_bytes(b"broken")
    assert same(first, token_cache.encode(tokenizer, TEXTS, None, 16, "head"))
    assert file.stat().st_size > 100


def test_a_folder_that_cannot_be_written_is_no_obstacle(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "minibert").write_text("a file in the way")
    assert len(token_cache.encode(tokenizer, TEXTS, None, 16, "head")) == 4


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("I/O error: disk full")])
def test_a_full_disk_is_no_obstacle(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(token_cache, "save_file", full)
    assert len(token_cache.encode(tokenizer, TEXTS, None, 16, "head")) == 4
    assert not list((tmp_path / "minibert").iterdir())


def test_a_user_without_a_home_has_no_cache(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert token_cache.folder() is None
    assert len(token_cache.encode(tokenizer, TEXTS, None, 16, "head")) == 4


def test_what_a_killed_run_left_is_swept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    left = tmp_path / "minibert" / ".abc.safetensors.123.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    token_cache.encode(tokenizer, TEXTS, None, 16, "head")
    assert not left.exists()


def test_old_files_make_room(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LIMIT", 1500)
    for length in range(10, 20):
        token_cache.encode(tokenizer, TEXTS, None, length, "head")
    files = list((tmp_path / "minibert").iterdir())
    assert 1 <= len(files) < 10 and sum(file.stat().st_size for file in files) <= 1500


def test_the_tests_write_into_nobodys_cache() -> None:
    """Nor does what they start, which gets the same variables."""
    cache = token_cache.folder()
    assert cache is not None and cache.is_relative_to(os.environ["MINIBERT_TESTS_HOME"])
    assert Path.home() == Path(os.environ["MINIBERT_TESTS_HOME"]) != Path(pwd.getpwuid(os.getuid()).pw_dir)
