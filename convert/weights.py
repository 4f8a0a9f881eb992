"""The weight files of a hub folder: safetensors or torch's, whole or in shards, read tensor by tensor.

A tensor is opened, read and let go of again, so that nothing but what the caller keeps stays in memory.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import InputError
from convert.torch_files import import_torch, load_torch

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

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
    """A tensor of a file that torch wrote; the zip format is mapped, not read as a whole."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes as stored."""
        return tuple(self.tensor.shape)

    def read(self, index: Index) -> np.ndarray:
        """Copy the part; numpy knows bfloat16 through ml_dtypes."""
        part = self.tensor[index or ...].contiguous()
        if str(part.dtype) == "torch.bfloat16":
            import ml_dtypes

            return part.view(import_torch("bfloat16").int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()


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


def weight_files(folder: Path) -> list[Path]:
    """List a hub folder's weight files: safetensors before torch's, shards that an index names before a single file.

    Raises InputError if there are none, or an index names a file outside the folder.
    """
    for index, single in ((SHARD_INDEX, SINGLE_FILE), (TORCH_INDEX, TORCH_FILE)):
        if (folder / index).is_file():
            return [folder / name for name in sorted(_shards(folder / index))]
        if (folder / single).is_file():
            return [folder / single]
    raise InputError(f"{folder}: no weights; expected {SINGLE_FILE} or {TORCH_FILE}, or shards with their index")


def stored_weights(folder: Path) -> Iterator[tuple[str, StoredWeight]]:
    """Yield (name, weight) of everything in the folder's files, reading no more than their headers."""
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            content = load_torch(path, mapped=True)
            if not isinstance(content, dict):
                raise InputError(f"{path}: expected a dict of weights, found {type(content).__name__}")
            yield from ((str(name), TorchWeight(tensor)) for name, tensor in content.items())
            continue
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, SafetensorsWeight(path, name, tuple(file.get_slice(name).get_shape()))


def _shards(index: Path) -> set[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in shards if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index with a weight_map") from error
    if outside:
        raise InputError(f"{index}: names files outside its folder: {outside[:3]}")
    return shards


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
