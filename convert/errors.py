"""The one exception that means "something the user gave is wrong"."""


class InputError(Exception):
    """A file, folder, flag or value from the user cannot be used.

    The message is complete without a traceback: it names the file, line or field.
    The command line prints it and exits with code 2.
    """

    @classmethod
    def all(cls, heading: str, problems: list[str]) -> "InputError":
        """Report several problems at once, one a line under a heading."""
        return cls("\n  - ".join([heading, *problems]))
