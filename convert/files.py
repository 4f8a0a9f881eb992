"""Files that appear whole or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert.errors import InputError

LEFTOVER = re.compile(r"(\d+|adapter_config\.json|adapter_model\.safetensors)\.tmp")
"""Names of what a killed copy or conversion leaves in a folder that it was filling."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, that file is flushed to disk and replaces `path`.

    After a failure it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk, which may report only now that it is full. Raises OSError."""
    with path.open("r+b") as file:  # some network disks flush only what is open for writing
        os.fsync(file.fileno())


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Let the block write files into a new or empty folder; if that fails, remove them, and the folder if it is new.

    Raises InputError if the folder holds anything but incidental files and what a killed copy left.
    """
    existed = folder.exists()
    if existed and not (folder.is_dir() and all(map(_does_not_count, folder.iterdir()))):
        raise InputError(f"{folder}: is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _clear(folder)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _clear(folder)
            if not existed:
                folder.rmdir()
        raise


def _does_not_count(path: Path) -> bool:
    return is_incidental(path.name) or LEFTOVER.fullmatch(path.name) is not None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if not is_incidental(path.name):
            path.unlink()


def is_incidental(name: str) -> bool:
    """Tell whether a file manager, JupyterLab, NFS or macOS (for attributes) puts files of this name into folders."""
    return name in (".DS_Store", ".ipynb_checkpoints") or name.startswith((".nfs", "._"))


def save_safetensors(tensors: dict[str, np.ndarray], path: Path, header: Mapping[str, str]) -> None:
    """Write a safetensors file as PyTorch's readers expect it. Raises OSError, unwrapped from the library's error."""
    path.touch()
    mode = path.stat().st_mode  # the library would make it readable only for its owner
    try:
        save_file(tensors, path, metadata={**header, "format": "pt"})
    except SafetensorError as error:
        if not (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    if path.stat().st_mode != mode:
        with contextlib.suppress(OSError):  # some mounted disks refuse it
            path.chmod(mode)
