"""Stream a checkpoint through a literal table: hub name → our path, or None for a deliberate drop.

In a rule `(path, how, …)`, "transpose" swaps the two axes, "split" then splits the first axis into [3, a third], and
"again" marks a second name of a weight, which files may use instead or as well. Names and shapes come from the file
headers, and all disagreements are reported in one error before any weight is read, except for copies, which are read to
be compared. The same table, read backwards, writes a checkpoint.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from convert.errors import InputError
from convert.files import save_safetensors
from convert.weights import SHARD_INDEX, SINGLE_FILE, FiniteWeight, StoredWeight, stored_weights

How = Literal["transpose", "split", "again"]
Rule = str | tuple[str, *tuple[How, ...]] | None
Table = Mapping[str, Rule]
COMPARED_ROWS = 1024
"""Rows compared at a time, when two names of a weight must hold the same numbers."""


def expand(table: Table, n_layer: int) -> dict[str, Rule]:
    """Write the table out for every layer: names without `{layer}` once, the others n_layer times."""
    return {
        name.format(layer=layer): _in_layer(rule, layer)
        for name, rule in table.items()
        for layer in (range(n_layer) if "{layer}" in name else (0,))
    }


def stream_weights(
    folder: Path, table: Table, n_layer: int, shapes: Mapping[str, tuple[int, ...]], optional_prefix: str = ""
) -> Iterator[tuple[str, FiniteWeight]]:
    """Yield (our path, weight to read) for every weight of the folder.

    `shapes` maps each of our paths to the shape that the model expects; rules for other paths do not count. In the
    files, names may lack the optional prefix. Raises InputError that lists all missing, unknown and misshapen weights
    before the first one is read.
    """
    rules = {name: rule for name, rule in expand(table, n_layer).items() if rule is None or path_of(rule) in shapes}
    found: dict[str, StoredWeight] = {}
    problems: list[str] = []
    for stored_name, weight in stored_weights(folder):
        name = stored_name if optional_prefix + stored_name not in rules else optional_prefix + stored_name
        if name in found:
            problems.append(f"duplicate weight {name}")
        found[name] = weight

    problems += [f"unknown weight {name}" for name in sorted(found) if name not in rules]
    wanted = {name: rule for name, rule in rules.items() if rule and "again" not in _how(rule)}
    of_path = {path_of(rule): name for name, rule in wanted.items()}
    copies = {name: of_path[path_of(rules[name])] for name in found if "again" in _how(rules.get(name))}
    for copy, name in copies.items():
        if name not in found:  # a file may hold a weight under either of its two names
            found[name] = found.pop(copy)
    problems += [f"missing weight {name}" for name in wanted if name not in found]
    for name, weight in found.items():
        path = path_of(rules.get(name))
        if path and weight.shape != (expected := _as_stored(np.broadcast_to(0, shapes[path]), _how(rules[name])).shape):
            problems.append(f"{name} has shape {weight.shape}, config.json asks for {expected}")
    if not found.keys() & {name.format(layer=n_layer - 1) for name in table if "{layer}" in name}:
        problems = [f"config.json asks for {n_layer} layers, the weights have no layer {n_layer - 1}"]
    if not problems:
        problems += [
            f"{copy} differs from {name}, to which config.json ties it"
            for copy, name in copies.items()
            if copy in found and not _agree(found[copy].view(), found[name].view())
        ]
    if problems:
        raise InputError.all(f"{folder}: weights do not fit the model:", problems)

    for name, weight in found.items():
        if path := path_of(wanted.get(name)):
            as_ours = functools.partial(_as_ours, how=_how(wanted[name]))
            yield path, FiniteWeight(weight, as_ours, f"{folder}: weight {name}")


def write_weights(
    folder: Path, table: Table, n_layer: int, weights: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 5 * 10**9
) -> None:
    """Write (our path, array) pairs under their hub names: the inverse of `stream_weights`, with the arrays' own types.

    More than `shard_bytes` go into several files with an index, as transformers writes them. Raises OSError.
    """
    rules = {name: rule for name, rule in expand(table, n_layer).items() if rule and "again" not in _how(rule)}
    names = {path_of(rule): (name, _how(rule)) for name, rule in rules.items()}
    shards: list[list[str]] = []

    def flush(shard: dict[str, np.ndarray]) -> None:
        shards.append(list(shard))
        save_safetensors(shard, folder / f"{len(shards)}.tmp", {})

    shard: dict[str, np.ndarray] = {}
    total = 0
    for path, array in weights:
        if shard and sum(weight.nbytes for weight in shard.values()) + array.nbytes > shard_bytes:
            flush(shard)
            shard = {}
        name, how = names[path]
        shard[name] = np.ascontiguousarray(_as_stored(array, how))
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


def path_of(rule: Rule) -> str | None:
    """Return our path in a rule."""
    return rule[0] if isinstance(rule, tuple) else rule


def _how(rule: Rule) -> tuple[How, ...]:
    return rule[1:] if isinstance(rule, tuple) else ()


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two weights are equal, NaN included; reading them reports numbers that are not finite."""

    def same(part: np.ndarray, twin: np.ndarray) -> bool:
        if part.dtype == twin.dtype and np.array_equal(part.view(f"u{part.itemsize}"), twin.view(f"u{part.itemsize}")):
            return True  # comparing bits takes a tenth of the time
        return np.array_equal(part, twin, equal_nan=True)

    blocks = (slice(start, start + COMPARED_ROWS) for start in range(0, len(one), COMPARED_ROWS))
    return all(same(one[block], other[block]) for block in blocks)


def _in_layer(rule: Rule, layer: int) -> Rule:
    if isinstance(rule, tuple):
        return rule[0].format(layer=layer), *rule[1:]
    return rule and rule.format(layer=layer)


def _as_ours(array: np.ndarray, how: tuple[How, ...]) -> np.ndarray:
    array = array.T if "transpose" in how else array
    return array.reshape(3, -1, *array.shape[1:]) if "split" in how else array


def _as_stored(array: np.ndarray, how: tuple[How, ...]) -> np.ndarray:
    array = array.reshape(-1, *array.shape[2:]) if "split" in how else array
    return array.T if "transpose" in how else array
