"""Output that nobody reads any more ends nothing: a closed terminal, or a pipe whose reader has gone."""

import os
from typing import Any


class Heedless:
    """A text stream that never fails: once it cannot be written to, what is written goes nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        try:
            return self._stream.write(text)
        except OSError:
            mute(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or discard it."""
        try:
            self._stream.flush()
        except OSError:
            mute(self._stream)


def mute(stream: Any) -> None:
    """Discard what a stream still holds and will hold; Python would fail at it again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
