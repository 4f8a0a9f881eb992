"""Next-token cross entropy without all logits in memory; the scale of float16 losses. Legend: `models/attention.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprefix.data import IGNORED
from jaxprefix.models.layers import matmul

CHUNK_TOKENS = 2048
"""Tokens whose logits are in memory at a time; fewer make the matrix products slow."""


def next_token_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the cross entropy in nats summed over all labels that are not IGNORED, and their number.

    Columns are taken in chunks of about CHUNK_TOKENS tokens over the whole vocabulary; a chunk without a
    label is skipped. The head is frozen: its gradient is not computed, and the hidden states' is computed
    along with the loss, so that no logits wait for a backward pass.
    """
    return _summed_loss(hidden, head, labels), (labels != IGNORED).sum()


@jax.custom_vjp
def _summed_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"]
) -> Float[Array, ""]:
    def add(total: Float[Array, ""], chunk: tuple[Array, Array]) -> tuple[Float[Array, ""], None]:
        loss = jax.lax.cond((chunk[1] != IGNORED).any(), lambda c: _chunk_loss(c[0], head, c[1])[0], _nothing, chunk)
        return total + loss, None

    return jax.lax.scan(add, jnp.float32(0), _in_chunks(hidden, labels))[0]


def _forward(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], tuple[Float[Array, "B T D"]]]:
    def with_gradient(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        loss, probabilities, target = _chunk_loss(chunk[0], head, chunk[1])
        # The gradient towards the logits is p − 1 at the target and p elsewhere; its product with the head is taken
        # in the head's type, which in half precision is the faster one.
        expected = jnp.einsum("bcv,vd->bcd", probabilities.astype(head.dtype), head, preferred_element_type=jnp.float32)
        gradient = jnp.where((chunk[1] != IGNORED)[..., None], expected - target, 0)
        return loss, gradient.astype(hidden.dtype)

    def skipped(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.float32(0), jnp.zeros_like(chunk[0])

    def add(total: Float[Array, ""], chunk: tuple[Array, Array]) -> tuple[Float[Array, ""], Array]:
        loss, gradient = jax.lax.cond((chunk[1] != IGNORED).any(), with_gradient, skipped, chunk)
        return total + loss, gradient

    total, gradients = jax.lax.scan(add, jnp.float32(0), _in_chunks(hidden, labels))
    gradient = jnp.moveaxis(gradients, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return total, (gradient[:, : hidden.shape[1]],)


def _backward(residual: tuple[Float[Array, "B T D"]], factor: Float[Array, ""]) -> tuple[Array, None, None]:
    (gradient,) = residual
    return (gradient * factor).astype(gradient.dtype), None, None


_summed_loss.defvjp(_forward, _backward)


def _chunk_loss(
    hidden: Float[Array, "B C D"], head: Float[Array, "V D"], labels: Int[Array, "B C"]
) -> tuple[Float[Array, ""], Float[Array, "B C V"], Float[Array, "B C D"]]:
    """Return the summed loss of a chunk, the probabilities of all tokens, and the head's rows of the targets."""
    counts = labels != IGNORED
    logits = matmul(hidden, head)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = head[jnp.where(counts, labels, 0)].astype(jnp.float32)
    losses = normaliser - jnp.einsum("bcd,bcd->bc", hidden, target, preferred_element_type=jnp.float32)
    return jnp.sum(losses, where=counts), jnp.exp(logits - normaliser[..., None]), target


def _in_chunks(hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Cut the columns into chunks: [chunks, B, C, D] and [chunks, B, C]; rows stay whole, and where they are."""
    n_rows, n_columns, width = hidden.shape
    n_chunks = max(1, n_rows * n_columns // CHUNK_TOKENS)
    chunk = -(-n_columns // n_chunks)
    padding = chunk * n_chunks - n_columns
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORED)
    cut = (n_rows, n_chunks, chunk)
    return jnp.moveaxis(hidden.reshape(*cut, width), 1, 0), jnp.moveaxis(labels.reshape(cut), 1, 0)


def _nothing(_: tuple[Array, Array]) -> Float[Array, ""]:
    return jnp.float32(0)


class LossScale(NamedTuple):
    """A factor on the loss that keeps float16 gradients from vanishing, adapted as training goes on.

    Starts at 2^10; halves when a gradient overflows (that update is skipped), doubles after 1000 that did not.
    """

    value: Float[Array, ""]
    n_good: Int[Array, ""]

    @classmethod
    def start(cls) -> "LossScale":
        """Return the scale of the first update."""
        return cls(jnp.float32(2**10), jnp.int32(0))

    def adjusted(self, finite: Bool[Array, ""]) -> "LossScale":
        """Return the scale for the next update, given whether this one's gradients were finite."""
        grow = finite & (self.n_good + 1 >= 1000)
        value = jnp.where(finite, jnp.where(grow, self.value * 2, self.value), jnp.maximum(self.value / 2, 1))
        return LossScale(value, jnp.where(finite & ~grow, self.n_good + 1, 0))
