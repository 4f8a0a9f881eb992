"""Files that torch writes, read without running anything that is in them. Torch is imported when it is needed."""

from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.files import replacing

# How torch's two formats begin: zip archives, and the one before torch 1.6.
MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")


def import_torch(purpose: str) -> Any:
    """Return the torch module. Raises InputError that names the purpose when it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs PyTorch: pip install 'jaxprefix[torch]'") from error
    return torch


def is_torch_file(path: Path) -> bool:
    """Tell whether a file begins as torch's do."""
    with path.open("rb") as file:
        return file.read(16).startswith(MAGIC)


def load_torch(path: Path, mapped: bool = False) -> Any:
    """Load tensors onto the CPU; pickled code is refused. Raises InputError.

    `mapped` leaves their numbers in the file until they are used, if it is in the zip format.
    """
    torch = import_torch(f"reading {path}")
    try:
        with path.open("rb") as file:
            mapped = mapped and file.read(4) == MAGIC[0]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # on a damaged file torch raises many kinds
        raise InputError(f"{path}: not a file that torch can load safely ({first_line(error)})") from error


def save_torch(path: Path, content: Any) -> None:
    """Write a file in torch's format; it replaces its predecessor in one step. Raises OSError."""
    torch = import_torch(f"writing {path}")
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
