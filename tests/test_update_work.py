"""What an update computes, by its compiled program: twice the loss, and nothing towards the base's weights."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import model_config, neox
from jaxprefix.check import compiled_update
from jaxprefix.config import TrainConfig
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.loss import next_token_loss
from jaxprefix.models import abstract_model, layers, stack, weight_shapes

# No two axes of an activation are the two of a weight: its rows, heads and tokens have other sizes.
MODEL = model_config(neox(3, 256, 4, 3072, intermediate_size=896))
PREFIX = jax.ShapeDtypeStruct((3, 2, 10, 4, 64), jnp.float32)
ROWS = jax.ShapeDtypeStruct((8, 64), jnp.int32)


def compiled_train_step(n_tokens, n_labels=None):
    return compiled_update(TrainConfig("base", Path(), "run"), MODEL, PaddedShape(8, n_tokens, n_labels))


def summed_loss(base, prefix, tokens, labels):
    return next_token_loss(base.hidden(tokens, prefix)[0], base.head_weight, labels)


def flops(compiled) -> float:
    return compiled.cost_analysis()["flops"]


def test_an_update_computes_about_twice_what_the_loss_does():
    loss = jax.jit(summed_loss).lower(abstract_model(MODEL), PREFIX, ROWS, ROWS).compile()
    n_weights = sum(np.prod(shape) for path, shape in weight_shapes(MODEL).items() if path != "embed.weight")
    n_tokens = np.prod(ROWS.shape)
    assert flops(loss) < 1.1 * 2 * n_weights * n_tokens  # matrix products are nearly all of it
    assert flops(loss) > 2 * n_weights * n_tokens
    assert flops(compiled_train_step(64)) < 2.1 * flops(loss)


def test_the_head_is_computed_for_labelled_columns_alone():
    """Two products, each of two operations a weight."""
    spared = flops(compiled_train_step(64)) - flops(compiled_train_step(64, n_labels=16))
    assert spared == pytest.approx(2 * 2 * MODEL.vocab_size * MODEL.n_embd * 8 * (64 - 16), rel=0.05)


def products_of_weight_shapes(program) -> set[tuple[int, int]]:
    """Shapes of a base weight, transposed or not, that come out of a program's matrix products."""
    weights = {shape for shape in weight_shapes(MODEL).values() if len(shape) == 2}
    made = set()
    for line in program.splitlines():
        found = re.search(r"= \w+\[(\d+),(\d+)\]", line)
        if found and re.search(r"\bdot\(|dot_general", line):
            made.add(tuple(map(int, found.groups())))
    assert (512, 896) in made  # the activations, so lines are understood
    return {shape for shape in weights if shape in made or shape[::-1] in made}


def test_no_matrix_product_of_an_update_makes_a_gradient_of_a_base_weight():
    assert not products_of_weight_shapes(compiled_train_step(64).as_text())


def test_such_products_would_be_found(monkeypatch, traced_anew):
    def unfrozen(layer, x, prefix, cache, shared):
        return layer(x, prefix, cache, *shared)

    monkeypatch.setattr(layers, "frozen_matmul", lambda x, weight: layers.matmul(x, weight).astype(x.dtype))
    monkeypatch.setattr(stack, "_with_frozen_weights", lambda _: unfrozen)
    gradient = jax.jit(jax.grad(summed_loss, argnums=(0, 1)))
    program = gradient.lower(abstract_model(MODEL), PREFIX, ROWS, ROWS).compile().as_text()
    assert products_of_weight_shapes(program) == {(768, 256), (256, 256), (896, 256), (256, 896)}
