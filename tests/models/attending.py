"""Attention over whole rows as tests compare it: its outputs with its gradients."""

import jax
import jax.numpy as jnp

from jaxprefix.models.attention import attend, heads_first
from tests.arrays import normals


def attended(q, k, v, prefix, *options):
    """`attend`, with k and v laid out as q is."""
    return attend(q, heads_first(k), heads_first(v), prefix, *options)


def outputs_and_gradients(function, *inputs):
    """Outputs, and the gradients of their sum, weighed at random, towards every input."""

    def weighed(inputs):
        out = function(*inputs)
        return jnp.sum(out * normals(out.shape, seed=1)[0]), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighed, has_aux=True))(inputs)
    return [out, *jax.tree.leaves(gradients)]
