"""Files that may come from strangers: JSON objects of bounded size, and links that must stay in their folder."""

import collections
import json
from pathlib import Path
from typing import Any

from convert.errors import InputError

LFS_POINTER = b"version https://git-lfs"
JSON_BYTES = 2**23
"""Longest JSON file; those of real models have up to some 3 MB."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises InputError when it is not a file, too long, not valid JSON, nested too deeply, not an object, or has a key
    twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > JSON_BYTES:
        raise InputError(f"{path}: is longer than {JSON_BYTES:,} bytes, the limit for a model's JSON file")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs are not text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a large file was not fetched, and Git LFS's pointer lies in its place."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object from its pairs. Raises ValueError for a repeated key: readers differ on which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {twice[:40]!r}")
    return found


def member(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; it need not exist.

    A link may lead to another place in the folder or, as in the hub's cache, from snapshots/REVISION to the blobs
    beside snapshots. Raises InputError for any other link.
    """
    path, root = folder / name, folder.resolve()
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        target = path.resolve()
        if target.is_symlink():
            raise OSError("links in a circle")  # from Python 3.13 on, resolve does not report it
    except (OSError, ValueError, RuntimeError) as error:  # links in a circle, NUL bytes
        raise InputError(f"{path}: cannot be resolved ({error})") from error
    if not any(target.is_relative_to(place) for place in places):
        raise InputError(f"{path}: points outside its folder, to {target}; put the file itself in the folder")
    return path
