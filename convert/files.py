"""Files that appear whole or not at all."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder, which takes its place when the block ends well.

    A file is on the disk by then, and after a failure nothing is left of either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if temporary.is_dir():
        check_free(temporary)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        raise


def check_free(folder: Path) -> None:
    """Raise InputError if a folder that is to be written holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not an empty folder")


def save_safetensors(tensors: dict[str, np.ndarray], path: Path, header: Mapping[str, str]) -> None:
    """Write a safetensors file as PyTorch's readers expect it. Raises OSError, which the library wraps."""
    path.touch()
    mode = path.stat().st_mode  # the library's own is for its owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt", **header})
    except SafetensorError as error:
        if not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)
