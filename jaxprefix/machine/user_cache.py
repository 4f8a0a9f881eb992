"""The user's folder for files that can be made again."""

import os
from pathlib import Path

from convert.errors import InputError

OTHER_CACHE = "set XDG_CACHE_HOME to another folder"
"""What to do where `cache_folder` is of no use."""


def cache_folder() -> Path:
    """Return the user's folder for compiled programs and the tokens of large files.

    Raises InputError for a user without a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxprefix"
    except RuntimeError as error:
        raise InputError("there is no home folder for caches; set XDG_CACHE_HOME to a folder") from error
