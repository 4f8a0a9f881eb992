"""The processes that tokenize together, and those that wait for them."""

import concurrent.futures
import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from convert.errors import InputError, RunError
from jaxprefix.data import token_cache
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.data.token_cache import load_examples
from jaxprefix.machine.user_cache import cache_folder
from tests.data.token_cache.helpers import raising, same
from tests.runs import PATIENCE


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


def test_a_worker_of_a_pool_tokenizes_alone(data, tokenizer, monkeypatch):
    """It may have no helpers: multiprocessing asserts so."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert same(load_examples(data, Chunking(tokenizer)), read_examples(data, Chunking(tokenizer)))


WITHOUT_GUARD = """
import sys
from pathlib import Path
from jaxprefix.data import token_cache
from jaxprefix.data.examples import Chunking
from jaxprefix.tokenizer import load_tokenizer
from tests.base_folders import GOLDEN_BASE

token_cache.CACHED_BYTES = 1
token_cache.load_examples(Path(sys.argv[1]), Chunking(load_tokenizer(GOLDEN_BASE)))
"""


@pytest.mark.parametrize("from_file", [True, False])
def test_a_program_that_its_helpers_would_run_again_is_told(data, tmp_path, from_file):
    (script := tmp_path / "script.py").write_text(WITHOUT_GUARD)
    command = [sys.executable, script if from_file else "-", data]
    environment, program = os.environ | {"PYTHONPATH": os.getcwd()}, "" if from_file else WITHOUT_GUARD
    options = {"env": environment, "input": program, "capture_output": True, "text": True, "timeout": PATIENCE}
    result = subprocess.run(command, **options)
    assert result.returncode == 1
    assert ("put it under `if __name__ == '__main__':`" if from_file else "<stdin>") in result.stderr
    assert "RunError: a tokenizing process ended early: it has printed why" in result.stderr


def test_a_helper_that_runs_the_program_again_ends(data, tokenizer, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InputError, match="put it under `if __name__ == '__main__':`"):
        load_examples(data, Chunking(tokenizer))


WAITING_FOREVER = """
import sys, time
from pathlib import Path
from jaxprefix.data import token_cache
from jaxprefix.data.examples import Chunking
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


def killed(block):
    os._exit(9)


def test_a_helper_that_is_killed_is_told(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "_tokenize_block", killed)
    with pytest.raises(RunError, match="a tokenizing process ended early"):
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


@pytest.mark.parametrize(
    ("limit", "n_cores"),
    [("max 100000", 128), ("400000 100000", 4), ("50000 100000", 1), ("99900000 100000", 128)],
)
def test_a_containers_share_of_the_cores_counts(monkeypatch, limit, n_cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(Path, "read_text", lambda _: limit)
    assert token_cache._n_cores() == n_cores


def test_a_system_that_does_not_tell_a_processs_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(Path, "read_text", lambda _: raising(FileNotFoundError()))
    assert token_cache._n_cores() == 3


def test_who_waits_for_another_says_so(monkeypatch, capfd):
    asked = []

    def flock(file, how):
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.flock", flock)
    with token_cache._entry_lock(token_cache.cache_folder() / "tokens" / "entry"):
        assert "another process is tokenizing the same file; waiting for it" in capfd.readouterr().err
    assert len(asked) == 2


def test_ctrl_c_is_for_the_main_process_alone(data, tmp_path, monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(token_cache.threading, "Thread", Mock())
    (tmp_path / "job").write_bytes(pickle.dumps((data, None)))
    token_cache._prepare(tmp_path / "job")
    assert handlers == {signal.SIGINT: signal.SIG_IGN}


def test_helpers_make_no_threads_of_their_own(data, tokenizer, monkeypatch):
    """A thread for each core in each of them exceeds what clusters allow a user."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    seen, submit = [], concurrent.futures.ProcessPoolExecutor.submit

    def submitted(pool, *work):
        seen.extend(submit(pool, os.getenv, f"{name}_NUM_THREADS") for name in ("OPENBLAS", "OMP", "RAYON"))
        return submit(pool, *work)

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", submitted)
    load_examples(data, Chunking(tokenizer))
    assert [future.result() for future in seen[:3]] == ["1", os.environ.get("OMP_NUM_THREADS", "1"), "3"]
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    assert not multiprocessing.active_children(), "one that starts late would miss its job's file"
