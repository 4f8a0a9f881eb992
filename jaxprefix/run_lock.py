"""Who may write to the folder of a run: one process at a time."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from convert.errors import InputError
from jaxprefix.config import TrainConfig
from jaxprefix.hosts import agree_first, check_shared

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


def lock_shared_folder(config: TrainConfig, stack: contextlib.ExitStack) -> None:
    """Let the first process lock the run's folder until the stack is closed; check that all see its parent folder."""
    if config.writes:
        agree_first("lock the run's folder", lambda: stack.enter_context(only_writer(config.run_dir)))
        check_shared(config.run_dir.resolve().parent)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock beside a run's folder, `.NAME.lock`, which the system releases however this process ends.

    Raises InputError that names the process which holds it, or when it cannot be made. On a file system without locks,
    warns and goes on without one.
    """
    path = folder.resolve()
    path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except BlockingIOError as error:
        owner = "another process"
        with contextlib.suppress(OSError):  # that process may end at this moment
            owner = path.read_text(encoding="utf-8").strip() or owner
        advice = f"wait for it or choose another --save_name (its lock is {path})"
        raise InputError(f"{folder}: is in use by {owner}; {advice}") from error
    except FileExistsError as error:
        raise InputError(f"{path.parent}: cannot be written (Not a directory)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that has become read-only keeps it, unlocked
                path.unlink()


def _locked(path: Path) -> IO[str]:
    """Open the lock's file, lock it, and write into it who holds it."""
    while True:
        file, locked = path.open("a+", encoding="utf-8"), True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # its former owner removed it between opening and locking
    if not locked:
        print(
            f"WARNING: {path.parent}: does not support file locks, so a second run of that name goes unnoticed",
            file=sys.stderr,
        )
    file.truncate(0)
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk
        path.unlink()
        with contextlib.suppress(OSError):  # closing fails for the same reason
            file.close()
        raise
    return file
