"""Next-token cross entropy over the labels that count, and the scale of float16 losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprefix.data import IGNORED


def next_token_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the cross entropy in nats summed over all labels that are not IGNORED, and their number."""
    counts = labels != IGNORED
    targets = jnp.where(counts, labels, 0)[..., None]
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0]
    return jnp.sum(losses, where=counts), counts.sum()


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
