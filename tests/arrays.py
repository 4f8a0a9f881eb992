"""Random arrays, made by NumPy: `jax.random` takes the compiler seconds for every shape."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprefix.models.config import ModelConfig

TOKENS = jnp.asarray(np.random.default_rng(3).integers(4, 440, (2, 24)))
"""Two rows of ids."""


def normals(*shapes: tuple[int, ...], dtype: jnp.dtype = jnp.float32, seed: int = 0) -> list[jax.Array]:
    """Arrays of std 1."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]


def empty_cache(config: ModelConfig, n_slots: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Zeros for the keys and values [B, N, S, H] of two rows in every layer."""
    zeros = jnp.zeros((2, config.n_head, n_slots, config.head_dim))
    return ((zeros, zeros),) * config.n_layer


def random_prefix(config: ModelConfig, length: int = 7, seed: int = 1) -> jax.Array:
    """A prefix [L, 2, P, N, H] of std 1."""
    return normals((config.n_layer, 2, length, config.n_head, config.head_dim), seed=seed)[0]
