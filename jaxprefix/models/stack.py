"""The layers of a model, one after the other: unrolled, or one compiled layer in a loop. Legend: `attention.py`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from convert.errors import InputError
from jaxprefix.models.attention import Cache, LayerCache, LayerPrefix, Prefix
from jaxprefix.models.layers import after, scanned_dtype


def run_layers(
    layers: Any,
    x: Float[Array, "B T D"],
    prefix: Prefix | None,
    cache: Cache | None,
    shared: tuple[Any, ...],
    recompute: bool,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Run x through all layers, as layer(x, its prefix, its cache, *shared); return the result and the written caches.

    `layers` is a list of layers, to unroll, or a layer that `stacked` made, to scan. With `recompute` the backward pass
    keeps only each layer's input.
    """
    if not isinstance(layers, nnx.List):

        def scan_step(x: Array, at_layer: tuple[Any, ...]) -> tuple[Array, LayerCache]:
            layer, *own = at_layer
            return _run(layer, x, *own, shared, recompute)

        caches = None if cache is None else jax.tree.map(lambda *each: jnp.stack(each), *cache)
        x, (keys, values) = jax.lax.scan(scan_step, x, (layers, prefix, caches))
        return x, tuple(zip(keys, values, strict=True))

    written: list[LayerCache] = []
    for index, layer in enumerate(layers):
        with jax.named_scope(f"layer_{index}"):
            own_prefix, own_cache = (None if part is None else part[index] for part in (prefix, cache))
            own_prefix = summed_at_once(own_prefix) if recompute else own_prefix
            x, layer_cache = _run(layer, x, own_prefix, own_cache, shared, recompute)
        written.append(layer_cache)
    return x, tuple(written)


@jax.custom_vjp
def summed_at_once(prefix: LayerPrefix | None) -> LayerPrefix | None:
    """Return a layer's prefix, and sum its gradient over rows as soon as the layer's backward pass is done.

    XLA would sum the gradients of all layers together at the end, and keep their terms till then: 3.4 GiB for NeoX-20B.
    """
    return prefix


def _summed_forward(prefix: LayerPrefix | None) -> tuple[LayerPrefix | None, None]:
    return prefix, None


def _summed_backward(_: None, gradient: LayerPrefix | None) -> tuple[LayerPrefix | None]:
    return (jax.lax.optimization_barrier(gradient),)


summed_at_once.defvjp(_summed_forward, _summed_backward)


@jax.custom_jvp
def differentiated_once(gradient: Array) -> Array:
    """Return a gradient that refuses a second derivative: layers that keep bits would silently lose part of it."""
    return gradient


@differentiated_once.defjvp
def _not_twice(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("second derivatives in bfloat16 on a CPU; float32 and float16 have them")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that a layer's backward pass needs, in the type in which a loop keeps it: see `scanned_dtype`."""

    array: Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, array: Array) -> "Kept":
        """Convert an array to the form in which it is kept."""
        return cls(array.view(scanned_dtype(array)), array.dtype)

    @property
    def numbers(self) -> Array:
        """The array again."""
        return self.array.view(self.dtype)


@partial(jax.jit, static_argnames="recompute")
def _run(
    layer: Any,
    x: Float[Array, "B T D"],
    prefix: LayerPrefix | None,
    cache: LayerCache | None,
    shared: tuple[Any, ...],
    recompute: bool,
) -> tuple[Float[Array, "B T D"], LayerCache]:
    """Run one layer. Jitted on its own, so that layers which differ only in their arrays are traced once."""
    return _with_frozen_weights(recompute)(layer, x, prefix, cache, shared)


def _with_frozen_weights(recompute: bool) -> Callable[..., Any]:
    """Return a function that runs a layer and differentiates only towards x, the prefix and the cache.

    What its backward pass keeps (with `recompute`, the inputs) waits behind a barrier for the incoming gradient, so
    that fsdp gathers the layer's weights again instead of keeping them.
    """

    def run(layer: Any, x: Any, prefix: Any, cache: Any, shared: tuple[Any, ...]) -> Any:
        return layer(x, prefix, cache, *shared)

    def differentiated(layer: Any, x: Any, prefix: Any, cache: Any, shared: tuple[Any, ...]) -> tuple[Any, Any]:
        return jax.vjp(lambda x, prefix, cache: run(layer, x, prefix, cache, shared), x, prefix, cache)

    def forward(*inputs: Any) -> tuple[Any, Any]:
        out, kept = (run(*inputs), inputs) if recompute else differentiated(*inputs)
        return out, jax.tree.map(Kept.of, kept)

    def backward(kept: Any, gradients: tuple[Array, LayerCache]) -> tuple[Any, ...]:
        arrays, structure = jax.tree.flatten(kept, is_leaf=lambda node: isinstance(node, Kept))
        kept = jax.tree.unflatten(structure, [array.numbers for array in arrays])
        towards_x, towards_cache = gradients  # the cache's stays outside the barrier: in training, it is zeros
        if any(array.array.dtype != array.dtype for array in arrays):
            towards_x = differentiated_once(towards_x)
        kept, towards_x = jax.lax.optimization_barrier((kept, towards_x))
        pull_back = kept
        if recompute:
            layer, x, *rest = kept
            _, pull_back = differentiated(layer, after(towards_x, x), *rest)
        return None, *pull_back((towards_x, towards_cache)), None

    frozen = jax.custom_vjp(run)
    frozen.defvjp(forward, backward)
    return frozen


def stacked(layers: Any) -> Any:
    """Return one layer, to scan, with the shapes of the given layers and the number of layers as their first axis.

    Raises InputError if the layers differ in more than their weights.
    """
    if len({jax.tree.structure(layer) for layer in layers}) > 1:
        raise InputError("--scan_layers: the layers of this base model differ in more than their weights")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype), layers[0])
