"""The weight files of a hub folder: safetensors or torch's, whole or in shards, read tensor by tensor.

A tensor is opened, read and let go of again, so that nothing but what the caller keeps stays in memory.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import InputError
from convert.torch_files import load_torch
from convert.untrusted import member, read_object

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

HEADER_BYTES = 2**22
"""Longest header of a safetensors file: names and shapes of some 30,000 tensors."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
BLOCK = 2**16
"""Numbers that are checked at a time: as many as stay in a core's cache."""

_NUMPY_TYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"}

Index = tuple[slice, ...] | None
"""A part of a weight; None is all of it."""


class StoredWeight(Protocol):
    """One tensor of a file, not yet read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes."""

    def read(self, index: Index) -> np.ndarray:
        """Return a part of it, in the type it is stored in."""


@dataclasses.dataclass(frozen=True)
class SafetensorsWeight:
    """A tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, index: Index) -> np.ndarray:
        """Map the file, copy the part, unmap: pages that stay mapped would count as memory."""
        with _open(self.path) as file:
            return file.get_slice(self.name)[index] if index else file.get_tensor(self.name)


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """A tensor of a file that torch wrote, which is mapped, not read as a whole."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes as stored."""
        return self.array.shape

    def read(self, index: Index) -> np.ndarray:
        """Copy the part."""
        return np.array(self.array[index or ...])


@dataclasses.dataclass(frozen=True)
class TransposedWeight:
    """A tensor with its two axes exchanged."""

    stored: StoredWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes after the exchange."""
        return self.stored.shape[::-1]

    def read(self, index: Index) -> np.ndarray:
        """Return the part, transposed."""
        return self.stored.read(index and index[::-1]).T


@dataclasses.dataclass(frozen=True)
class FiniteWeight:
    """A tensor whose numbers are checked as they are read."""

    stored: StoredWeight
    name: str
    """What an error calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes."""
        return self.stored.shape

    def read(self, index: Index) -> np.ndarray:
        """Return the part. Raises InputError when it holds NaN, infinity, or no floating-point numbers."""
        part = self.stored.read(index)
        if part.dtype.name not in FLOATS:
            raise InputError(f"{self.name}: holds numbers of type {part.dtype}; supported: {', '.join(FLOATS)}")
        if not is_finite(part):
            raise InputError(f"{self.name}: holds numbers that are not finite; the file is damaged or badly converted")
        return part


def is_finite(array: np.ndarray) -> bool:
    """Tell whether all numbers of a floating-point array are finite.

    Looks at their bits, block by block: numpy compares half types slowly, and all answers at once take memory.
    """
    bits = np.dtype(f"uint{8 * array.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)
    without_sign = bits.type(np.iinfo(bits).max >> 1)
    flat = array.ravel(order="K").view(bits)
    blocks = (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))
    return all((block & without_sign).max() < infinity for block in blocks)


def weight_files(folder: Path) -> list[Path]:
    """List a hub folder's weight files: safetensors before torch's, shards that an index names before a single file.

    Raises InputError if there are none, or an index names a file outside the folder.
    """
    for index, single in ((SHARD_INDEX, SINGLE_FILE), (TORCH_INDEX, TORCH_FILE)):
        if member(folder, index).is_file():
            return [member(folder, name) for name in sorted(_shards(folder / index))]
        if (path := member(folder, single)).is_file():
            return [path]
    raise InputError(f"{folder}: no weights; expected {SINGLE_FILE} or {TORCH_FILE}, or shards with their index")


def stored_weights(folder: Path) -> Iterator[tuple[str, StoredWeight]]:
    """Yield (name, weight) of everything in the folder's files, reading no more than their headers."""
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            content = load_torch(path, checked=False)
            if not isinstance(content, dict):
                raise InputError(f"{path}: expected a dict of weights, found {type(content).__name__}")
            for name, value in content.items():
                if not isinstance(name, str) or not isinstance(value, np.ndarray):
                    raise InputError(f"{path}: expected a dict of weights, found {type(value).__name__} at {name!r}")
                yield name, TorchWeight(value)
            continue
        yield from read_safetensors(path)[0].items()


def read_safetensors(path: Path) -> tuple[dict[str, SafetensorsWeight], dict[str, str]]:
    """Return a safetensors file's tensors, not yet read, and its metadata. Raises InputError."""
    weights: dict[str, SafetensorsWeight] = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name)
            if stored.get_dtype() not in _NUMPY_TYPES:
                raise InputError(
                    f"{path}: {name} holds numbers of type {stored.get_dtype()}, which numpy does not have"
                )
            weights[name] = SafetensorsWeight(path, name, tuple(stored.get_shape()))
        return weights, dict(file.metadata() or {})


def _shards(index: Path) -> set[str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: not an index with a weight_map")
    shards = set(weight_map.values())
    if outside := sorted(name for name in shards if Path(name).name != name):
        raise InputError(f"{index}: names files outside its folder: {outside[:3]}")
    return shards


def _open(path: Path) -> safe_open:
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
        if n_header > HEADER_BYTES:
            raise InputError(
                f"{path}: not a readable safetensors file (its header claims {n_header:,} bytes, more than the "
                f"{HEADER_BYTES:,} that are read)"
            )
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
