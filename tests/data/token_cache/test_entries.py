"""What is kept of a tokenized file, and when it is made anew."""

import dataclasses
import errno
import gzip
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix.cli import main
from jaxprefix.data import token_cache
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.data.token_cache import load_examples
from jaxprefix.machine.user_cache import cache_folder
from jaxprefix.recipe import Recipe
from jaxprefix.tokenizer import load_tokenizer
from jaxprefix.vocabularies import SentencePiece
from tests.base_folders import GOLDEN_BASE, make_base_folder
from tests.data.token_cache.helpers import raising, same


def test_many_processes_make_the_examples_of_one(data, tokenizer, capfd):
    examples = load_examples(data, Chunking(tokenizer))
    assert len(list(token_cache._blocks(data))) > 3
    assert same(examples, read_examples(data, Chunking(tokenizer)))
    assert len(examples) > 80
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"tokenizing {data} with ")
    assert last.endswith(" MB/s")


@pytest.mark.usefixtures("in_this_process")
def test_nobody_needs_to_read_how_far_it_is(data, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        flags = ["--pretrained_model_dir", str(GOLDEN_BASE), "--data_filepath", str(data), "--n_samples", "0"]
        assert main(["evaluate", *flags]) == 0
    assert len(list((cache_folder() / "tokens").iterdir())) == 1


@pytest.mark.usefixtures("in_this_process")
def test_the_second_time_nothing_is_tokenized(data, tokenizer, monkeypatch):
    first = load_examples(data, Chunking(tokenizer))
    monkeypatch.setattr(token_cache, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    assert same(load_examples(data, Chunking(tokenizer)), first)
    assert list((cache_folder() / "tokens").iterdir()) == [
        cache_folder() / "tokens" / token_cache._key(data, Chunking(tokenizer))
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"suffix": "!"},
        {"max_seq_len": 32},
        {"recipe": Recipe(drop_document_tails=True)},
        {"skip_bad_lines": True},
        "file",
        "tokenizer",
        "added tokens",
    ],
)
def test_everything_that_matters_names_another_entry(data, tokenizer, tmp_path, change):
    chunking = Chunking(tokenizer)
    before = token_cache._key(data, chunking)
    if change == "file":
        data.write_bytes(data.read_bytes() + b"\n" + json.dumps({"text": "a"}).encode())
    elif change == "tokenizer":
        vocabulary = SentencePiece(tokenizer.vocabulary.processor, {}, lower=True)
        chunking = chunking._replace(tokenizer=dataclasses.replace(tokenizer, vocabulary=vocabulary))
    elif change == "added tokens":
        folder = make_base_folder(tmp_path / "base")
        (folder / "added_tokens.json").write_text('{"朝": 440}')
        chunking = chunking._replace(tokenizer=load_tokenizer(folder))
    else:
        chunking = chunking._replace(**change)
    assert token_cache._key(data, chunking) != before


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "prompt_lengths.npy", "line_numbers.npy", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", b"", b"[]", b'{"n_tokens": 0, "tally": []}'])
@pytest.mark.usefixtures("in_this_process")
def test_a_damaged_entry_is_made_anew(data, tokenizer, name, damage):
    expected = read_examples(data, Chunking(tokenizer))
    load_examples(data, Chunking(tokenizer))
    path = cache_folder() / "tokens" / token_cache._key(data, Chunking(tokenizer)) / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-9] if damage == "cut" else damage)
    assert same(load_examples(data, Chunking(tokenizer)), expected)
    assert path.read_bytes() == whole


def test_an_error_names_the_line_of_the_file(data, tokenizer):
    lines = data.read_bytes().split(b"\n")
    lines[100] = b'{"text": 3}'
    data.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"data.jsonl, line 101: `text` must be a string, found int"):
        load_examples(data, Chunking(tokenizer))
    assert list((cache_folder() / "tokens").iterdir()) == []


@pytest.mark.usefixtures("in_this_process")
def test_bad_lines_are_skipped_counted_and_kept(data, tokenizer):
    lines = data.read_bytes().split(b"\n")
    lines[70], lines[100] = b'{"text": 3}', b"{"
    data.write_bytes(b"\n".join(lines))
    chunking = Chunking(tokenizer, skip_bad_lines=True)
    expected = read_examples(data, chunking)
    report = [f"skipped 2 of 119 lines of {data}, first: line 71: `text` must be a string, found int"]
    for found in (expected, load_examples(data, chunking), load_examples(data, chunking)):
        assert same(found, expected)
        assert list(found.tally.report(data)) == report


@pytest.mark.usefixtures("in_this_process")
def test_gzip_makes_the_same_examples(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 500)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert same(load_examples(packed, Chunking(tokenizer)), read_examples(data, Chunking(tokenizer)))
    assert len(list((cache_folder() / "tokens").iterdir())) == 1


@pytest.mark.usefixtures("in_this_process")
def test_an_entry_that_cannot_be_read_back(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_open", lambda folder: None)
    with pytest.raises(InputError, match="what was just written there cannot be read; set XDG_CACHE_HOME"):
        load_examples(data, Chunking(tokenizer))


def test_a_file_that_changes_before_it_is_tokenized(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_tokenize", lambda path, *_: path.write_text('{"text": "b"}'))
    with pytest.raises(InputError, match="changed while it was being tokenized"):
        load_examples(data, Chunking(tokenizer))
    assert list((cache_folder() / "tokens").iterdir()) == []


def test_a_file_that_cannot_be_read(data, tokenizer, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda path, *_: raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(InputError, match=r"data.jsonl: cannot be read \(Permission denied\)"):
        load_examples(data, Chunking(tokenizer))


def test_a_cache_that_cannot_be_written(data, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"the token cache cannot be written .*set XDG_CACHE_HOME to another folder"):
        load_examples(data, Chunking(tokenizer))


@pytest.mark.usefixtures("in_this_process")
def test_a_large_file_without_examples(tmp_path, tokenizer):
    path = tmp_path / "blank.jsonl"
    path.write_text("\n" * 5000)
    with pytest.raises(InputError, match="holds no example"):
        load_examples(path, Chunking(tokenizer))


def test_an_entry_at_work_is_judged_by_its_newest_file(tmp_path):
    unfinished = tmp_path / "unfinished-1"
    unfinished.mkdir()
    (unfinished / "tokens.bin").write_bytes(b"new")
    long_ago = time.time() - 10 * token_cache.ABANDONED_SECONDS
    os.utime(unfinished, (long_ago, long_ago))
    token_cache._remove_abandoned(tmp_path)
    assert unfinished.is_dir()
    os.utime(unfinished / "tokens.bin", (long_ago, long_ago))
    token_cache._remove_abandoned(tmp_path)
    assert not unfinished.exists()


def test_another_format_names_another_entry(data, tokenizer, monkeypatch):
    before = token_cache._key(data, Chunking(tokenizer))
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    assert token_cache._key(data, Chunking(tokenizer)) != before


class Sized:
    """A tokenizer of so many pieces, of which every text is the last."""

    exact_fingerprint = "sized"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [self.vocab_size - 1]


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
@pytest.mark.usefixtures("in_this_process")
def test_ids_around_16_bits_are_kept(data, vocab_size):
    found = {token for example in load_examples(data, Chunking(Sized(vocab_size))) for token in example.target}
    assert found == {vocab_size - 1}


def test_of_two_equal_entries_the_first_to_be_finished_stays(tmp_path):
    """Where locks have no effect, processes may make the same one."""
    for folder in (entry := tmp_path / "unfinished" / "entry", tmp_path / "made"):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_text(folder.name)
    token_cache._move(entry.parent, tmp_path / "made")
    assert (tmp_path / "made" / "tokens.bin").read_text() == "made"
    with pytest.raises(FileNotFoundError):
        token_cache._move(entry.parent, tmp_path / "nowhere" / "made")


@pytest.mark.usefixtures("in_this_process")
def test_an_entry_that_another_process_has_finished_meanwhile_stays(data, tokenizer):
    load_examples(data, Chunking(tokenizer))
    [entry] = (cache_folder() / "tokens").iterdir()
    before = (entry / "tokens.bin").stat().st_ino
    token_cache._make(data, Chunking(tokenizer), entry)
    assert (entry / "tokens.bin").stat().st_ino == before


@pytest.mark.usefixtures("in_this_process")
def test_a_file_system_without_locks_keeps_tokens_too(data, tokenizer, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: raising(OSError(errno.ENOLCK, "No locks available")))
    assert same(load_examples(data, Chunking(tokenizer)), read_examples(data, Chunking(tokenizer)))
    assert len(list((cache_folder() / "tokens").iterdir())) == 1


def test_what_vanishes_while_it_is_looked_at_was_finished(tmp_path):
    (tmp_path / "unfinished-1").symlink_to("nowhere")
    token_cache._remove_abandoned(tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_ends_of_another_number_of_tokens_are_damaged(data, tokenizer):
    expected = load_examples(data, Chunking(tokenizer))
    [entry] = (cache_folder() / "tokens").iterdir()
    np.save(entry / "ends.npy", np.load(entry / "ends.npy") - 1)
    assert same(load_examples(data, Chunking(tokenizer)), expected)
