"""Encoded texts on disk, so that the next run on the same data does not tokenize again. Never used by predict.

The key is all that decides the ids: the texts, the tokenizer, the options and this version. The folder is
$XDG_CACHE_HOME/minibert (or ~/.cache/minibert); the least recently used files go when all of them grow past the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from minibert import __version__
from minibert.batching.tokens import Tokenizer, Tokens
from minibert.errors import UserError
from minibert.runtime.files import atomic, sweep

SMALLEST = 10_000  # texts: fewer are tokenized before a file is found
OPTIONAL = ("type_ids", "windows", "repeated")  # arrays that not all tokens have
LIMIT = 2 << 30  # bytes of all encoded texts


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    truncation: str,
    window_stride: int | None = None,
) -> Tokens:
    """`tokenizer.encode` through the cache. A cache that cannot be read or written is as good as none."""
    directory = folder()
    if len(texts) < SMALLEST or directory is None:
        return tokenizer.encode(texts, pairs, max_length, truncation, window_stride)
    path = directory / f"{key(tokenizer, texts, pairs, max_length, truncation, window_stride)}.safetensors"
    tokens = load(path)
    if tokens is None:
        tokens = tokenizer.encode(texts, pairs, max_length, truncation, window_stride)
        with contextlib.suppress(OSError, UserError, SafetensorError):
            save(path, tokens)
    return tokens


def folder() -> Path | None:
    """None for a user without a home, and for a relative XDG_CACHE_HOME, which its standard tells to ignore."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "minibert") if os.path.isabs(cache) else None


def key(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    truncation: str,
    window_stride: int | None = None,
) -> str:
    digest = hashlib.sha256(
        json.dumps([__version__, max_length, truncation, window_stride, pairs is not None]).encode()
    )
    digest.update(tokenizer.backend.to_str().encode())
    for column in (texts, pairs or []):
        for text in column:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))  # so that no two lists of texts look the same
            digest.update(data)
    return digest.hexdigest()


def load(path: Path) -> Tokens | None:
    try:
        arrays = load_file(path)
        os.utime(path)  # used just now
        optional = {name: arrays.get(name) for name in OPTIONAL}
        return Tokens(ids=arrays["ids"], offsets=arrays["offsets"], cut=arrays["cut"], **optional)
    except (OSError, SafetensorError, KeyError):
        return None


def save(path: Path, tokens: Tokens) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"ids": tokens.ids, "offsets": tokens.offsets, "cut": tokens.cut}
    arrays |= {name: array for name in OPTIONAL if (array := getattr(tokens, name)) is not None}
    with atomic(path) as temporary:
        save_file(arrays, temporary)
    make_room(path.parent)


def make_room(directory: Path) -> None:
    """Delete the least recently used files until they are within the limit, and what killed runs left."""
    sweep(directory)
    files = sorted(directory.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    size = 0
    for file in files:
        size += file.stat().st_size
        if size > LIMIT:
            file.unlink(missing_ok=True)
