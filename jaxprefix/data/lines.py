"""The lines of an untrusted data file, plain or gzip: of bounded length, from a file that must not change meanwhile."""

import codecs
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from convert.errors import InputError
from convert.untrusted import unique_keys
from jaxprefix.settings import is_utf8

LINE_BYTES = 2**23
"""Longest line; tokenizing one takes up to some 70 times its length in memory."""
UNPACKED_BYTES = 2**24
"""Any gzip file may unpack to this much."""
GZIP_RATIO = 100
"""Beyond that, a gzip file may unpack to this many times its size; text shrinks to about a tenth."""


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines with their newlines; of a line longer than LINE_BYTES, only the first LINE_BYTES + 1 bytes.

    A file whose name ends in .gz is unpacked. A byte order mark at the beginning is left out. Raises InputError when
    the file is missing, is UTF-16 or incomplete gzip, unpacks to an absurd size, or changes while it is read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such data file")
    if not path.is_file():  # it is read more than once, and must not change
        raise InputError(f"{path}: is a folder or a pipe, not a regular file")
    packed = path.suffix == ".gz"
    before = _state(path)
    most = max(UNPACKED_BYTES, GZIP_RATIO * path.stat().st_size)
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            _skip_mark(file, path)
            line = file.readline(LINE_BYTES + 1)
            while line:
                yield line
                while len(line) >= LINE_BYTES and not line.endswith(b"\n") and file.tell() <= most:
                    line = file.readline(LINE_BYTES)
                if packed and file.tell() > most:
                    raise InputError(f"{path}: unpacks to more than {GZIP_RATIO} times its size")
                line = file.readline(LINE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a valid gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if _state(path) != before:
        raise InputError(f"{path}: changed while it was being read; copy it, or wait until it is complete")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a data file; it is remembered until the file changes. Raises InputError."""
    try:
        return _sha256(path, _state(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


@functools.lru_cache
def _sha256(path: Path, state: tuple[int, int, int] | None) -> str:
    """Compute the checksum; `state` is part of the cache's key, so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _skip_mark(file: gzip.GzipFile | BinaryIO, path: Path) -> None:
    """Skip UTF-8's byte order mark, if the file begins with one."""
    start = file.read(len(codecs.BOM_UTF8))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is UTF-16; save it as UTF-8")
    if start != codecs.BOM_UTF8:
        file.seek(0)


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written to or replaced; None when it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def parse_line(line: bytes, where: str) -> dict[str, Any] | None:
    """Return a line's object, None if it is blank. Raises an InputError that begins with `where`."""
    if len(line) > LINE_BYTES:
        raise InputError(f"{where}: is longer than {LINE_BYTES:,} bytes; split the document")
    if b"\0" in line:
        raise InputError(f"{where}: holds NUL bytes; the file must be UTF-8 text")
    try:
        text = line.decode("utf-8").strip()
        record = json.loads(text, object_pairs_hook=unique_keys) if text else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON in UTF-8 ({error})") from error
    if text and not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def string_of(record: dict[str, Any], field: str, where: str) -> str:
    """Return a string field of an object. Raises an InputError that begins with `where`."""
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: `{field}` must be a string, found {type(value).__name__}")
    if not is_utf8(value):
        raise InputError(f"{where}: `{field}` holds an unpaired surrogate")
    return value
