"""The exceptions that end in plain lines: what the user gave cannot be used, or a run cannot go on."""

from typing import Self


class PlainError(Exception):
    """An error whose message is complete without a traceback."""

    exit_code: int

    @classmethod
    def all(cls, heading: str, problems: list[str]) -> Self:
        """Report several problems at once, one a line under a heading."""
        return cls("\n  - ".join([heading, *problems]))


class InputError(PlainError):
    """A file, folder, flag or value from the user cannot be used; the message names it.

    The command line prints it and exits with code 2.
    """

    exit_code = 2


class RunError(PlainError):
    """A run that began well cannot go on: its numbers, its disk or its memory failed.

    The message says what happened, after which update, and what is left to go on from. The command line prints it and
    exits with code 1.
    """

    exit_code = 1
