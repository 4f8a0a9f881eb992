import concurrent.futures
import dataclasses
import errno
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from convert.errors import InputError, RunError
from jaxprefix import token_cache
from jaxprefix.config import cache_folder
from jaxprefix.examples import Chunking, make_examples, read_examples
from jaxprefix.recipe import Recipe
from jaxprefix.token_cache import load_examples
from jaxprefix.tokenizer import SentencePiece, load_tokenizer
from tests.base_folders import make_base_folder

SENTENCES = ["朝の市場は人でいっぱいだった。", "魚屋の主人が大きな声を出している。", "今日は、暑い。"]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 1000)
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 2000)


@pytest.fixture
def data(tmp_path):
    """A file of 120 lines in many ranges: a mark at its start, documents, pairs, blank lines, no newline at its end."""
    lines = []
    for number in range(40):
        lines.append(json.dumps({"text": "\n".join(SENTENCES * (1 + number % 3)) + str(number)}, ensure_ascii=False))
        lines += [json.dumps({"prompt": f"{number}", "completion": SENTENCES[number % 3]}), ""]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode().rstrip())
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Starting processes takes seconds; what is tested here is what becomes of their work."""

    def in_order(path, chunking, *_):
        for block in token_cache._blocks(path):
            yield block.n_bytes, make_examples(block.lines, path, block.first_line, chunking)

    monkeypatch.setattr(token_cache, "_in_order", in_order)


def same(left, right):
    return list(left) == list(right)


def test_many_processes_make_the_examples_of_one(data, tokenizer, capfd):
    examples = load_examples(data, Chunking(tokenizer))
    assert len(list(token_cache._blocks(data))) > 3
    assert same(examples, read_examples(data, Chunking(tokenizer)))
    assert len(examples) > 80
    assert "MB/s" in capfd.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_the_second_time_nothing_is_tokenized(data, tokenizer, monkeypatch, capfd):
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


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "prompt_lengths.npy", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.usefixtures("in_this_process")
def test_a_damaged_entry_is_made_anew(data, tokenizer, name, damage):
    expected = list(load_examples(data, Chunking(tokenizer)))
    path = cache_folder() / "tokens" / token_cache._key(data, Chunking(tokenizer)) / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-9])
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
        assert list(found.skipped.report(data)) == report


@pytest.mark.usefixtures("in_this_process")
def test_gzip_makes_the_same_examples(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 500)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    assert same(load_examples(packed, Chunking(tokenizer)), read_examples(data, Chunking(tokenizer)))
    assert len(list((cache_folder() / "tokens").iterdir())) == 1


@pytest.mark.usefixtures("in_this_process")
def test_processes_that_start_together_tokenize_once(data, tokenizer, monkeypatch):
    tokenize, made, barrier = token_cache._tokenize, [], threading.Barrier(4)

    def counted(*arguments):
        made.append(1)
        tokenize(*arguments)

    def load(_):
        barrier.wait()
        return load_examples(data, Chunking(tokenizer))

    monkeypatch.setattr(token_cache, "_tokenize", counted)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, range(4)))
    assert all(same(examples, found[0]) for examples in found)
    assert len(made) == 1


def test_a_file_that_changes_before_it_is_tokenized(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_tokenize", lambda path, *_: path.write_text('{"text": "b"}'))
    with pytest.raises(InputError, match="changed while it was tokenized"):
        load_examples(data, Chunking(tokenizer))
    assert list((cache_folder() / "tokens").iterdir()) == []


WITHOUT_GUARD = """
import sys
from pathlib import Path
from jaxprefix import token_cache
from jaxprefix.examples import Chunking
from jaxprefix.tokenizer import load_tokenizer
from tests.base_folders import GOLDEN_BASE

token_cache.CACHED_BYTES = 1
token_cache.load_examples(Path(sys.argv[1]), Chunking(load_tokenizer(GOLDEN_BASE)))
"""


@pytest.mark.parametrize("from_file", [True, False])
def test_a_program_that_its_helpers_would_run_again_is_told(data, tmp_path, from_file):
    (script := tmp_path / "script.py").write_text(WITHOUT_GUARD)
    command = [sys.executable, script if from_file else "-", data]
    options = {"env": os.environ | {"PYTHONPATH": os.getcwd()}, "capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run(command, input="" if from_file else WITHOUT_GUARD, **options)
    assert result.returncode == 1
    assert ("put it under `if __name__ == '__main__':`" if from_file else "<stdin>") in result.stderr
    assert "RunError: a process that tokenizes ended too early: it has said why" in result.stderr


def test_a_helper_that_runs_the_program_again_ends(data, tokenizer, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InputError, match="put it under `if __name__ == '__main__':`"):
        load_examples(data, Chunking(tokenizer))


WAITING_FOREVER = """
import sys, time
from pathlib import Path
from jaxprefix import token_cache
from jaxprefix.examples import Chunking
from jaxprefix.tokenizer import load_tokenizer
from tests.base_folders import GOLDEN_BASE

def blocks(path):
    yield token_cache.Block(1, [b'{"text": "a"}'], 13)
    print("begun", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    token_cache.CACHED_BYTES, token_cache._blocks = 1, blocks
    token_cache.load_examples(Path(sys.argv[1]), Chunking(load_tokenizer(GOLDEN_BASE)))
"""


def test_what_a_killed_process_leaves_behind(data, tokenizer, tmp_path, monkeypatch):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING_FOREVER)
    command = [sys.executable, script, data]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    main = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert main.stdout.readline() == "begun\n"
    main.kill()
    main.communicate()  # until all helpers have closed it, too
    assert len(list((cache_folder() / "tokens").iterdir())) == 1
    (bad := tmp_path / "bad.jsonl").write_text("[" * 2000)
    with pytest.raises(InputError, match="line 1"):
        load_examples(bad, Chunking(tokenizer))
    assert len(list((cache_folder() / "tokens").iterdir())) == 1, "it may be at work"
    monkeypatch.setattr(token_cache, "ABANDONED_SECONDS", 0)
    assert same(load_examples(data, Chunking(tokenizer)), read_examples(data, Chunking(tokenizer)))
    (entry,) = (cache_folder() / "tokens").iterdir()
    assert "unfinished" not in entry.name


def raising(error):
    raise error


def killed(block):
    os._exit(9)


def test_a_helper_that_is_killed_is_told(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_tokenize_block", killed)
    with pytest.raises(RunError, match="a process that tokenizes ended too early"):
        load_examples(data, Chunking(tokenizer))


def test_helpers_that_cannot_be_started_are_told(data, tokenizer, monkeypatch):
    error = OSError(errno.EAGAIN, "Resource temporarily unavailable")
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", lambda *_: raising(error))
    with pytest.raises(RunError, match=r"cannot be started \(Resource temporarily unavailable\)$"):
        load_examples(data, Chunking(tokenizer))
    for number in (errno.EROFS, errno.ENOENT, errno.EACCES):
        error = OSError(number, "no semaphores")
        monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.__init__", lambda *_, e=error, **__: raising(e))
        with pytest.raises(RunError, match=r"\(no semaphores\); is /dev/shm there and writable\?"):
            load_examples(data, Chunking(tokenizer))


@pytest.mark.parametrize(("limit", "n_cores"), [("max 100000", 128), ("400000 100000", 4), ("50000 100000", 1)])
def test_a_containers_share_of_the_cores_counts(monkeypatch, limit, n_cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(Path, "read_text", lambda _: limit)
    assert token_cache._n_cores() == n_cores


def test_a_system_that_does_not_tell_a_processs_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(Path, "read_text", lambda _: raising(FileNotFoundError()))
    assert token_cache._n_cores() == 3


def test_who_waits_for_another_says_so(data, tokenizer, monkeypatch, capfd):
    asked = []

    def flock(file, how):
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.flock", flock)
    with token_cache._making(token_cache.cache_folder() / "tokens" / "entry"):
        assert "another process tokenizes the same file; waiting for it" in capfd.readouterr().err
    assert len(asked) == 2


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


class Wide:
    """A tokenizer with more pieces than 16 bits tell apart."""

    vocab_size, exact_fingerprint = 70_000, "wide"

    def encode(self, text):
        return [69_999]


@pytest.mark.usefixtures("in_this_process")
def test_ids_beyond_16_bits_are_kept(data):
    assert {token for example in load_examples(data, Chunking(Wide())) for token in example.target} == {69_999}


def test_an_entry_at_work_is_judged_by_its_newest_file(tmp_path, monkeypatch):
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
