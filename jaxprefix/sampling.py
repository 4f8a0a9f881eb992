"""Choose each row's next token from its logits: greedily, or at random, from all of them or from a nucleus."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprefix.inference_config import DecodeConfig
from jaxprefix.machine.devices import on_a_cpu
from jaxprefix.recipe import RECIPES

LIKELY = 4096
"""Tokens that a CPU sorts to find a nucleus without top_k: sorting all would take longer than running the model."""


class Sampling(NamedTuple):
    """The numbers that are inputs of the compiled loop, so that other values need no new program."""

    temperature: Float[Array, ""] | float
    top_p: Float[Array, ""] | float
    seed: Int[Array, ""] | np.uint32
    first_index: Int[Array, ""] | int
    """The index of the batch's first row among all prompts: a row's random numbers come from the seed and its index."""


def are_finite(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Tell for each row whether its largest logit is finite: any NaN or +∞ in the row would be the largest."""
    return jnp.isfinite(logits.max(axis=-1))


def choose_tokens(
    logits: Float[Array, "B V"], keys: Array, decode: DecodeConfig, sampling: Sampling
) -> Int[Array, "B"]:
    """Choose each row's next token by the decoding method; `keys` holds a random key per row."""
    if decode.decode_method == "greedy":
        below, n_tokens = logits < logits.max(axis=-1, keepdims=True), logits.shape[-1]
        return jnp.where(below, n_tokens, jnp.arange(n_tokens)).min(axis=-1)  # argmax takes four times as long on a CPU
    uniform = functools.partial(jax.random.uniform, dtype=jnp.float32)  # even where JAX has 64 bits enabled
    logits, numbers = logits / sampling.temperature, jax.vmap(uniform)(keys)
    if decode.decode_method == "sample":
        return draw(logits, numbers)

    drop_crossing = RECIPES[decode.recipe].drop_crossing_token

    def from_nucleus(logits: Float[Array, "B K"], ids: Int[Array, "B K"]) -> Int[Array, "B"]:
        return jnp.take_along_axis(ids, draw(logits, numbers)[:, None], axis=-1)[:, 0]

    if decode.top_k or logits.shape[-1] <= LIKELY or not on_a_cpu():
        return from_nucleus(*nucleus(logits, decode.top_k, sampling.top_p, drop_crossing))
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    likeliest, ids = nucleus(logits, LIKELY, sampling.top_p, drop_crossing, normaliser)
    return jax.lax.cond(
        jnp.isneginf(likeliest[:, -1]).all(),  # the last one is outside the nucleus, so all less likely ones are
        lambda: from_nucleus(likeliest, ids),
        lambda: from_nucleus(*nucleus(logits, 0, sampling.top_p, drop_crossing)),
    )


def draw(logits: Float[Array, "B K"], numbers: Float[Array, "B"]) -> Int[Array, "B"]:
    """Draw an index from each row's softmax with one number from [0, 1): the first one whose running sum passes it.

    `jax.random.categorical` needs a random number for each token, which takes a third of a step on a CPU.
    """
    weights, n_tokens = jnp.exp(logits - logits.max(axis=-1, keepdims=True)), logits.shape[-1]
    sums = jnp.cumsum(weights, axis=-1)  # added in blocks: they may fall again, also where weights are 0
    largest = jnp.where(weights > 0, sums, 0).max(axis=-1)
    below = jnp.nextafter(largest, 0)  # a product rounded up to the largest sum would pass at no index
    passed = (weights > 0) & (sums > jnp.minimum(numbers * largest, below)[:, None])
    return jnp.where(passed, jnp.arange(n_tokens), n_tokens - 1).min(axis=-1)


def nucleus(
    logits: Float[Array, "B V"],
    top_k: int,
    top_p: float | Float[Array, ""],
    drop_crossing: bool = False,
    normaliser: Float[Array, "B 1"] | None = None,
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Return the top_k (0: all) largest logits, the largest first, and their ids; −∞ for those outside the nucleus.

    The nucleus is the smallest set of them whose probabilities reach top_p (0 and 1: all; Holtzman et al.,
    arXiv:1904.09751). With `drop_crossing` the token that takes the sum beyond top_p is dropped, too, unless it is the
    likeliest, as in the original. Of equal logits the lower id comes first, also where top_k cuts. `normaliser` is the
    log of the sum of exponentials that probabilities are relative to: by default, the sum over those top_k.
    """
    n_tokens = logits.shape[-1]
    likeliest, ids = jax.lax.top_k(logits, min(top_k or n_tokens, n_tokens))
    probabilities = jax.nn.softmax(likeliest) if normaliser is None else jnp.exp(likeliest - normaliser)
    reached = jnp.cumsum(probabilities, axis=-1)
    outside = reached > top_p if drop_crossing else reached - probabilities >= top_p
    cuts = (top_p > 0) & (top_p < 1)  # the sum may round to 1 far before the last token
    return jnp.where(outside.at[:, 0].set(False) & cuts, -jnp.inf, likeliest), ids
