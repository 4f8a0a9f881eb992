"""What can end a run early, with an error that explains it: signals, numbers that are not finite, the disk."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from convert.errors import RunError
from jaxprefix.config import TrainConfig
from jaxprefix.machine.devices import half_type
from jaxprefix.run.checkpoint import CHECKPOINTS, newest_checkpoint
from jaxprefix.run.description import CONFIG_FILE
from jaxprefix.run.orbax_errors import SaveError, short_reason

MOST_SKIPPED = 20
"""Most updates that float16 may skip in a row: after so many halvings, the loss scale is not the cause."""
ONE_SIGNAL = 1.0
"""Signals within this many seconds count as one."""


class StopRequest:
    """Holds the signal that asked the run to end, once there is one."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal(config: TrainConfig) -> Iterator[StopRequest]:
    """Note the first SIGINT, SIGTERM or SIGHUP; the same one again, or SIGINT, ends the run at once, with RunError.

    A launcher may pass on a signal that this process has already received with its process group, so a signal within
    ONE_SIGNAL seconds of the first counts as the same. SIGTERM after SIGINT, as batch systems send them, does not end
    the run at once. SIGHUP is left alone where `nohup` has switched it off. Python delivers signals to the main thread
    only: in any other thread, nothing is noted.
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
        elif number in (stop.received, signal.SIGINT) and time.monotonic() - noted_at > ONE_SIGNAL:
            raise KeyboardInterrupt

    noted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        noted.append(signal.SIGHUP)
    earlier = {number: signal.signal(number, handle) for number in noted}
    try:
        yield stop
    except KeyboardInterrupt as error:
        if jax.process_count() == 1:  # Python cannot exit cleanly during an update; with others, it might hang there
            jax.block_until_ready(jax.live_arrays())
        raise RunError(f"a second signal ended the run at once; {what_is_left(config)}") from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def within_disk(config: TrainConfig) -> Iterator[None]:
    """Turn errors of an open run's folder (disk full, read-only, removed) into RunError, with the cause attached."""
    try:
        yield
    except (OSError, SaveError) as error:
        check_still_there(config)
        if isinstance(error, SaveError):
            raise
        where = os.fsdecode(getattr(error, "filename", None) or config.run_dir)
        raise RunError(f"{where}: cannot be written ({short_reason(error)}); {what_is_left(config)}") from error


def what_is_left(config: TrainConfig, resumable: bool = True) -> str:
    """Say what a run that ended early can be resumed from; one that is not `resumable` would end the same way."""
    newest = newest_checkpoint(config.run_dir / CHECKPOINTS)
    if newest is None:
        return "the run has no checkpoint"
    then = "--resume goes on from it" if resumable else "but --resume would come to the same update"
    return f"the last good checkpoint is {config.run_dir / CHECKPOINTS / str(newest)}, {then}"


def check_still_there(config: TrainConfig) -> None:
    """Raise RunError if the run's folder is gone; writing would recreate only part of it."""
    if not (config.run_dir / CONFIG_FILE).is_file():
        raise RunError(f"{config.run_dir}: vanished while the run was going on; nothing of it is left to resume")


def less_memory(config: TrainConfig) -> str:
    """Say which flags take less memory: those that this run can be resumed with, and those that need a new run."""
    same_run = ["--remat block"] if config.compute.remat != "block" else []
    same_run.append("more devices with --mesh fsdp=N")
    new_run = [f"a --batch_size below {config.batch_size} (with more --n_accum_steps, for as many examples per update)"]
    new_run.append(f"a --max_seq_len below {config.max_seq_len}")
    new_run += [f"--dtype {half_type()}"] if config.dtype == "float32" else []
    return (
        f"this run can use {' or '.join(same_run)}, a new one also {', '.join(new_run)}. `jaxprefix check` with the "
        f"same flags reports what an update needs; {what_is_left(config)}"
    )


class FiniteGuard:
    """Ends a run whose loss or gradient is not finite; float16 may skip up to MOST_SKIPPED such updates in a row."""

    def __init__(self, config: TrainConfig, n_skipped: int):
        self._config = config
        self.n_skipped = n_skipped
        """Updates skipped in a row so far."""

    def fault(self, update: int, loss: float, gradient_norm: float) -> str | None:
        """Note an update's outcome; return why it ends the run, None if it does not."""
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
