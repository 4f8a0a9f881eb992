"""What can end a run before its time, told plainly: signals, numbers that are not finite, the disk."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from convert.errors import RunError
from jaxprefix.checkpoint import SaveError, newest_checkpoint, short_reason
from jaxprefix.config import TrainConfig
from jaxprefix.run_folder import CHECKPOINTS, CONFIG_FILE

MOST_SKIPPED = 20
"""Updates that float16 may skip in a row: after so many halvings the scale of the loss is not what overflows."""
ONE_SIGNAL = 1.0
"""Seconds within which two signals are one."""


class StopRequest:
    """The signal that asked the run to end, once one has."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal(config: TrainConfig) -> Iterator[StopRequest]:
    """Note the first SIGINT, SIGTERM or SIGHUP; the second one ends the run at once. Raises RunError then.

    A launcher may pass on what its process group was sent as well, so one that follows within ONE_SIGNAL seconds is the
    same. SIGHUP is left alone where `nohup` has switched it off. Outside of a program's main thread Python hands out no
    signals: nothing is noted there.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    noted_at = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal noted_at
        if stop.received is None:
            stop.received, noted_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - noted_at > ONE_SIGNAL:
            raise KeyboardInterrupt

    noted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        noted.append(signal.SIGHUP)
    earlier = {number: signal.signal(number, handle) for number in noted}
    try:
        yield stop
    except KeyboardInterrupt as error:
        if jax.process_count() == 1:  # Python cannot end well while an update goes on; another process may hang in it
            jax.block_until_ready(jax.live_arrays())
        raise RunError(f"a second signal ended the run at once; {what_is_left(config)}") from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def within_disk(config: TrainConfig) -> Iterator[None]:
    """Turn what can happen to an open run's folder (full, read-only, removed) into RunError, with the cause attached.

    Meanwhile, what other libraries' threads would print about it is cut to a line. After a failure their loggers stay
    silent: Orbax may leave threads behind that fail in their turn while Python ends.
    """
    thread_hook, hook = threading.excepthook, sys.unraisablehook

    def leave_out_closed_loops(failure: Any) -> None:
        """Drop "Event loop is closed": if one array cannot be written, TensorStore reports the others to Orbax's loop.

        While that is still open, asyncio's logger reports them, hence its level.
        """
        if str(failure.exc_value) != "Event loop is closed":
            hook(failure)

    threading.excepthook, sys.unraisablehook = warn_of_thread, leave_out_closed_loops
    levels = {logger: logger.level for logger in map(logging.getLogger, ["absl", "asyncio"])}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
        sys.unraisablehook = hook
        for logger, level in levels.items():
            logger.setLevel(level)
    except (OSError, SaveError) as error:
        # what Orbax had not begun to write, told whenever garbage is collected next
        warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
        check_still_there(config)
        if isinstance(error, SaveError):
            raise
        where = os.fsdecode(getattr(error, "filename", None) or config.run_dir)
        raise RunError(f"{where}: cannot be written ({reason(error)}); {what_is_left(config)}") from error
    finally:
        threading.excepthook = thread_hook


def warn_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Say in one line that a thread failed: those that write in the background fail in the loop, too, where it ends."""
    print(f"WARNING: in the background: {reason(failure.exc_value)}", file=sys.stderr, flush=True)


def reason(error: BaseException | None) -> str:
    """Return the system's own words, or the beginning of what an error says."""
    return getattr(error, "strerror", None) or short_reason(error)


def what_is_left(config: TrainConfig) -> str:
    """Tell what a run that ended early can be resumed from."""
    newest = newest_checkpoint(config.run_dir / CHECKPOINTS)
    if newest is None:
        return "the run has no checkpoint"
    return f"the last good checkpoint is {config.run_dir / CHECKPOINTS / str(newest)}, --resume goes on from it"


def check_still_there(config: TrainConfig) -> None:
    """Raise RunError when the run's folder is gone, instead of making half of it again."""
    if not (config.run_dir / CONFIG_FILE).is_file():
        raise RunError(f"{config.run_dir}: vanished while the run was going on; nothing of it is left to resume")


def less_memory(config: TrainConfig) -> str:
    """Tell which flags of a run need less memory: those that it can be resumed with, and those of a new one."""
    same_run = ["--remat block"] if config.compute.remat != "block" else []
    same_run.append("more devices with --mesh fsdp=N")
    new_run = [f"a --batch_size below {config.batch_size} (with more --n_accum_steps, for updates of as many)"]
    new_run.append(f"a --max_seq_len below {config.max_seq_len}")
    new_run += ["--dtype bfloat16"] if config.dtype == "float32" else []
    return (
        f"this run can take {' or '.join(same_run)}, a new one also {', '.join(new_run)}. `jaxprefix check` with the "
        f"same flags tells what an update needs. For this run, {what_is_left(config)}"
    )


class FiniteGuard:
    """Ends a run whose loss or gradient is not finite; float16 may skip such updates, MOST_SKIPPED in a row."""

    def __init__(self, config: TrainConfig, n_skipped: int):
        self._config = config
        self.n_skipped = n_skipped
        """Updates skipped in a row up to now."""

    def fault(self, update: int, loss: float, gradient_norm: float) -> str | None:
        """Take in what came out of an update; say what ends the run, if it does."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.n_skipped = 0
            return None
        self.n_skipped += 1
        what = f"update {update}: the loss is {loss:.4g}, the norm of its gradient {gradient_norm:.4g}"
        if self._config.dtype == "float16":
            if self.n_skipped <= MOST_SKIPPED:
                return None
            what += f", and float16 has skipped the {MOST_SKIPPED} updates before; try --dtype bfloat16"
        return what
