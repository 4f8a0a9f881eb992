"""The exceptions that are printed as plain lines: what the user gave cannot be used, or a run cannot go on."""

import re
from typing import Self

MESSAGE_CHARACTERS = 4000
PROBLEMS = 40
"""The most problems that are listed; a file may have thousands."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class PlainError(Exception):
    """An error whose message is complete without a traceback.

    What it quotes may come from a stranger's file: control characters are escaped, so that no terminal obeys them, and
    a message longer than MESSAGE_CHARACTERS is cut.
    """

    exit_code: int

    def __init__(self, message: str):
        shown = re.sub(r"[^\n -~\xa0-\ud7ff\ue000-\U0010ffff]", lambda found: ascii(found[0])[1:-1], message)
        super().__init__(shown if len(shown) <= MESSAGE_CHARACTERS else shown[:MESSAGE_CHARACTERS] + " …")

    @classmethod
    def all(cls, heading: str, problems: list[str]) -> Self:
        """Report several problems at once, one a line under a heading."""
        more = [f"and {len(problems) - PROBLEMS:,} more"] if len(problems) > PROBLEMS else []
        return cls("\n  - ".join([heading, *problems[:PROBLEMS], *more]))


class InputError(PlainError):
    """A file, folder, flag or value from the user cannot be used; the message names it.

    The command line prints it and exits with code 2.
    """

    exit_code = 2


class RunError(PlainError):
    """What began well cannot go on: its numbers, its disk or its memory failed.

    The message says what happened; for a training run, also after which update, and what is left to go on from. The
    command line prints it and exits with code 1.
    """

    exit_code = 1
