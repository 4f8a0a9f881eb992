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


class SaveError(RunError):
    """A checkpoint cannot be saved."""


class _Hooks:
    """Stand in front of the process's hooks for errors in threads, and for those that nobody can catch."""

    def __init__(self) -> None:
        self._earlier = threading.excepthook, sys.unraisablehook
        threading.excepthook, sys.unraisablehook = self.shorten, self.leave_out_closed_loops

    def shorten(self, failure: threading.ExceptHookArgs) -> None:
        """Say in one line what Orbax's thread met: the training loop meets the same failure, and ends the run."""
        if _is_orbax("".join(traceback.format_exception(failure.exc_value))):
            reason = short_reason(failure.exc_value)
            print(f"WARNING: a background thread failed: {reason}", file=sys.stderr, flush=True)
        else:
            self._earlier[0](failure)

    def leave_out_closed_loops(self, failure: Any) -> None:
        """If one array cannot be written, TensorStore reports the others to Orbax's event loop, which has ended."""
        if str(failure.exc_value) != "Event loop is closed":
            self._earlier[1](failure)

    @property
    def in_front(self) -> bool:
        """Tell whether nobody has put others in front since."""
        return (threading.excepthook, sys.unraisablehook) == (self.shorten, self.leave_out_closed_loops)

    def remove(self) -> None:
        """Put the earlier hooks back."""
        if self.in_front:
            threading.excepthook, sys.unraisablehook = self._earlier


_lock, _n_open, _hooks = threading.Lock(), 0, list[_Hooks]()
"""Of all runs in this process, which threads may make at once."""


@contextlib.contextmanager
def orbax_kept_short() -> Iterator[None]:
    """Reduce an error in a thread of Orbax's to one line, and leave out what it logs.

    After OSError or SaveError that stays so: Orbax may leave threads behind that fail while Python ends.
    """
    global _n_open
    with _lock:
        _n_open += 1
        if not (_hooks and _hooks[-1].in_front):
            _hooks[:] = [_Hooks()]
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_of_others)
    failed = False
    try:
        with _no_handler_by_absl():
            yield
    except (OSError, SaveError):
        failed = True
        # Python warns of what Orbax had not begun to write whenever it next collects garbage
        warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
        raise
    finally:
        with _lock:
            _n_open -= 1
            if not (failed or _n_open):
                _hooks.pop().remove()
                for name in LOGGERS:
                    logging.getLogger(name).removeFilter(_is_of_others)


def _is_of_others(record: logging.LogRecord) -> bool:
    return not _is_orbax(f"{record.pathname}\n{logging.Formatter().format(record)}")


def _is_orbax(text: str) -> bool:
    """Tell whether a traceback or log record is of Orbax or TensorStore."""
    return re.search(r"/orbax/|\[(tensorstore_spec|os_error_code)=", text) is not None


class _StandIn(logging.Handler):
    """Prints what Python's handler of last resort would print if this one were not there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record that no other handler takes; the first of several stand-ins does so."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        handlers = list[logging.Handler]()
        while logger is not None:
            handlers += logger.handlers
            logger = logger.parent if logger.propagate else None
        alone = all(isinstance(handler, _StandIn) for handler in handlers) and handlers[0] is self
        if alone and logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


@contextlib.contextmanager
def _no_handler_by_absl() -> Iterator[None]:
    """Keep absl, with which Orbax logs, from calling `logging.basicConfig` where the root logger has no handler.

    A caller's own call of it would then do nothing ever after, and loggers with handlers would print everything twice.
    """
    stand_in = _StandIn()
    if all(isinstance(handler, _StandIn) for handler in logging.root.handlers):
        logging.root.addHandler(stand_in)
    try:
        yield
    finally:
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
