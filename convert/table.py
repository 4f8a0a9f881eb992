"""Stream a checkpoint through a literal table: hub name → our path, or None for a deliberate drop.

Names and shapes are compared from the file headers before any weight is read, and every
disagreement is reported in one error. The same table, read backwards, writes a checkpoint.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.errors import InputError

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def expand(table: Mapping[str, str | None], n_layer: int) -> dict[str, str | None]:
    """Write the table out for every layer: names without `{layer}` once, the others n_layer times."""
    return {
        name.format(layer=layer): path and path.format(layer=layer)
        for name, path in table.items()
        for layer in (range(n_layer) if "{layer}" in name else (0,))
    }


def weight_files(folder: Path) -> list[Path]:
    """List a hub folder's safetensors files: the shards its index names, or the single file."""
    if (folder / SHARD_INDEX).is_file():
        try:
            shards = set(json.loads((folder / SHARD_INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / SHARD_INDEX}: not an index with a weight_map") from error
        return [folder / name for name in sorted(shards)]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    raise InputError(f"{folder}: no weights; expected {SINGLE_FILE} or {SHARD_INDEX}")


def stream_weights(
    folder: Path, table: Mapping[str, str | None], n_layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (our path, array as stored) for every weight of the folder, one file after the other.

    `shapes` maps each of our paths to the shape the model expects. Raises InputError that lists all
    missing, unknown and misshapen weights before the first one is read.
    """
    rules = expand(table, n_layer)
    handles = [_open(path) for path in weight_files(folder)]
    found = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    problems = [f"unknown weight {name}" for name in sorted(found) if name not in rules]
    problems += [f"missing weight {name}" for name, path in rules.items() if path and name not in found]
    for name in found:
        path = rules.get(name)
        shape = tuple(found[name].get_slice(name).get_shape())
        if path and shape != tuple(shapes[path]):
            problems.append(f"{name} has shape {shape}, config.json asks for {tuple(shapes[path])}")
    if problems:
        raise InputError.all(f"{folder}: weights do not fit the model:", problems)

    for name, handle in found.items():
        if path := rules[name]:
            yield path, handle.get_tensor(name)


def write_weights(
    folder: Path, table: Mapping[str, str | None], n_layer: int, weights: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write (our path, array) pairs under their hub names: the inverse of `stream_weights`, with the arrays' own types.

    More than SHARD_BYTES go into several files with an index, as transformers writes them. Raises OSError.
    """
    names = {path: name for name, path in expand(table, n_layer).items() if path}
    shards: list[list[str]] = []

    def flush(shard: dict[str, np.ndarray]) -> None:
        shards.append(list(shard))
        save_file(shard, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, np.ndarray] = {}
    total = 0
    for path, array in weights:
        if shard and sum(weight.nbytes for weight in shard.values()) + array.nbytes > SHARD_BYTES:
            flush(shard)
            shard = {}
        shard[names[path]] = np.ascontiguousarray(array)
        total += array.nbytes
    flush(shard)
    if len(shards) == 1:
        os.replace(folder / "1.tmp", folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, written in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.tmp", folder / file_name)
        weight_map |= dict.fromkeys(written, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SHARD_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
