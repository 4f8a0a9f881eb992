"""Large data files are tokenized once, by all cores, and kept in the user's cache folder. No jax in here.

A cache entry is a folder named by what went into it: tokens.bin (all ids), ends.npy and prompt_lengths.npy as in
`Examples`, about.json. It appears whole or not at all.
"""

import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from convert.errors import InputError
from jaxprefix.config import cache_folder
from jaxprefix.examples import Chunking, Examples, make_examples, read_examples

FORMAT = 1
"""Raised when examples change that the same file and settings make."""
CACHED_BYTES = 2**22
"""Smaller files are tokenized anew each time: that takes a second or two."""
RANGE_BYTES = 2**22
"""What a process tokenizes at a time."""


def load_examples(path: Path, chunking: Chunking) -> Examples:
    """Return what `read_examples` does, from the cache if the same file and settings have been there before.

    Large files are mapped into memory, not read. Raises InputError, also when the cache cannot be written.
    """
    if not path.is_file() or path.stat().st_size < CACHED_BYTES:
        return read_examples(path, chunking)
    folder = cache_folder() / "tokens" / _key(path, chunking)
    try:
        if (examples := _open(folder)) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
                _tokenize(path, chunking, Path(unfinished))
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                _move(Path(unfinished), folder)
            examples = _open(folder)
    except OSError as error:
        advice = "XDG_CACHE_HOME names another place"
        raise InputError(f"{folder}: the token cache cannot be written ({error.strerror}); {advice}") from error
    if not examples:
        raise InputError(f"{path}: holds no example")
    return examples


def _key(path: Path, chunking: Chunking) -> str:
    tokenizer, *settings = chunking
    with path.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (FORMAT, contents, tokenizer.fingerprint, *settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _open(folder: Path) -> Examples | None:
    """Map an entry into memory; None if there is none, or its files do not fit together."""
    try:
        about = json.loads((folder / "about.json").read_text())
        ends, prompt_lengths = (np.load(folder / f"{name}.npy") for name in ("ends", "prompt_lengths"))
        tokens = np.memmap(folder / "tokens.bin", about["dtype"], mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    sizes = [len(tokens), len(ends), len(prompt_lengths)]
    if sizes != [about["n_tokens"], about["n_examples"], about["n_examples"]] or ends[-1:].sum() != len(tokens):
        return None
    return Examples(tokens, ends, prompt_lengths)


def _move(unfinished: Path, folder: Path) -> None:
    """Give a finished entry its name; another process may have been first with the same."""
    finished = unfinished / "entry"
    try:
        finished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tokenize(path: Path, chunking: Chunking, unfinished: Path) -> None:
    """Tokenize a file with all cores into unfinished/entry, range by range in the file's order."""
    entry = unfinished / "entry"
    entry.mkdir()
    started, size, n_cores = time.monotonic(), path.stat().st_size, len(os.sched_getaffinity(0))
    print(f"tokenizing {path} with {n_cores} processes; the result is kept in {cache_folder()}", file=sys.stderr)
    dtype = np.dtype(np.uint16 if chunking.tokenizer.vocab_size <= 2**16 else np.uint32)
    ends, prompt_lengths, n_tokens, n_lines = [], [], 0, 0
    progress = Progress(console=Console(stderr=True), transient=True)
    bar = progress.add_task("tokenizing", total=size)
    with (entry / "tokens.bin").open("wb") as file, progress:
        for (begin, end), part in _in_order(path, chunking, n_cores):
            if part is None:  # an error, raised again with the line's number in the file
                _examples_between(path, begin, end, n_lines + 1, chunking)
                raise RuntimeError(f"{path}: bytes {begin} to {end} failed once, but not again")
            tokens, part_ends, part_prompts, part_lines = part
            file.write(tokens.astype(dtype).tobytes())
            ends.append(part_ends + n_tokens)
            prompt_lengths.append(part_prompts)
            n_tokens, n_lines = n_tokens + len(tokens), n_lines + part_lines
            progress.update(bar, completed=end)
    np.save(entry / "ends.npy", np.concatenate(ends))
    np.save(entry / "prompt_lengths.npy", np.concatenate(prompt_lengths))
    about = {"n_tokens": n_tokens, "n_examples": sum(map(len, ends)), "dtype": dtype.str}
    (entry / "about.json").write_text(json.dumps(about))
    seconds = time.monotonic() - started
    print(f"tokenized in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s", file=sys.stderr)


Part = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def _in_order(path: Path, chunking: Chunking, n_processes: int) -> Iterator[tuple[tuple[int, int], Part | None]]:
    """Yield every range of a file with what a process made of it: tokens, ends, prompt lengths, lines."""
    processes = concurrent.futures.ProcessPoolExecutor(
        n_processes, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(path, chunking)
    )
    with processes:
        pending: deque[tuple[tuple[int, int], concurrent.futures.Future[Part | None]]] = deque()
        for begin, end in _ranges(path):
            pending.append(((begin, end), processes.submit(_tokenize_range, begin, end)))
            if len(pending) > 2 * n_processes:
                where, part = pending.popleft()
                yield where, part.result()
        yield from ((where, part.result()) for where, part in pending)


def _ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Yield byte ranges of about RANGE_BYTES that end with a line."""
    begin, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while begin < size:
            file.seek(min(begin + RANGE_BYTES, size))
            file.readline()
            yield begin, file.tell()
            begin = file.tell()


_job: tuple[Path, Chunking]


def _prepare(path: Path, chunking: Chunking) -> None:
    """Give a process what all its ranges need."""
    global _job
    _job = path, chunking
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its helpers


def _tokenize_range(begin: int, end: int) -> Part | None:
    """Return a range's arrays and number of lines; None if one of its lines is bad."""
    path, chunking = _job
    try:
        examples, n_lines = _examples_between(path, begin, end, 1 if begin == 0 else 2, chunking)
    except InputError:
        return None
    return *examples.arrays, n_lines


def _examples_between(path: Path, begin: int, end: int, first_line: int, chunking: Chunking) -> tuple[Examples, int]:
    """Read a range's examples and count its lines."""
    with path.open("rb") as file:
        file.seek(begin)
        lines = io.BytesIO(file.read(end - begin)).readlines()
    return Examples.of(make_examples(lines, path, first_line, chunking)), len(lines)
