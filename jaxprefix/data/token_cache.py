"""Large data files are tokenized once, by all cores; the user's cache folder keeps their tokens.

A cache entry is a folder named by a checksum of what went into it, with tokens.bin (all ids), `OF_EXAMPLES` and
about.json. It appears whole or not at all.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from convert.errors import InputError, RunError
from jaxprefix.data.examples import Chunking, Examples, Tally, make_examples, not_empty, read_examples
from jaxprefix.data.lines import read_lines, sha256_of
from jaxprefix.machine.screen import tell
from jaxprefix.machine.user_cache import OTHER_CACHE, cache_folder

FORMAT = 4
"""Raise this when the same file and settings make other examples than before."""
OF_EXAMPLES = ("ends", "prompt_lengths", "line_numbers")
"""Files of an entry with a number for each example, as in `Examples`."""
CACHED_BYTES = 2**22
"""Smaller files are tokenized on every run, in a second or two. Compressed files count eightfold."""
BLOCK_BYTES = 2**22
"""How much a process tokenizes at a time."""
ABANDONED_SECONDS = 600
"""Unfinished entries untouched for this long are abandoned: the process that makes one writes every few seconds."""


def load_examples(path: Path, chunking: Chunking) -> Examples:
    """Return what `read_examples` does, from the cache if the same file was read with the same settings before.

    Large files are mapped into memory, not read. Raises InputError, also when the cache cannot be written, and
    RunError when a process that tokenizes is killed.
    """
    if not path.is_file() or path.stat().st_size * (8 if path.suffix == ".gz" else 1) < CACHED_BYTES:
        return read_examples(path, chunking)
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own test for this
        raise InputError("a helper process runs the whole program again; put it under `if __name__ == '__main__':`")
    folder = cache_folder() / "tokens" / _key(path, chunking)
    try:
        if (examples := _open(folder)) is None:
            with _entry_lock(folder):
                if (examples := _open(folder)) is None:
                    examples = _make(path, chunking, folder)
    except OSError as error:
        raise InputError(f"{folder}: the token cache cannot be written ({error.strerror}); {OTHER_CACHE}") from error
    return not_empty(examples, path)


def _make(path: Path, chunking: Chunking, folder: Path) -> Examples:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
        _tokenize(path, chunking, Path(unfinished))
        if _key(path, chunking) != folder.name:
            raise InputError(f"{path}: changed while it was being tokenized; wait until it is complete")
        if _open(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        _move(Path(unfinished), folder)
    if (examples := _open(folder)) is None:
        raise InputError(f"{folder}: what was just written there cannot be read; {OTHER_CACHE}")
    return examples


def _remove_abandoned(tokens: Path) -> None:
    """Remove what killed processes have left unfinished."""
    for unfinished in tokens.glob("unfinished-*"):
        with contextlib.suppress(OSError):  # it may be finished at this moment
            newest = max(path.stat().st_mtime for path in (unfinished, *unfinished.rglob("*")))
            if time.time() - newest > ABANDONED_SECONDS:
                shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _entry_lock(folder: Path) -> Iterator[None]:
    """Hold a lock on an entry, so that only one process makes it; without effect on a file system without locks."""
    path = cache_folder() / "locks" / folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another process is tokenizing the same file; waiting for it ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(path: Path, chunking: Chunking) -> str:
    tokenizer, *settings = chunking
    parts = (FORMAT, sha256_of(path), tokenizer.exact_fingerprint, *settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path) -> Examples | None:
    """Map an entry into memory; None if there is none, or its files do not fit together."""
    try:
        about = json.loads((folder / "about.json").read_text())
        of_examples = [
            np.load(folder / f"{name}.npy", mmap_mode="r" if name == "line_numbers" else None)  # seldom looked at
            for name in OF_EXAMPLES
        ]
        tokens = np.empty(0, np.uint16)
        if about["n_tokens"]:  # an empty file cannot be mapped
            tokens = np.memmap(folder / "tokens.bin", about["dtype"], mode="r")
        tally = Tally(*about["tally"])
        sizes = [about["n_tokens"], *[about["n_examples"]] * len(of_examples)]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    ends, prompt_lengths, line_numbers = of_examples
    if sizes != [len(tokens), *map(len, of_examples)] or ends[-1:].sum() != len(tokens):
        return None
    return Examples(tokens, ends, prompt_lengths, line_numbers, tally)


def _move(unfinished: Path, folder: Path) -> None:
    """Give a finished entry its name; where locks have no effect, another process may have made the same first."""
    finished = unfinished / "entry"
    try:
        finished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tokenize(path: Path, chunking: Chunking, unfinished: Path) -> None:
    """Tokenize a file with all cores into unfinished/entry, block by block in the file's order."""
    entry = unfinished / "entry"
    entry.mkdir()
    started, alone = time.monotonic(), multiprocessing.current_process().daemon  # a pool's worker may start no helpers
    n_cores = 1 if alone else _n_cores()
    tell(f"tokenizing {path} with {n_cores} process(es); the result is kept in {cache_folder()}")
    dtype = np.dtype(np.uint16 if chunking.tokenizer.vocab_size <= 2**16 else np.uint32)
    of_examples, n_tokens, n_bytes, tally = list[tuple[np.ndarray, ...]](), 0, 0, Tally()
    console = Console(stderr=True, force_jupyter=False)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    bar = progress.add_task("tokenizing", total=None if path.suffix == ".gz" else path.stat().st_size)
    parts = _one_by_one(path, chunking) if alone else _in_order(path, chunking, n_cores, unfinished / "job.pickle")
    with (entry / "tokens.bin").open("wb") as file, progress:
        for part_bytes, part in parts:
            tokens, ends, prompt_lengths, line_numbers = part.arrays
            file.write(tokens.astype(dtype).tobytes())
            of_examples.append((ends + n_tokens, prompt_lengths, line_numbers))
            n_tokens, tally, n_bytes = n_tokens + len(tokens), tally + part.tally, n_bytes + part_bytes
            progress.update(bar, completed=n_bytes)
    for name, arrays in zip(OF_EXAMPLES, zip(*of_examples, strict=True), strict=True):
        np.save(entry / f"{name}.npy", np.concatenate(arrays))
    n_examples = sum(len(ends) for ends, *_ in of_examples)
    about = {"n_tokens": n_tokens, "n_examples": n_examples, "dtype": dtype.str, "tally": tally}
    (entry / "about.json").write_text(json.dumps(about))
    seconds = time.monotonic() - started
    tell(f"tokenized in {seconds:.1f} s, {n_bytes / 1e6 / seconds:.1f} MB/s")


def _n_cores() -> int:
    """Return how many cores this process may use: a container's quota may allow fewer than it sees."""
    n_seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    with contextlib.suppress(OSError, ValueError):  # without a quota it says "max 100000"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(n_seen, quota // period))
    return n_seen


class Block(NamedTuple):
    """Some lines of a file."""

    first_line: int
    lines: list[bytes]
    n_bytes: int


def _blocks(path: Path) -> Iterator[Block]:
    """Yield a file's lines, about BLOCK_BYTES at a time."""
    first_line, lines, n_bytes = 1, list[bytes](), 0
    for line in read_lines(path):
        lines.append(line)
        n_bytes += len(line)
        if n_bytes >= BLOCK_BYTES:
            yield Block(first_line, lines, n_bytes)
            first_line, lines, n_bytes = first_line + len(lines), [], 0
    yield Block(first_line, lines, n_bytes)


def _one_by_one(path: Path, chunking: Chunking) -> Iterator[tuple[int, Examples]]:
    """Yield what `_in_order` does, made in this process."""
    for block in _blocks(path):
        yield block.n_bytes, make_examples(block.lines, path, block.first_line, chunking)


def _in_order(path: Path, chunking: Chunking, n_processes: int, job: Path) -> Iterator[tuple[int, Examples]]:
    """Yield, for every block of a file in order, its length and its examples, which a pool of processes makes.

    What all processes need reaches them through the file `job`: a pipe would block when full and not yet read.
    """
    job.write_bytes(pickle.dumps((path, chunking)))
    spawn = multiprocessing.get_context("spawn")
    with _start_errors():
        processes = concurrent.futures.ProcessPoolExecutor(n_processes, spawn, initializer=_prepare, initargs=(job,))
    with contextlib.ExitStack() as stack:
        stack.callback(processes.shutdown, cancel_futures=True)  # after an error nobody waits for the rest
        stack.enter_context(_one_thread_each())
        pending: deque[tuple[int, concurrent.futures.Future[Examples]]] = deque()
        for block in _blocks(path):
            with _start_errors():
                pending.append((block.n_bytes, processes.submit(_tokenize_block, block)))
            if len(pending) > 2 * n_processes:
                n_bytes, future = pending.popleft()
                yield n_bytes, _result_of(future)
        yield from ((n_bytes, _result_of(future)) for n_bytes, future in pending)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start here make no threads of their own: one per core in each of them exceeds users' limits.

    They take the settings from this process's environment; so do processes that other threads start meanwhile.
    """
    unset = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"} - os.environ.keys()
    os.environ |= dict.fromkeys(unset, "1")
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _start_errors() -> Iterator[None]:
    """Raise RunError where a process cannot be started: the caller takes OSError for a cache it cannot write."""
    try:
        yield
    except OSError as error:
        advice = "; is /dev/shm there and writable?" if error.errno in (errno.ENOENT, errno.EROFS, errno.EACCES) else ""
        raise RunError(f"a tokenizing process cannot be started ({error.strerror}){advice}") from error


def _result_of(future: concurrent.futures.Future[Examples]) -> Examples:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RunError(
            "a tokenizing process ended early: it has printed why (a script needs a file and a main guard), "
            "or was killed, perhaps for lack of memory"
        ) from error


_job: tuple[Path, Chunking]


def _prepare(job: Path) -> None:
    """Give a process what all its blocks need."""
    global _job
    _job = pickle.loads(job.read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its helpers
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """End this helper once the main process has been killed: its next block would never come."""
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _tokenize_block(block: Block) -> Examples:
    path, chunking = _job
    return make_examples(block.lines, path, block.first_line, chunking)
