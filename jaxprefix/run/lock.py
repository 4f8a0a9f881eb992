"""Who may write to the folder of a run: one process at a time."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from convert.errors import InputError
from jaxprefix.config import TrainConfig
from jaxprefix.machine.hosts import agree_first, check_shared
from jaxprefix.machine.screen import tell, warn

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
LEASE_SECONDS = 120
"""How long a file server may keep the locks of a host that has crashed: for NFSv4, 90 by default."""
ANOTHER = "another process"


@contextlib.contextmanager
def only_run(config: TrainConfig) -> Iterator[None]:
    """Let the first process lock the run's folder, if the run writes one; check that all processes see its parent."""
    with contextlib.ExitStack() as stack:
        if config.writes:
            lock = only_writer(config.run_dir, config.save_model)
            agree_first("lock the run's folder", lambda: stack.enter_context(lock))
            check_shared(config.run_dir.resolve().parent)
        yield


@contextlib.contextmanager
def only_writer(folder: Path, checkpoints: bool = True) -> Iterator[None]:
    """Hold a lock beside a run's folder, `.NAME.lock`, which the system releases however this process ends.

    Waits LEASE_SECONDS for a process of another host. Raises InputError that names the process holding the lock, or
    when the lock's file cannot be written. A file system without locks cannot take `checkpoints`, either, which is an
    InputError; if there are to be none, warns and goes on without a lock.
    """
    path = folder.resolve()
    path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _awaited(path, checkpoints)
    except BlockingIOError as error:
        advice = f"wait for it or choose another --save_name (its lock is {path})"
        raise InputError(f"{folder}: is in use by {_owner(path)}; {advice}") from error
    except FileExistsError as error:
        raise InputError(f"{path.parent}: cannot be written (Not a directory)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that has become read-only keeps the file, unlocked
                path.unlink()


def _owner(path: Path) -> str:
    """Return who holds a lock, as its file says; that process may be ending, or not have written it yet."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or ANOTHER
    return ANOTHER


def _awaited(path: Path, checkpoints: bool) -> IO[str]:
    """Open and lock the lock's file as `_locked` does, waiting for a while if another host holds it."""
    deadline = None
    while True:
        try:
            return _locked(path, checkpoints)
        except BlockingIOError:
            owner, now = _owner(path), time.monotonic()
            if owner == ANOTHER or owner.endswith(f" on {socket.gethostname()}") or (deadline and now > deadline):
                raise
            if deadline is None:
                deadline = now + LEASE_SECONDS
                what = f"{path} is held by {owner}; waiting up to {LEASE_SECONDS} s, since that host may have crashed"
                tell(what)
        time.sleep(1)


def _locked(path: Path, checkpoints: bool) -> IO[str]:
    """Open the lock's file, lock it, and write into it who holds it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            locked = _lock(file)
        except OSError:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # its former owner removed it between opening and locking
    if not locked and checkpoints:
        path.unlink()
        file.close()
        advice = "choose one on another disk (to train without, --no_save_model)"
        raise InputError(f"{path.parent}: does not support file locks, which checkpoints need; {advice}")
    if not locked:
        warn(f"{path.parent}: does not support file locks, so a second run of that name goes unnoticed")
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


def _lock(file: IO[str]) -> bool:
    """Lock a file; return False on a file system without locks. Raises OSError if another process holds it.

    lockf does not keep two runs of one process apart, so flock is tried first. Without lockf, TensorStore writes no
    checkpoints.
    """
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return False
