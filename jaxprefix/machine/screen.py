"""Streams to print to: a closed terminal, a reader who has gone or a poor encoding must not end the program."""

import contextlib
import io
import os
import sys
from typing import Any


class UnfailingStream:
    """A text stream that never fails: once it cannot be written to, what is written goes nowhere.

    None stands for a stream that was closed before the program began.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or discard it."""
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self._stream is None or getattr(self._stream, "closed", False):
            return
        try:
            with contextlib.suppress(BlockingIOError):  # its reader is slow, but has not gone
                getattr(self._stream, method)(*arguments)
        except OSError:
            mute(self._stream)


def tell(text: str, end: str = "\n") -> None:
    """Print text on stderr; if nothing can be written there, it is lost."""
    print(text, end=end, file=UnfailingStream(sys.stderr), flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    tell(f"WARNING: {text}")


def escape_unknown(stream: Any) -> None:
    """Let a stream write characters that its encoding does not have, such as 😃, as backslash escapes."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def mute(stream: Any) -> None:
    """Discard what a stream still holds and what is written to it later; Python would fail on it again as it ends."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError):  # not one of the system's
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:  # equal if the system had closed the stream: its number was free
        os.dup2(nowhere, number)
        os.close(nowhere)
