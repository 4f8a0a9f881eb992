"""Frozen base models: Flax NNX modules whose weights come from a folder in the hub's layout."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from convert import gpt_neox as gpt_neox_table
from convert.table import stream_weights
from jaxprefix.hub import resolve_folder
from jaxprefix.models.config import read_model_config
from jaxprefix.models.gpt_neox import GPTNeoX


def load_model(dir_or_hub_id: str | Path, dtype: str = "float32") -> GPTNeoX:
    """Load a base model from a folder in the hub's layout, or from a hub id.

    `dtype` is the type its weights are held and multiplied in: float32, bfloat16 or float16.
    Raises InputError when the folder, its config.json or its weights cannot be used.
    """
    folder = resolve_folder(dir_or_hub_id)
    config = read_model_config(folder, name=str(dir_or_hub_id))
    graph, abstract = nnx.split(nnx.eval_shape(lambda: GPTNeoX(config, nnx.Rngs(0))))
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    for path, weight in stream_weights(folder, gpt_neox_table.TABLE, config.n_layer, shapes):
        leaves[path] = leaves[path].replace(jnp.asarray(weight, dtype))
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    return nnx.merge(graph, nnx.from_flat_state(dict(zip(paths, leaves.values(), strict=True))))
