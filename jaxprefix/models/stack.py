"""The layers of a model, one after the other: unrolled, or one compiled layer in a loop. Legend: `attention.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from convert.errors import InputError
from jaxprefix.models.attention import Cache, LayerCache, LayerPrefix

Step = Callable[
    [Any, Float[Array, "B T D"], LayerPrefix | None, LayerCache | None], tuple[Float[Array, "B T D"], LayerCache]
]


def run_layers(
    layers: Any,
    step: Step,
    x: Float[Array, "B T D"],
    prefix: Float[Array, "L 2 P N H"] | None,
    cache: Cache | None,
    recompute: bool,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Send x through all layers by step(layer, x, its prefix, its cache); return the result and the written caches.

    `layers` is a list of them, unrolled, or what `stacked` makes, scanned. With `recompute` the backward pass keeps
    nothing of a layer but its input.
    """
    step = jax.checkpoint(step) if recompute else step
    if not isinstance(layers, nnx.List):

        def one(x: Array, layer: tuple[Any, ...]) -> tuple[Array, LayerCache]:
            return step(layer[0], x, *layer[1:])

        caches = None if cache is None else jax.tree.map(lambda *each: jnp.stack(each), *cache)
        x, (keys, values) = jax.lax.scan(one, x, (layers, prefix, caches))
        return x, tuple(zip(keys, values, strict=True))

    written: list[LayerCache] = []
    for index, layer in enumerate(layers):
        with jax.named_scope(f"layer_{index}"):
            x, layer_cache = step(
                layer, x, None if prefix is None else prefix[index], None if cache is None else cache[index]
            )
        written.append(layer_cache)
    return x, tuple(written)


def stacked(layers: Any) -> Any:
    """Return, for a list of layers, one whose arrays hold all of theirs along a new first axis.

    Raises InputError if the layers differ in more than their arrays.
    """
    graphs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
    if any(graph != graphs[0] for graph in graphs):
        raise InputError("--scan_layers: the layers of this base model differ in more than their weights")
    leaves = [jax.tree.leaves(state) for state in states]
    structure = jax.tree.structure(states[0])
    del layers, states
    whole = []
    for index in range(len(leaves[0])):  # one weight after the other, so that not all are there twice
        whole.append(jnp.stack([layer[index] for layer in leaves]))
        for layer in leaves:
            layer[index] = None
    return nnx.merge(graphs[0], jax.tree.unflatten(structure, whole))
