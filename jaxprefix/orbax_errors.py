"""What Orbax and TensorStore say of a disk that fails, kept short: the run's own error says it, and what is left.

Their threads, event loops and loggers would each print pages. What other code of the process says stays as it is.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from convert.errors import RunError

REASON_CHARACTERS = 200
"""Most characters of another library's error that a message repeats."""
LOGGERS = ("absl", "asyncio")
"""Orbax's own, and that of its event loops."""


@contextlib.contextmanager
def orbax_kept_short() -> Iterator[None]:
    """Reduce an error in a thread of Orbax's to one line, and leave out what it logs.

    After OSError or RunError that stays so: Orbax may leave threads behind that fail while Python ends.
    """
    thread_hook, unraisable_hook = threading.excepthook, sys.unraisablehook
    loggers = [logging.getLogger(name) for name in LOGGERS]

    def shorten(failure: threading.ExceptHookArgs) -> None:
        """Say it in one line: the training loop meets the same failure, and ends the run."""
        if _is_orbax("".join(traceback.format_exception(failure.exc_value))):
            reason = short_reason(failure.exc_value)
            print(f"WARNING: a background thread failed: {reason}", file=sys.stderr, flush=True)
        else:
            thread_hook(failure)

    def leave_out_closed_loops(failure: Any) -> None:
        """If one array cannot be written, TensorStore reports the others to Orbax's event loop, which has ended."""
        if str(failure.exc_value) != "Event loop is closed":
            unraisable_hook(failure)

    def is_of_others(record: logging.LogRecord) -> bool:
        return not _is_orbax(f"{record.pathname}\n{logging.Formatter().format(record)}")

    threading.excepthook, sys.unraisablehook = shorten, leave_out_closed_loops
    for logger in loggers:
        logger.addFilter(is_of_others)
    failed = False
    try:
        with _no_handler_by_absl():
            yield
    except (OSError, RunError):
        failed = True
        # Python warns of what Orbax had not begun to write whenever it next collects garbage
        warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
        raise
    finally:
        if not failed:
            if threading.excepthook is shorten:  # another run, in a thread, may have put its own in front
                threading.excepthook = thread_hook
            if sys.unraisablehook is leave_out_closed_loops:
                sys.unraisablehook = unraisable_hook
            for logger in loggers:
                logger.removeFilter(is_of_others)


def _is_orbax(text: str) -> bool:
    """Tell whether a traceback or log record is of Orbax or TensorStore."""
    return re.search(r"/orbax/|\[(tensorstore_spec|os_error_code)=", text) is not None


@contextlib.contextmanager
def _no_handler_by_absl() -> Iterator[None]:
    """Keep absl, with which Orbax logs, from calling `logging.basicConfig` where the root logger has no handler.

    The caller's own call of it would then do nothing, and loggers with handlers would print everything twice. Python's
    handler of last resort stands in: it prints what would be printed anyway.
    """
    stand_in = None if logging.root.handlers else logging.lastResort
    if stand_in is not None:
        logging.root.addHandler(stand_in)
    try:
        yield
    finally:
        if stand_in is not None:
            logging.root.removeHandler(stand_in)


def short_reason(error: BaseException | None) -> str:
    """Return the system's message for an error, if it is the system's, else the start of its text.

    TensorStore's text fills pages, with the system's number in it.
    """
    if strerror := getattr(error, "strerror", None):
        return strerror
    if code := re.search(r"\[os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]}…"
