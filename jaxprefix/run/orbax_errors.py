"""What Orbax and TensorStore say of a failing disk, kept short: the run's own error reports it, and what is left.

Their threads, event loops and loggers would each print pages. What other code in the process says is left as it is.
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
from jaxprefix.machine.screen import warn

REASON_CHARACTERS = 200
"""Most characters of another library's error that a message repeats."""
LOGGERS = ("absl", "asyncio")
"""Orbax's own logger, and that of its event loops."""


class SaveError(RunError):
    """A checkpoint cannot be saved."""


class _Hooks:
    """Hooks in front of the process's own, for errors in threads and for errors that nobody can catch."""

    def __init__(self) -> None:
        self._earlier = threading.excepthook, sys.unraisablehook
        threading.excepthook, sys.unraisablehook = self.shorten, self.leave_out_closed_loops

    def shorten(self, failure: threading.ExceptHookArgs) -> None:
        """Say in one line what failed in Orbax's thread: the training loop meets the same failure, and ends the run."""
        if _is_orbax("".join(traceback.format_exception(failure.exc_value))):
            warn(f"a background thread failed: {short_reason(failure.exc_value)}")
        else:
            self._earlier[0](failure)

    def leave_out_closed_loops(self, failure: Any) -> None:
        """Leave out TensorStore's reports to Orbax's ended event loop, on all arrays but the one that failed."""
        if str(failure.exc_value) != "Event loop is closed":
            self._earlier[1](failure)

    @property
    def in_front(self) -> bool:
        """Tell whether nobody has put other hooks in front since."""
        return (threading.excepthook, sys.unraisablehook) == (self.shorten, self.leave_out_closed_loops)

    def remove(self) -> None:
        """Put the earlier hooks back."""
        if self.in_front:
            threading.excepthook, sys.unraisablehook = self._earlier


class _StandIn(logging.Handler):
    """A handler for the root logger, which prints only what Python's handler of last resort would print without it.

    It keeps absl, through which Orbax logs, from calling `logging.basicConfig`; after that, a caller's own call of
    `basicConfig` would do nothing, and loggers with handlers would print everything twice.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record that no other handler takes."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        handlers = list[logging.Handler]()
        while logger is not None:
            handlers += logger.handlers
            logger = logger.parent if logger.propagate else None
        if handlers == [self] and logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


_lock, _n_open, _stand_in = threading.Lock(), 0, _StandIn()
_hooks: _Hooks | None = None
"""Shared by all runs in this process: threads may make several at once."""


@contextlib.contextmanager
def orbax_kept_short() -> Iterator[None]:
    """Reduce errors in Orbax's threads to one line each, and leave out what Orbax logs.

    After OSError or SaveError this stays in effect: Orbax may leave threads behind that fail while Python ends.
    """
    global _n_open, _hooks
    with _lock:
        _n_open += 1
        if _hooks is None or not _hooks.in_front:
            _hooks = _Hooks()
        if not logging.root.handlers:
            logging.root.addHandler(_stand_in)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_of_others)
    failed = False
    try:
        yield
    except (OSError, SaveError):
        failed = True
        # When Python next collects garbage, it warns of what Orbax had not begun to write.
        warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
        raise
    finally:
        with _lock:
            _n_open -= 1
            if not _n_open:
                logging.root.removeHandler(_stand_in)
            if _hooks and not (failed or _n_open):
                _hooks.remove()
                _hooks = None
                for name in LOGGERS:
                    logging.getLogger(name).removeFilter(_is_of_others)


def _is_of_others(record: logging.LogRecord) -> bool:
    return not _is_orbax(f"{record.pathname}\n{logging.Formatter().format(record)}")


def _is_orbax(text: str) -> bool:
    """Tell whether a traceback or log record comes from Orbax or TensorStore."""
    return re.search(r"/orbax/|\[(tensorstore_spec|os_error_code)=", text) is not None


def short_reason(error: BaseException | None) -> str:
    """Return the system's message for a system error, else the start of the error's text.

    TensorStore's text fills pages, with the system's error number in it.
    """
    if strerror := getattr(error, "strerror", None):
        return strerror
    if code := re.search(r"\[os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]}…"
