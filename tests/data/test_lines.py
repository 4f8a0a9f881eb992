"""The lines of a data file: bounded, unpacked, unchanged while they are read."""

import errno
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix.data import lines
from tests.examples import write_lines


def test_a_mark_before_an_overlong_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_BYTES", 100)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"a" * 101 + b"\nsecond\n")
    assert list(lines.read_lines(path)) == [b"a" * 101, b"second\n"]


def test_a_line_is_read_no_further_than_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_BYTES", 1000)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"a" * 999 + b"\n" + b"b" * 1000 + b"\n" + b"c" * 5000 + b"\nd\n" + b"e" * 1000)
    assert [(line[:1], len(line)) for line in lines.read_lines(path)] == [
        (b"a", 1000),
        (b"b", 1001),
        (b"c", 1001),
        (b"d", 2),
        (b"e", 1000),
    ]


@pytest.mark.parametrize("change", ["append", "replace", "delete"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = write_lines(tmp_path / "d.jsonl", *[{"text": "a"}] * 3)
    found = lines.read_lines(path)
    next(found)
    if change == "append":
        with path.open("a") as file:
            file.write("\n")
    elif change == "replace":
        write_lines(tmp_path / "other", *[{"text": "b"}] * 3).replace(path)
    else:
        path.unlink()
    with pytest.raises(InputError, match="changed while it was being read; copy it"):
        list(found)


def test_a_disk_that_fails_while_a_file_is_read(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "d.jsonl.gz").write_bytes(b"")
    monkeypatch.setattr(gzip, "open", fail)
    with pytest.raises(InputError, match=r"d.jsonl.gz: cannot be read \(Input/output error\)"):
        list(lines.read_lines(tmp_path / "d.jsonl.gz"))


def test_a_files_hash_is_of_what_it_holds_now(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text("one")
    assert lines.sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)  # it is not read a second time
        assert lines.sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    path.write_text("other")
    assert lines.sha256_of(path) == hashlib.sha256(b"other").hexdigest()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        lines.sha256_of(path)


def test_a_gzip_file_may_unpack_to_a_lot_if_it_is_large_or_that_is_not_much(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "UNPACKED_BYTES", 5000)
    path, text = tmp_path / "d.jsonl.gz", np.random.default_rng(0).bytes(5000).hex().encode()
    for content in (text, b"a" * 5000):  # of the first, half is left, of the second, hardly anything
        path.write_bytes(gzip.compress(content))
        assert [*lines.read_lines(path)] == [content]
    path.write_bytes(gzip.compress(b"a" * 50_000))
    with pytest.raises(InputError, match="unpacks to more than 100 times its size"):
        [*lines.read_lines(path)]


def test_data_must_be_a_regular_file():
    with pytest.raises(InputError, match="/dev/null: is a folder or a pipe, not a regular file"):
        [*lines.read_lines(Path("/dev/null"))]
