"""Reading and writing the files of a run. A file appears whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minibert.errors import UserError

LARGEST_SETTINGS = 256 << 20  # bytes of a JSON file of a model: the largest tokenizers have some 20 MB
NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)  # file systems that cannot
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile("[\ud800-\udfff]")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, it becomes `path`, safe on the disk."""
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if target.exists() and not target.is_file():  # /dev/null, a pipe: nothing to rename over
        with writing(path):
            yield target
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # some writers make files that only their owner may read
            os.replace(temporary, target)
            sync_folder(target.parent)
    finally:
        with suppress(OSError):  # of a folder that has vanished or can no longer be written
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written and why."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or one_line(error)}); free space or choose another --output"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise


def sweep(folder: Path) -> None:
    """Delete the temporary files that a killed run left in a folder."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against a second run. The system lets go of the lock however this process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing here; wait for it or give another --output") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file, or say which file cannot be read and why, in one line."""
    try:
        check_regular_file(path)
        if path.stat().st_size > LARGEST_SETTINGS:
            raise UserError(f"{path}: larger than {LARGEST_SETTINGS >> 20} MB; is it the right file?")
        return parse_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)})") from None


def parse_json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON ({one_line(error)})") from None


def check_output_path(path: Path, source: str | None = None) -> None:
    """A file to write that cannot be, or that is the one to read: said before the work, not after it."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it, or give another --output")
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; give the name of a file")
    if source and path.exists() and os.path.exists(source) and path.samefile(source):
        raise UserError(f"--output {path}: is the file to read; give another name")


def check_regular_file(path: Path) -> None:
    """Pipes and devices may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file")


def file_hash(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: object, length: int = 300) -> str:
    return " ".join(printable(str(error)).split())[:length]


def printable(text: str) -> str:
    """Text without what a terminal would obey, such as line breaks and colours."""
    return CONTROL.sub(" ", text)


def valid_unicode(text: str) -> str:
    """Lone surrogates, which JSON can hold and UTF-8 and the tokenizer cannot, become question marks."""
    return SURROGATE.sub("?", text)
