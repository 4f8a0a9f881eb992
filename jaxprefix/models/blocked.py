"""Attention of long rows, a block of queries at a time (flash attention, arXiv:2205.14135). Legend: `attention.py`."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprefix.models.layers import after, einsum, vecdot

BLOCK = 256
"""Queries in a block: with fewer, the products are small; with more, scores are wasted on hidden keys."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_in_blocks(
    q: Float[Array, "B N T H"], k: Float[Array, "B N keys H"], v: Float[Array, "B N keys H"], scale: float
) -> Float[Array, "B N T H"]:
    """Compute causal attention, aligned at the end: the last query sees all keys, the one before it all but the last.

    No array has T × keys numbers. One block of queries after another is multiplied with the keys that its last query
    sees. The backward pass recomputes the weights; besides q, k and v it keeps only the output and the logarithm of
    each query's sum of exponentials. (Flash kernels also cut keys into blocks, for memory that cannot hold a row.)
    """
    return _forward(q, k, v, scale)[0]


def _forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    outs: list[Array] = []
    log_sums: list[Array] = []
    for own, seen in _blocks(q, k):
        own_q = _in_turn(outs, q[:, :, own])
        scores = _scores(own_q, k[:, :, seen], scale)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest).astype(v.dtype)
        # Sums the rounded weights: with any other sum, the values' mean would leak into the gradients of q and k.
        total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        outs.append(einsum("bnts,bnsh->bnth", weights, v[:, :, seen]) / total)
        log_sums.append(largest + jnp.log(total))
    out, log_sum = (jnp.concatenate(blocks, axis=2) for blocks in (outs, log_sums))
    return out.astype(v.dtype), (q, k, v, out, log_sum)


def _backward(scale: float, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, log_sum = kept
    q = after(gradient, q)  # or the forward pass's scores of the first block would be kept
    along = vecdot(gradient, out)[..., None]  # in float32: it is subtracted from something about as large
    towards_q: list[Array] = []
    towards_k, towards_v = jnp.zeros(k.shape), jnp.zeros(v.shape)
    for own, seen in _blocks(q, k):
        own_q, own_gradient = (_in_turn(towards_q, x[:, :, own]) for x in (q, gradient))
        seen_k, seen_v = k[:, :, seen], v[:, :, seen]
        weights = jnp.exp(_scores(own_q, seen_k, scale) - log_sum[:, :, own])
        towards_weights = einsum("bnth,bnsh->bnts", own_gradient, seen_v)
        towards_scores = (weights * (towards_weights - along[:, :, own])).astype(q.dtype)
        towards_q.append((einsum("bnts,bnsh->bnth", towards_scores, seen_k) * scale).astype(q.dtype))
        towards_k = towards_k.at[:, :, seen].add(einsum("bnts,bnth->bnsh", towards_scores, own_q) * scale)
        towards_v = towards_v.at[:, :, seen].add(einsum("bnts,bnth->bnsh", weights.astype(v.dtype), own_gradient))
    return jnp.concatenate(towards_q, axis=2), towards_k.astype(k.dtype), towards_v.astype(v.dtype)


attend_in_blocks.defvjp(_forward, _backward)


def _blocks(q: Float[Array, "B N T H"], k: Float[Array, "B N keys H"]) -> Iterator[tuple[slice, slice]]:
    """Yield each block's own queries, and the keys that they see."""
    n_tokens, n_keys = q.shape[2], k.shape[2]
    for start in range(0, n_tokens, BLOCK):
        end = start + BLOCK  # the last block's slices end where q and k do
        yield slice(start, end), slice(n_keys - n_tokens + end)


def _in_turn(done: list[Float[Array, "B N _ H"]], x: Float[Array, "B N own H"]) -> Float[Array, "B N own H"]:
    """Return x, available only once the previous block is done, or XLA would compute the scores of all blocks first."""
    return after(jnp.broadcast_to(done[-1][:, :, :1, :1], x.shape), x) if done else x


def _scores(q: Float[Array, "B N own H"], k: Float[Array, "B N seen H"], scale: float) -> Float[Array, "B N own seen"]:
    """Return a block's scores, −∞ for keys after a query's own; the last query's own key is the last one."""
    n_own, n_seen = q.shape[2], k.shape[2]
    visible = jnp.tri(n_own, n_seen, n_seen - n_own, dtype=bool)
    return jnp.where(visible, einsum("bnth,bnsh->bnts", q, k) * scale, -jnp.inf)
