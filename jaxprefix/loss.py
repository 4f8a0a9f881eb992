"""Next-token cross entropy that never holds all logits in memory.

Legend: `models/attention.py`, and C: columns of a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprefix.data.rows import IGNORED
from jaxprefix.machine.devices import alone_on_a_cpu, on_a_cpu
from jaxprefix.models import BaseModel
from jaxprefix.models.attention import own_slots, positions_of
from jaxprefix.models.layers import einsum, matmul, vecdot
from jaxprefix.models.packing import unpack
from jaxprefix.prefix import Prefix

CHUNK_TOKENS = 2048
"""Tokens per device whose logits are in memory at once (up to twice as many); with fewer, products are slower."""
CPU_BLOCK = 2048
"""Rows of the head that a CPU multiplies at a time, so that their logits stay in its cache."""


def batch_loss(base: BaseModel, prefix: Prefix | None, batch: Any, n_devices: int = 1) -> Float[Array, ""]:
    """Return the cross entropy in nats of a `Batch` of JAX arrays after a prefix, summed over all labels."""
    positions = None
    if base.config.rotary_scaling == "dynamic" and batch.packing is None:  # this scaling depends on a row's end
        slots = own_slots(batch.tokens)
        last = jnp.where(batch.labels != IGNORED, slots, 0).max(axis=1, keepdims=True)
        positions = positions_of(jnp.minimum(slots, last), base.config.prefix_length(prefix))
    hidden, _ = base.hidden(batch.tokens, prefix, positions=positions, packing=batch.packing)
    hidden, labels = unpack(hidden, batch.labelled), unpack(batch.labels - IGNORED, batch.labelled) + IGNORED
    return next_token_loss(hidden, base.head_weight, labels, n_devices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def next_token_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], n_devices: int = 1
) -> Float[Array, ""]:
    """Return the cross entropy in nats, summed over all labels that are not IGNORED.

    Columns are processed in chunks, of at least CHUNK_TOKENS tokens for each of the `n_devices` that share the rows;
    on a CPU, chunks without a label are skipped. The head is frozen and gets no gradient. The hidden states' gradient
    is computed along with the loss, so that no logits are kept for a backward pass.
    """
    return _over_chunks(hidden, head, labels, n_devices, with_gradient=False)[0]


def _forward(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], n_devices: int
) -> tuple[Float[Array, ""], tuple[Float[Array, "B T D"]]]:
    total, gradients = _over_chunks(hidden, head, labels, n_devices, with_gradient=True)
    assert gradients is not None
    gradient = jnp.moveaxis(gradients, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (gradient[:, : hidden.shape[1]],)


def _backward(
    n_devices: int, residual: tuple[Float[Array, "B T D"]], factor: Float[Array, ""]
) -> tuple[Array, None, None]:
    (gradient,) = residual
    return (gradient * factor).astype(gradient.dtype), None, None


next_token_loss.defvjp(_forward, _backward)


def _over_chunks(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    n_devices: int,
    with_gradient: bool,
) -> tuple[Float[Array, ""], Float[Array, "chunks B C D"] | None]:
    def compute(chunk: tuple[Array, Array]) -> tuple[Array, Array | None]:
        return _chunk_loss(chunk[0], head, chunk[1], with_gradient)

    def skip(chunk: tuple[Array, Array]) -> tuple[Array, Array | None]:
        return jnp.float32(0), jnp.zeros_like(chunk[0]) if with_gradient else None

    def add(total: Float[Array, ""], chunk: tuple[Array, Array]) -> tuple[Float[Array, ""], Array | None]:
        if on_a_cpu():
            loss, gradient = jax.lax.cond((chunk[1] != IGNORED).any(), compute, skip, chunk)
        else:  # a GPU would wait for the host to choose
            loss, gradient = compute(chunk)
        return total + loss, gradient

    return jax.lax.scan(add, jnp.float32(0), _in_chunks(hidden, labels, n_devices))


def _chunk_loss(
    hidden: Float[Array, "B C D"], head: Float[Array, "V D"], labels: Int[Array, "B C"], with_gradient: bool
) -> tuple[Float[Array, ""], Float[Array, "B C D"] | None]:
    """Return the summed loss of a chunk and its gradient with respect to the hidden states.

    The gradient is p·W − W[target], where p are the probabilities: no one-hot array, no scatter.
    """
    is_label = labels != IGNORED
    normaliser, expected = _softmax_over_vocabulary(hidden, head, with_gradient)
    target = head[jnp.where(is_label, labels, 0)].astype(jnp.float32)
    losses = normaliser - vecdot(hidden.astype(jnp.float32), target)
    if expected is not None:
        expected = jnp.where(is_label[..., None], expected - target, 0).astype(hidden.dtype)
    return jnp.sum(losses, where=is_label), expected


def _softmax_over_vocabulary(
    hidden: Float[Array, "B C D"], head: Float[Array, "V D"], with_expected: bool
) -> tuple[Float[Array, "B C"], Float[Array, "B C D"] | None]:
    """Return the log of the summed exponentials of all logits, and the head's rows weighted by their probabilities.

    That is attention with the head as both keys and values. The head is taken in blocks, with the running maximum and
    sums of an online softmax (Milakov & Gimelshein, arXiv:1805.02867).
    """
    Sums = tuple[Float[Array, "B C"], Float[Array, "B C"], Float[Array, "B C D"] | None]

    def add(block: Float[Array, "block D"], sums: Sums) -> Sums:
        highest, total, expected = sums
        logits = matmul(hidden, block)
        raised = jnp.maximum(highest, logits.max(axis=-1))
        weights, shrink = jnp.exp(logits - raised[..., None]), jnp.exp(highest - raised)
        if expected is not None:  # multiplied in the head's type: half precision is faster
            expected = expected * shrink[..., None] + einsum("bcv,vd->bcd", weights.astype(head.dtype), block)
        return raised, total * shrink + weights.sum(axis=-1), expected

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    sums = (jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0], zeros if with_expected else None)
    block_size = min(CPU_BLOCK, len(head)) if alone_on_a_cpu() else len(head)
    n_blocks, n_left = divmod(len(head), block_size)

    def add_one(index: Int[Array, ""], sums: Sums) -> Sums:
        # XLA's CPU backend cannot slice bfloat16 and would hoist a float32 copy of the whole head out of the loop; the
        # barrier makes the head depend on the index, which prevents that.
        index, here = jax.lax.optimization_barrier((index, head))
        return add(jax.lax.dynamic_slice_in_dim(here, index * block_size, block_size), sums)

    sums = jax.lax.fori_loop(0, n_blocks, add_one, sums)
    highest, total, expected = add(head[-n_left:], sums) if n_left else sums
    return highest + jnp.log(total), expected if expected is None else expected / total[..., None]


def _in_chunks(hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], n_devices: int) -> tuple[Array, Array]:
    """Cut the columns into chunks: [chunks, B, C, D] and [chunks, B, C]. Every row stays on its device."""
    n_rows, n_columns, width = hidden.shape
    n_chunks = max(1, n_rows * n_columns // (CHUNK_TOKENS * n_devices))
    chunk = -(-n_columns // n_chunks)
    n_chunks = -(-n_columns // chunk)
    padding = chunk * n_chunks - n_columns
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORED)
    cut = (n_rows, n_chunks, chunk)
    return jnp.moveaxis(hidden.reshape(*cut, width), 1, 0), jnp.moveaxis(labels.reshape(cut), 1, 0)
