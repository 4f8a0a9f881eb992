"""Packed rows: attention takes each text on a row of its own, everything else takes a row's texts end to end.

So only attention, the smallest part of the work for short rows, computes padding, and it needs no mask for where a text
begins. A row of T tokens has room for R texts of C slots in each class of lengths, and each class has its own R and C;
the slots of all its texts, one after another, are the row's places. The rest of the legend: `attention.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxprefix.data.batches import Packing


def on_texts(function: Callable[..., Any], packing: Packing | None, *arrays: Shaped[Array, "B T ..."]) -> Any:
    """Apply a function of arrays [rows, slots, ...] to packed texts, each on a row of its own: [BR, C, ...].

    It is called once for each class of lengths. The arrays that it returns, with the same rows and slots, are laid end
    to end again. Without packing, each row is a text already.
    """
    if packing is None:
        return function(*arrays)
    unpacked, made, start = [unpack(x, packing) for x in arrays], [], 0
    for n_rows, n_texts, n_slots in (columns.shape for columns in packing.columns):
        end = start + n_texts * n_slots
        texts = (x[:, start:end].reshape(n_rows * n_texts, n_slots, *x.shape[2:]) for x in unpacked)
        made.append(jax.tree.map(partial(_by_rows, n_rows), function(*texts)))
        start = end
    return jax.tree.map(lambda *classes: pack(jnp.concatenate(classes, axis=1), packing), *made)


def _by_rows(n_rows: int, x: Shaped[Array, "BR C *rest"]) -> Shaped[Array, "B places *rest"]:
    """Lay the texts of each row one after another; without a -1, since x is empty if no dimension of a head rotates."""
    return x.reshape(n_rows, x.shape[0] // n_rows * x.shape[1], *x.shape[2:])


def unpack(x: Shaped[Array, "B T *rest"], packing: Packing | None) -> Shaped[Array, "B places *rest"]:
    """Put every text into its places, padded with zeros; without packing, return x."""
    return x if packing is None else _take(x, _columns_of_places(packing), packing.places)


def pack(x: Shaped[Array, "B places *rest"], packing: Packing) -> Shaped[Array, "B T *rest"]:
    """Lay the texts end to end again."""
    return _take(x, packing.places, _columns_of_places(packing))


def _columns_of_places(packing: Packing) -> Int[Array, "B places"]:
    return jnp.concatenate([columns.reshape(len(columns), -1) for columns in packing.columns], axis=1)


@jax.custom_vjp
def _take(
    x: Shaped[Array, "B A *rest"], index: Int[Array, "B K"], way_back: Int[Array, "B A"]
) -> Shaped[Array, "B K *rest"]:
    """Take each row's vectors by index, zeros beyond the end; `way_back`, the inverse index, gathers the gradient."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _forward(x: Array, index: Array, way_back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, index, way_back), (index, way_back)


def _backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, way_back = indices
    return _take(gradient, way_back, index), None, None


_take.defvjp(_forward, _backward)
