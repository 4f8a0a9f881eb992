"""The weight files of a hub folder: safetensors or torch's, whole or in shards, read tensor by tensor.

Each tensor is mapped, copied and unmapped again, so that only what the caller keeps stays in memory.
"""

import dataclasses
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import InputError
from convert.torch_files import load_torch, map_file
from convert.untrusted import member, read_object, refuse_pointer

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

HEADER_BYTES = 2**22
"""Longest header of a safetensors file: names and shapes of some 30,000 tensors."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
BLOCK = 2**16
"""Numbers that are checked at a time: as many as fit into a core's cache."""

_NUMPY_TYPES = {
    **{"BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4"},
    **{"U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F32": "<f4", "F64": "<f8"},
}

Version = tuple[int, int, int, int]
"""What changes when a file is replaced, or written to."""
Index = tuple[slice, ...] | None
"""A part of a weight; None is all of it."""


class StoredWeight(NamedTuple):
    """One tensor of a file, not yet read."""

    shape: tuple[int, ...]
    view: Callable[[], np.ndarray]
    """Maps the file and returns the tensor; while that is referenced, the file stays mapped, and counts as memory."""


@dataclasses.dataclass(frozen=True)
class FiniteWeight:
    """A tensor in our layout; reading it copies it to memory and checks that its numbers are finite."""

    stored: StoredWeight
    as_ours: Callable[[np.ndarray], np.ndarray]
    """Returns a view of the stored tensor with our axes."""
    name: str
    """Its name in errors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in our layout."""
        return self.as_ours(np.broadcast_to(0, self.stored.shape)).shape

    def read(self, index: Index, dtype: str | None = None) -> np.ndarray:
        """Return a part of it, in its own type or in `dtype`.

        Raises InputError when it holds NaN, infinity, numbers that are not floating-point, or any beyond `dtype`.
        """
        return self._checked(self.as_ours(self.stored.view())[index or ...], dtype)

    def read_first(self, dtype: str) -> np.ndarray:
        """Return what lies first in the file: a row of a matrix, or all of a vector."""
        stored = self.stored.view()
        return self._checked(stored[:1] if stored.ndim > 1 else stored, dtype)

    def _checked(self, stored: np.ndarray, dtype: str | None) -> np.ndarray:
        if stored.dtype.name not in FLOATS:
            raise InputError(f"{self.name}: holds numbers of type {stored.dtype}; supported: {', '.join(FLOATS)}")
        part = page_copy(stored, stored.dtype if dtype is None else np.dtype(dtype))
        if not is_finite(part):
            if part.dtype != stored.dtype and is_finite(stored):
                most, advice = ml_dtypes.finfo(part.dtype).max, "; use --dtype bfloat16" if dtype == "float16" else ""
                raise InputError(f"{self.name}: holds numbers beyond {most}, the largest that {dtype} can hold{advice}")
            raise InputError(f"{self.name}: holds numbers that are not finite; the file is damaged or badly converted")
        return part


def empty_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array in memory pages of its own; on a CPU, JAX uses memory so aligned without another copy."""
    n_bytes = max(math.prod(shape) * dtype.itemsize, 1)
    return np.ndarray(shape, dtype, mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def page_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy an array to pages of its own."""
    copy = empty_pages(array.shape, dtype)
    with np.errstate(over="ignore"):
        np.copyto(copy, array, casting="unsafe")
    return copy


def is_finite(array: np.ndarray) -> bool:
    """Tell whether all numbers of a floating-point array are finite.

    Compares their bits, block by block: NumPy is slow on half types, and one array of all results would take memory.
    """
    bits = np.dtype(f"uint{8 * array.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)
    without_sign = bits.type(np.iinfo(bits).max >> 1)
    flat = array.ravel(order="K").view(bits)
    blocks = (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))
    return all((block & without_sign).max() < infinity for block in blocks)


def weight_files(folder: Path) -> list[Path]:
    """List a hub folder's weight files: safetensors before torch's, a single file before shards that an index names.

    transformers has the same order, and leaves an old index behind when it saves a model again as one file. Raises
    InputError if there are no files, or an index names files that are missing or outside the folder.
    """
    for index, single in ((SHARD_INDEX, SINGLE_FILE), (TORCH_INDEX, TORCH_FILE)):
        if (path := member(folder, single)).is_file():
            return [path]
        if member(folder, index).is_file():
            shards = [member(folder, name) for name in sorted(_shards(folder / index))]
            if missing := [path.name for path in shards if not path.is_file()]:
                raise InputError(f"{folder / index}: names files that are missing: {', '.join(missing)}")
            return shards
    raise InputError(f"{folder}: no weights; expected {SINGLE_FILE} or {TORCH_FILE}, or shards with their index")


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds the weights of a base model, by their files' names."""
    return any((folder / name).is_file() for name in (SINGLE_FILE, SHARD_INDEX, TORCH_FILE, TORCH_INDEX))


def stored_weights(folder: Path) -> Iterator[tuple[str, StoredWeight]]:
    """Yield (name, weight) of everything in the folder's files, reading no more than their headers."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            yield from read_safetensors(path)[0].items()
        else:
            content = load_torch(path, checked=False)
            if not isinstance(content, dict):
                raise InputError(f"{path}: expected a dict of weights, found {type(content).__name__}")
            for name, value in content.items():
                if not isinstance(name, str) or not isinstance(value, np.ndarray):
                    raise InputError(f"{path}: expected a dict of weights, found {type(value).__name__} at {name!r}")
                yield name, StoredWeight(value.shape, functools.partial(np.asarray, value))


def read_safetensors(path: Path) -> tuple[dict[str, StoredWeight], dict[str, str]]:
    """Return a safetensors file's tensors, not yet read, and its metadata. Raises InputError."""
    header, start, version = _safetensors_header(path)
    metadata = header.pop("__metadata__", None) or {}
    weights: dict[str, StoredWeight] = {}
    for name, about in header.items():
        if about["dtype"] not in _NUMPY_TYPES:
            raise InputError(f"{path}: {name} holds numbers of type {about['dtype']}, which is not supported")
        dtype, first = np.dtype(_NUMPY_TYPES[about["dtype"]]), start + about["data_offsets"][0]
        shape = tuple(about["shape"])
        weights[name] = StoredWeight(shape, functools.partial(_mapped, path, version, dtype, shape, first))
    return weights, metadata


def _mapped(path: Path, version: Version, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
    with path.open("rb") as file:
        if _version(file) != version:  # the header that was read would describe other numbers
            raise InputError(f"{path}: was replaced while it was read; read it again")
        return np.ndarray(shape, dtype, map_file(file), start)


def _shards(index: Path) -> set[str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: not an index with a weight_map")
    shards = set(weight_map.values())
    if outside := sorted(name for name in shards if Path(name).name != name):
        raise InputError(f"{index}: names files outside its folder: {outside[:3]}")
    return shards


def _version(file: IO[bytes]) -> Version:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int, Version]:
    """Return a safetensors file's header, where it ends, and its version; the library checks that it fits the file."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > HEADER_BYTES:
                raise InputError(
                    f"{path}: not a readable safetensors file (its header claims {n_header:,} bytes, more than the "
                    f"{HEADER_BYTES:,} that are read)"
                )
            header, version = file.read(n_header), _version(file)
        with safe_open(path, framework="numpy"):
            return json.loads(header), 8 + n_header, version
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
