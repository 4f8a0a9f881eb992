"""Frozen base models: Flax NNX modules whose weights come from a folder in the hub's layout."""

import shutil
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from convert import gpt_neox as gpt_neox_table
from convert.errors import InputError
from convert.table import SHARD_INDEX, stream_weights, write_weights
from jaxprefix.hub import resolve_folder
from jaxprefix.models.config import ModelConfig, read_model_config
from jaxprefix.models.gpt_neox import GPTNeoX


def load_model(dir_or_hub_id: str | Path, dtype: str = "float32") -> GPTNeoX:
    """Load a base model from a folder in the hub's layout, or from a hub id.

    `dtype` is the type its weights are held and multiplied in: float32, bfloat16 or float16.
    Raises InputError when the folder, its config.json or its weights cannot be used.
    """
    folder = resolve_folder(dir_or_hub_id)
    config = read_model_config(folder, name=str(dir_or_hub_id))
    graph, abstract = nnx.split(_abstract_model(config))
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    for path, weight in stream_weights(folder, gpt_neox_table.TABLE, config.n_layer, weight_shapes(config)):
        leaves[path] = leaves[path].replace(jnp.asarray(weight, dtype))
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    return nnx.merge(graph, nnx.from_flat_state(dict(zip(paths, leaves.values(), strict=True))))


def copy_base_model(dir_or_hub_id: str, target: Path) -> None:
    """Write a base model as a new folder in the hub's layout, with bit-identical weights in safetensors files.

    Every weight goes through our names and back, so what this package cannot hold is refused. Raises InputError.
    """
    folder = resolve_folder(dir_or_hub_id)
    config = read_model_config(folder, name=dir_or_hub_id)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is not an empty folder")
    table = gpt_neox_table.TABLE
    write_weights(target, table, config.n_layer, stream_weights(folder, table, config.n_layer, weight_shapes(config)))
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".vocab", ".txt") and path.name != SHARD_INDEX:
            shutil.copy(path, target / path.name)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by our path."""
    state = nnx.to_flat_state(nnx.split(_abstract_model(config))[1])
    return {".".join(map(str, path)): leaf.shape for path, leaf in state}


def _abstract_model(config: ModelConfig) -> GPTNeoX:
    return nnx.eval_shape(lambda: GPTNeoX(config, nnx.Rngs(0)))
