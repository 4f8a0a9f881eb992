"""Frozen base models: Flax NNX modules whose weights come from a folder in the hub's layout."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.typing import DTypeLike

from convert import gpt2 as gpt2_table
from convert import gpt_neox as gpt_neox_table
from convert.errors import InputError
from convert.files import filling
from convert.prefix import ADAPTER_CONFIG
from convert.table import Table, stream_weights, write_weights
from convert.untrusted import member
from convert.weights import SHARD_INDEX, TORCH_INDEX, FiniteWeight, Index, empty_pages
from jaxprefix.config import Compute, DType
from jaxprefix.hub import fetch_weights, resolve_folder
from jaxprefix.machine.devices import own_device
from jaxprefix.models.config import ModelConfig, read_model_config
from jaxprefix.models.gpt2 import GPT2
from jaxprefix.models.gpt_neox import GPTNeoX
from jaxprefix.models.layers import scanned_dtype
from jaxprefix.models.stack import stacked

BaseModel = GPTNeoX | GPT2
_CLASSES: dict[str, type[BaseModel]] = {"gpt_neox": GPTNeoX, "gpt2": GPT2}
_TABLES = {"gpt_neox": gpt_neox_table, "gpt2": gpt2_table}
Reader = Callable[[Index, str], np.ndarray]
"""Reads a part of a weight, in the named type."""
READERS = 4
"""Weights that are read at the same time: most time goes into new memory pages, or into waiting for the disk."""


def load_model(
    dir_or_hub_id: str | Path,
    dtype: DTypeLike = "float32",
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    config: ModelConfig | None = None,
    compute: Compute = Compute(),
    revision: str | None = None,
) -> BaseModel:
    """Load a base model from a folder in the hub's layout, or from a hub id and, if given, its `revision`.

    `dtype` is the type that its weights are held and multiplied in: float32, bfloat16 or float16. `sharding_of` returns
    a weight's sharding from its path and shape (see `sharding.py`), and each device reads its own part; without it, the
    first device holds everything. `config` saves reading config.json a second time. `compute` changes how the
    model is computed, not what it computes. Raises InputError when the folder, its config.json or its weights cannot
    be used.
    """
    try:
        type_name = np.dtype(dtype).name
    except TypeError:
        type_name = repr(dtype)
    if type_name not in (types := get_args(DType)):
        raise InputError(f"dtype must be one of {', '.join(types)}; is {type_name}")
    folder = resolve_folder(dir_or_hub_id, revision)
    config = config or read_model_config(folder, name=str(dir_or_hub_id), revision=revision)
    fetch_weights(dir_or_hub_id, folder)
    first_device = jax.sharding.SingleDeviceSharding(own_device())

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        sharding = sharding_of(name, leaf.shape) if sharding_of else first_device
        read: Reader
        if is_stacked(name):
            layers = [weights[name.replace("layers", f"layers.{n}", 1)] for n in range(config.n_layer)]
            read = partial(_read_layers, layers, held_dtype(name, leaf.shape, type_name))
        else:
            read = weights[name].read
        array = jax.make_array_from_callback(leaf.shape, sharding, partial(_read_once, {}, read, type_name))
        return jax.block_until_ready(array) if is_stacked(name) else array  # or the host would hold two at a time

    model = abstract_model(config, compute)  # first: its layers may be unfit for a loop
    weights = dict(_stream(folder, config))
    with ThreadPoolExecutor(1 if compute.scan_layers else READERS) as pool:  # stacked: one weight at a time
        paths, leaves = zip(*jax.tree.leaves_with_path(model), strict=True)
        return jax.tree.unflatten(jax.tree.structure(model), pool.map(load, paths, leaves))


def _read_once(parts: dict[str, np.ndarray], read: Reader, dtype: str, index: Index) -> np.ndarray:
    """Read a part of a weight, or return what was read into `parts` for another device that holds the same part."""
    if (key := str(index)) not in parts:
        parts[key] = read(index, dtype)
    return parts[key]


def _read_layers(layers: Sequence[FiniteWeight], held: np.dtype, index: Index, dtype: str) -> np.ndarray:
    """Read a part of one weight from every layer, stacked into an array of type `held`."""
    assert index is not None
    chosen, within = layers[index[0]], index[1:]
    shape = np.broadcast_to(0, layers[0].shape)[within].shape
    whole = empty_pages((len(chosen), *shape), held)

    def fill(number: int) -> None:
        whole[number] = chosen[number].read(within, dtype).view(held)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fill, range(len(chosen))))
    return whole


def is_stacked(name: str) -> bool:
    """Tell whether a path is that of one array with a weight of all layers, as --scan_layers has them."""
    return re.match(r"layers\.\D", name) is not None


def held_dtype(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.dtype:
    """Return the type in which a model of type `dtype` holds a weight; see `scanned_dtype`."""
    return scanned_dtype(jax.ShapeDtypeStruct(shape[1:], dtype)) if is_stacked(name) else np.dtype(dtype)


def copy_base_model(folder: Path, target: Path) -> None:
    """Write a folder's base model as a new folder in the hub's layout, with bit-identical weights in safetensors files.

    Every weight's name is converted to ours and back. Raises InputError for weights that this package does not know.
    """
    config = read_model_config(folder)
    kinds, others = (".json", ".model", ".vocab", ".txt", ".jinja"), (SHARD_INDEX, TORCH_INDEX, ADAPTER_CONFIG)
    names = [path.name for path in folder.iterdir() if path.suffix in kinds or path.name == "LICENSE"]
    beside = [member(folder, name) for name in names if name not in others]
    whole = ((path, weight.read(None)) for path, weight in _stream(folder, config))
    with filling(target):
        write_weights(target, weight_table(config), config.n_layer, whole)
        for path in filter(Path.is_file, beside):
            shutil.copyfile(path, target / path.name)


def abstract_model(config: ModelConfig, compute: Compute = Compute()) -> BaseModel:
    """Return the model with shapes in place of weights. Raises InputError for layers that cannot be scanned."""
    model = _CLASSES[config.model_type](config, compute)
    if compute.scan_layers:
        model.layers = stacked(model.layers)
    return model


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by our path."""
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract_model(config))}


def path_name(path: Any) -> str:
    """Join a leaf's path in a pytree with dots, without the `.value` that ends a Flax parameter's."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def weight_table(config: ModelConfig) -> Table:
    """Return the table of a model's weight files. A tied head may be in them: the embedding by a second name."""
    rules = _TABLES[config.model_type]
    return rules.TABLE | ({rules.HEAD: ("embed.weight", "again")} if config.tied_head else {})


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Compare a folder's weight names and shapes with the model's, and copies with each other. Raises InputError."""
    next(_stream(folder, config))


def fingerprint(folder: Path, config: ModelConfig) -> str:
    """Return a checksum of the first row of each matrix, as it lies in the file, and of each vector.

    Training changes these; another file format or other shards do not. Raises InputError.
    """
    digest = hashlib.sha256()
    for path, weight in sorted(_stream(folder, config), key=itemgetter(0)):
        digest.update(path.encode() + weight.read_first("float32").astype("<f4").tobytes())
    return digest.hexdigest()


def _stream(folder: Path, config: ModelConfig) -> Iterator[tuple[str, FiniteWeight]]:
    """Check that all weights of a folder fit the model, then yield each with our path."""
    prefix = _TABLES[config.model_type].OPTIONAL_PREFIX
    return stream_weights(folder, weight_table(config), config.n_layer, weight_shapes(config), prefix)
