"""Packed rows: everything but attention takes a batch's texts end to end, attention each on its own row.

So no position is computed for padding but in attention, which is the smallest part of short rows, and needs no mask for
where a text begins. R texts of C slots lie in each of B rows of T tokens; the rest of the legend: `attention.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxprefix.batches import Packing


def unpack(x: Shaped[Array, "B T *rest"], packing: Packing | None) -> Shaped[Array, "BR C *rest"]:
    """Give every text a row of its own, padded with zeros; without packing each has one."""
    if packing is None:
        return x
    n_rows, n_texts, n_slots = packing.columns.shape
    taken = _take(x, packing.columns.reshape(n_rows, -1), packing.places)
    return taken.reshape(n_rows * n_texts, n_slots, *x.shape[2:])


def pack(x: Shaped[Array, "BR C *rest"], packing: Packing | None) -> Shaped[Array, "B T *rest"]:
    """Lay the texts' rows end to end again."""
    if packing is None:
        return x
    n_rows = len(packing.places)
    return _take(x.reshape(n_rows, -1, *x.shape[2:]), packing.places, packing.columns.reshape(n_rows, -1))


@jax.custom_vjp
def _take(
    x: Shaped[Array, "B A *rest"], index: Int[Array, "B K"], way_back: Int[Array, "B A"]
) -> Shaped[Array, "B K *rest"]:
    """Take each row's vectors by index, zeros beyond the end. The gradient is taken by the way back: no scatter."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _forward(x: Array, index: Array, way_back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, index, way_back), (index, way_back)


def _backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, way_back = indices
    return _take(gradient, way_back, index), None, None


_take.defvjp(_forward, _backward)
