"""One run of many processes, one or more per host: how they agree, and stop together, once joined (`joining.py`).

Every process makes the same updates on its own devices. The first one writes all files but the checkpoints, which all
write together, so they must share the folder of runs. A run of one process asks and waits for nobody.
"""

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from convert.errors import InputError, PlainError, RunError
from jaxprefix.machine.screen import tell

PATIENCE_SECONDS = 3600
"""How long the others wait for a process that is busy with something slow, like downloading the base model."""
LEAVE_SECONDS = 5
"""How long a process that failed waits for the others to fail, too."""
VISIBLE_SECONDS = 60
"""How long a network file system may hide a file that another host wrote."""

Result = TypeVar("Result")


def is_first() -> bool:
    """Tell whether this is the first process, which writes the files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait at a barrier for all processes. Raises RunError if some do not reach it within PATIENCE_SECONDS."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # imported late: decoding does not need it

    try:
        with ended_by_ctrl_c():
            multihost.get_barrier_sync_fn()(key=f"jaxprefix {name}", timeout_ms=1000 * PATIENCE_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise RunError(f"{name}: not all processes reached this step within {PATIENCE_SECONDS} seconds") from error


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end this process while it waits in JAX's code, where Python does not notice it.

    Where signals are only noted, as during updates, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def barrier_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Wait for all processes in Orbax's thread, unless an exception is being handled.

    After a failed save, Orbax waits at one more barrier, which the others never reach: the save's error would appear
    only with that barrier's timeout.
    """
    if sys.exc_info()[0] is None:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def agree(name: str, attempt: Callable[[], Result]) -> Result:
    """Run `attempt` on every process. Where it fails, its own error is raised; on all others, InputError.

    `name` says, in the others' error, what was attempted; it also names the barrier, so no two calls may share it.
    """
    if jax.process_count() == 1:
        return attempt()
    failure = None
    try:
        result = attempt()
    except (PlainError, OSError) as error:
        failure = error
    try:
        wait_for_all(name)
    except (RunError, jax.errors.JaxRuntimeError):
        if failure is not None:
            raise failure from None
        raise
    failed = multihost_utils.process_allgather(np.array(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        raise InputError(f"process {int(np.argmax(failed))} cannot {name}; its own error tells why")
    return result


def agree_first(name: str, attempt: Callable[[], object]) -> None:
    """Run `attempt` on the first process alone; if it fails there, the others raise InputError."""
    agree(name, lambda: attempt() if is_first() else None)


def broadcast_from_first(value: np.ndarray | bool) -> np.ndarray:
    """Return the first process's value on all processes, e.g. from a file that other hosts see a little later."""
    value = np.asarray(value)
    return value if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(value))


def check_same(settings: Mapping[str, Any]) -> None:
    """Check that this process has the same settings as the first one; all processes call it together.

    Processes that differ could train on a mixture, or wait for each other forever. Raises an InputError that names the
    settings that differ.
    """
    if jax.process_count() == 1:
        return
    own = json.dumps(settings).encode()
    size = int(broadcast_from_first(np.array(len(own), np.int32)))
    cut = np.frombuffer(own[:size].ljust(size), np.uint8)  # only the first process's content counts
    first = json.loads(broadcast_from_first(cut).tobytes())
    differing = [name for name in {**settings, **first} if first.get(name) != settings.get(name)]
    if differing:
        told = [f"{name}: {first.get(name)!r} on process 0, {settings.get(name)!r} here" for name in differing]
        raise InputError.all("the settings here differ from those of process 0:", told)


def anywhere(flag: bool) -> bool:
    """Tell whether a flag is set on any process; all processes get the same answer."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def wait_until_visible(path: Path) -> None:
    """Wait until this process sees a file that the first one wrote. Raises InputError if that takes too long."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{path}: process {jax.process_index()} does not see what process 0 wrote; --output_dir must be a "
                "folder that all hosts share"
            )
        time.sleep(0.2)


def check_shared(folder: Path) -> None:
    """Check that all processes see the same folder, by a file that the first one makes there. Raises InputError."""
    if jax.process_count() == 1:
        return
    mark = folder / f".shared-{int(broadcast_from_first(np.array(secrets.randbits(31), np.int32)))}"

    def look() -> None:
        if is_first():
            mark.touch()
        wait_until_visible(mark)

    try:
        agree("see the folder of all runs", look)
    finally:
        if is_first():
            mark.unlink(missing_ok=True)


def leave_soon(exit_code: int) -> None:
    """Within LEAVE_SECONDS, end a process that failed alone: on exit, JAX would wait for the others, then abort it."""
    if jax.distributed.is_initialized():
        timer = threading.Timer(LEAVE_SECONDS, os._exit, [exit_code])
        timer.daemon = True
        timer.start()


def end_at_once(error: PlainError) -> None:
    """End the program from a background thread: the main one waits where it cannot be interrupted."""
    tell(f"error: {error}")
    os._exit(error.exit_code)


def spread(arrays: Any, sharding: Sharding) -> Any:
    """Turn arrays that every process holds whole into global arrays over all processes' devices.

    With several hosts, `jax.device_put` would gather each array from all processes, to compare them.
    """
    if jax.process_count() == 1:
        return jax.device_put(arrays, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, np.asarray(a).__getitem__), arrays)


class Verdict(NamedTuple):
    """What all processes do after an update."""

    save: bool = False
    """Save a checkpoint."""
    stop: Signals | None = None
    """Save a checkpoint and stop, because of this signal."""


class Vote:
    """Makes one process's wish, to save or to stop, every process's action after the same update.

    The devices gather the votes after each update. The outcome is read one update later, when the loop has waited for
    the earlier update anyway, so that voting costs no time.
    """

    def __init__(self, mesh: Mesh):
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._latest: jax.Array | None = None

    def cast(self, wish: Verdict) -> Verdict:
        """Vote after an update; return what to do now, the same on every process."""
        if jax.process_count() == 1:
            return wish
        number = int(wish.save) if wish.stop is None else 1 + wish.stop  # the highest wins: any signal beats saving
        votes = np.full(self._split.mesh.size, number, np.int32)
        earlier, self._latest = self._latest, self._highest(spread(votes, self._split))
        highest = 0 if earlier is None else int(earlier)
        return Verdict(highest == 1, Signals(highest - 1) if highest > 1 else None)


class Watchdog:
    """Ends this process when it makes no progress for long because another one hangs: collectives wait forever.

    Used as a context manager, entered just before the prefix is started; in a run of one process it does nothing. A
    process that died or froze is noticed earlier, by its missing heartbeat; this is for one that is alive but stuck.
    """

    def __init__(self, minutes: float):
        self._minutes = minutes
        self._seen = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def still_going(self) -> None:
        """Note that the run goes on."""
        self._seen = time.monotonic()

    def _watch(self) -> None:
        limit = 60 * self._minutes
        while not self._ended.wait(min(limit / 10, 60)):
            if time.monotonic() - self._seen > limit:
                what = f"no start, update, evaluation or checkpoint ended within {self._minutes:g} minutes"
                end_at_once(RunError(f"{what}: a process hangs, or --stall_minutes is too short"))
