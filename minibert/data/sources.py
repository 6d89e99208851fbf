"""A data file as bytes and text: taken out of .gz and .zip, its format told by its name, its encoding by its bytes."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minibert.errors import UserError
from minibert.runtime.files import one_line

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".label", ".xlsx")
SPREADSHEETS = (".xls", ".ods")
SAMPLE = 1 << 20  # bytes from which an encoding is guessed
MIN_NON_ASCII = 8  # bytes beyond ASCII that a guess needs; with fewer, cp1252
UTF_16 = ("utf_16_le", "utf_16_be")
LEGACY_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256"),
    *("gb18030", "big5", "cp932", "euc_jp", "cp949", *UTF_16),
)
MAX_LINE_LENGTH = 64 << 20  # characters: a longer one is a broken or hostile file, not a text
EXPANSION, EXPANSION_FREE = 200, 256 << 20  # decompressed over compressed bytes, once that much has come out
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, struct.error)


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, seen through .gz and .zip."""
    suffix = _inner_suffix(_zip_member(path) if _is_zip(path) else path.name)
    if suffix in SPREADSHEETS:
        raise UserError(f"{path}: a spreadsheet; save it as .xlsx or .csv and give that")
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; minibert reads {' '.join(SUFFIXES)}, also in .gz and .zip")
    return suffix


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed."""
    if _is_zip(path):
        return io.BufferedReader(Expanding(zipfile.ZipFile(path).open(_zip_member(path)), path), 1 << 16)
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(Expanding(gzip.open(path), path), 1 << 16)  # type: ignore[arg-type]
    return open(path, "rb")


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[io.TextIOWrapper]:
    """The file's text, line endings as they are; what cannot be read is one line of error."""
    try:
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="") as text:
            yield text
    except UnicodeError as error:
        name = encoding.removesuffix("-sig")
        raise UserError(f"{path}: not {name} text ({one_line(error)}); give --encoding") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be read and why."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({one_line(error) or type(error).__name__})") from None


class Expanding(io.RawIOBase):
    """A compressed file as it comes out; one that grows as no text does is refused before it fills the memory."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.most = max(EXPANSION_FREE, EXPANSION * path.stat().st_size)
        self.out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        self.out += len(data)
        if self.out > self.most:
            raise UserError(f"{self.path}: grows more than {EXPANSION}-fold when decompressed; give it decompressed")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(".zip")


def _inner_suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _zip_member(path: Path) -> str:
    """The one data file of an archive, beside which others may lie that are none."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read as zip ({one_line(error)})") from None
    visible = [e for e in entries if "__MACOSX" not in e.filename and not Path(e.filename).name.startswith(".")]
    found = [entry for entry in visible if _inner_suffix(entry.filename) in SUFFIXES] or visible
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} files; expected one data file")
    if found[0].flag_bits & 1:
        raise UserError(f"{path}: is encrypted; decrypt it first")
    if found[0].filename.lower().endswith(".gz"):
        raise UserError(f"{path}: holds a packed file, {found[0].filename}; unpack the outer one")
    return found[0].filename


def encoding_of(path: Path, asked: str | None) -> str:
    """The encoding asked for, or else the one the file's bytes show, as a codec's name."""
    encoding = known_encoding(asked) if asked else _detected(path)
    # one codec reads UTF-8 with or without its mark; else the mark would become part of a column's name
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def known_encoding(encoding: str) -> str:
    """A text encoding that this Python knows."""
    try:
        "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError):
        raise UserError(f"--encoding {encoding}: no such encoding; try utf-8, cp1252 or latin-1") from None
    return encoding


def _detected(path: Path) -> str:
    """UTF-16 by its mark or its zero bytes; UTF-8 if all bytes are; else what the characters look like."""
    with open_bytes(path) as file:
        sample = file.read(SAMPLE)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in sample:
        return next(iter(_likely(sample, UTF_16)), "utf-8")
    if _decodes(path, "utf-8"):
        return "utf-8"
    _check_damaged_utf8(path)
    candidates = _likely(sample, LEGACY_ENCODINGS) if _non_ascii(sample) >= MIN_NON_ASCII else []
    return next((encoding for encoding in [*candidates, "cp1252"] if _decodes(path, encoding)), "latin-1")


def _likely(sample: bytes, encodings: tuple[str, ...]) -> list[str]:
    """Those of the encodings in which the sample reads as text, the likeliest first; of equals cp1252."""
    from charset_normalizer import from_bytes

    whole_lines = sample[: sample.rfind(b"\n") + 1] if len(sample) == SAMPLE and encodings != UTF_16 else sample
    matches = list(from_bytes(whole_lines, cp_isolation=list(encodings)))
    names = [name for match in matches for name in match.could_be_from_charset]
    ties = [match for match in matches if (match.chaos, match.coherence) == (matches[0].chaos, matches[0].coherence)]
    western = any("cp1252" in match.could_be_from_charset for match in ties)
    return sorted(names, key=lambda name: name != "cp1252") if western else names


def _non_ascii(sample: bytes) -> int:
    return len(sample) - len(sample.translate(None, bytes(range(128, 256))))


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_bytes(path) as file:
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _check_damaged_utf8(path: Path) -> None:
    """A few bad bytes among much good UTF-8: read as anything else, every accent of the file would be wrong."""
    good = bad = first = 0
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_LENGTH), b""), start=1):
            if line.isascii():
                continue
            text = line.decode("utf-8", "replace")
            broken = text.count("\ufffd") - line.count(b"\xef\xbf\xbd")
            good, bad = good + sum(ord(c) > 127 for c in text) - broken, bad + broken
            first = first or (number if broken else 0)
    if good > bad:
        raise UserError(f"{path}, line {first}: not UTF-8, which the rest of the file is; fix it or give --encoding")
