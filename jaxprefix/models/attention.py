"""Attention of tokens over a prefix and over themselves: the one place where prefix meets tokens.

Legend, used in types, einsum strings and comments of the whole package:
    B batch · T tokens · P prefix length · S keys of tokens (T, or the cache length) · L layers
    N heads · H head dim · D embed · F mlp · V vocab

A prefix is `Float[Array, "L 2 P N H"]`: for every layer the P keys (index 0) and values (index 1) that
stand in front of the tokens. It has no batch axis; it is broadcast in the einsums below.
Its keys enter un-rotated. Tokens sit at positions P, P+1, …, see `positions_of`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

LayerPrefix = Float[Array, "2 P N H"]
LayerCache = tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]
Cache = tuple[LayerCache, ...]


def positions_of(
    slots: Int[Array, "B T"], prefix: Float[Array, "L 2 P N H"] | None, starts: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Turn each token's index in its row, from the start of its text, into its position behind the prefix."""
    in_text = slots if starts is None else slots - starts
    return in_text if prefix is None else in_text + prefix.shape[2]


def empty_cache(n_layer: int, shape: tuple[int, int, int, int], dtype: DTypeLike) -> Cache:
    """Make zeroed keys and values of shape [B, S, N, H] for every layer."""
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_layer))


def write_cache(
    cache: LayerCache, k: Float[Array, "B T N H"], v: Float[Array, "B T N H"], slots: Int[Array, "B T"]
) -> LayerCache:
    """Put the new keys and values at their rows' slots."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return cache[0].at[rows, slots].set(k), cache[1].at[rows, slots].set(v)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    prefix: LayerPrefix | None,
    slots: Int[Array, "B T"],
    starts: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over the whole prefix and over the keys at slots up to the query's own.

    Slots after the query's own (later tokens, padding on the right, unused cache) are invisible, and those before
    `starts`, where the query's text begins in a row of several. Scores, multiplied by `scale` (1/√H unless given),
    and softmax are float32, whatever the inputs are.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    token_scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * scale
    key_slots = jnp.arange(k.shape[1])
    visible = key_slots <= slots[:, None, :, None]
    if starts is not None:
        visible &= key_slots >= starts[:, None, :, None]
    token_scores = jnp.where(visible, token_scores, -jnp.inf)
    if prefix is None:
        weights = jax.nn.softmax(token_scores).astype(v.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    prefix_k, prefix_v = prefix.astype(k.dtype)
    prefix_scores = jnp.einsum("btnh,pnh->bntp", q, prefix_k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, token_scores], axis=-1)).astype(v.dtype)
    prefix_weights, token_weights = jnp.split(weights, [prefix_k.shape[0]], axis=-1)
    from_prefix = jnp.einsum("bntp,pnh->btnh", prefix_weights, prefix_v)
    return from_prefix + jnp.einsum("bnts,bsnh->btnh", token_weights, v)
