"""Attention of long rows in blocks is that with all scores in memory, without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprefix import load_model
from jaxprefix.config import Compute
from jaxprefix.data.batches import make_packed_batch
from jaxprefix.data.shapes import PackedShape
from jaxprefix.loss import batch_loss
from jaxprefix.models import attention, blocked
from jaxprefix.models.attention import attend, own_slots
from tests.arrays import normals, random_prefix
from tests.examples import EXAMPLES
from tests.models.attending import attended, outputs_and_gradients
from tests.tolerances import FUNCTION, HALF_GRADIENT, MODEL

BLOCK = 8


@pytest.fixture
def short_blocks(monkeypatch, traced_anew):
    """Every row that is whole is a long one, of several blocks; returns what was attended to in blocks."""
    shapes = []

    def noted(q, *rest):
        shapes.append(q.shape)
        return blocked.attend_in_blocks(q, *rest)

    monkeypatch.setattr(attention, "attend_in_blocks", noted)
    monkeypatch.setattr(attention, "LONG_ROW", 1)
    monkeypatch.setattr(blocked, "BLOCK", BLOCK)
    return shapes


in_blocks = attended


def whole(q, k, v, prefix):
    return attended(q, k, v, prefix, own_slots(q))


def heads_of(n_tokens, n_prefix):
    """q, k, v [2, n_tokens, 4, 16] and a layer's prefix."""
    fronts = [] if n_prefix is None else [(2, n_prefix, 4, 16)]
    *rows, prefix = [*normals(*[(2, n_tokens, 4, 16)] * 3, *fronts), *([None] if n_prefix is None else [])]
    return *rows, prefix


@pytest.mark.parametrize("n_tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 30], ids="{} tokens".format)
@pytest.mark.parametrize("n_prefix", [None, 0, 7], ids="prefix {}".format)
def test_outputs_and_gradients_are_those_of_all_scores_in_memory(short_blocks, n_tokens, n_prefix):
    inputs = heads_of(n_tokens, n_prefix)
    ours, expected = (outputs_and_gradients(function, *inputs) for function in (in_blocks, whole))
    assert short_blocks == [(2, 4, n_tokens, 16)]
    assert len(ours) == 4 + (n_prefix is not None)
    for one, other in zip(ours, expected, strict=True):
        largest = float(jnp.abs(other).max(initial=0))
        np.testing.assert_allclose(one, other, rtol=0, atol=FUNCTION * max(1, largest))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mean", [0, 1, 10])
def test_gradients_in_half_precision_are_as_exact_as_its_roundoff(short_blocks, dtype, mean):
    """Even where a key takes almost all of every query's weight and values have a mean, which shows in q and k."""
    q, k, v, prefix = heads_of(30, 7)
    q, v, prefix = q.at[..., 0].set(6), v + mean, prefix.at[0, 0, :, 0].set(3).at[1].add(mean)
    halves = [x.astype(dtype) for x in (q, k, v, prefix)]
    ours = outputs_and_gradients(in_blocks, *halves)
    exact = outputs_and_gradients(whole, *(x.astype(jnp.float32) for x in halves))
    for one, right in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        strayed = jnp.linalg.norm(one.astype(jnp.float32) - right)
        assert strayed < HALF_GRADIENT * jnp.finfo(dtype).eps * jnp.linalg.norm(right)


@pytest.mark.parametrize(
    ("n_tokens", "slots", "n_keys", "method", "chosen"),
    [
        (15, None, 15, "auto", False),
        (16, None, 16, "auto", True),
        (16, None, 16, "dense", True),
        (16, True, 16, "auto", False),
        (16, None, 20, "auto", False),
    ],
)
def test_whole_rows_are_attended_to_in_blocks_by_their_length(
    short_blocks, monkeypatch, n_tokens, slots, n_keys, method, chosen
):
    monkeypatch.setattr(attention, "LONG_ROW", 16)
    q, k = jnp.zeros((1, n_tokens, 2, 16)), jnp.zeros((1, 2, n_keys, 16))
    attend(q, k, k, None, own_slots(q) if slots else None, method=method)
    assert bool(short_blocks) == chosen


@pytest.mark.parametrize("base_folder", ["parallel"], indirect=True)
@pytest.mark.parametrize("compute", [Compute(), Compute(remat="block"), Compute("dense", scan_layers=True)], ids=str)
def test_a_model_with_long_rows_is_the_same(base_folder, model, tokenizer, short_blocks, monkeypatch, compute):
    """Packed: texts of up to 15 tokens, padded to 20, on rows of their own."""
    batch = jax.tree.map(jnp.asarray, make_packed_batch(EXAMPLES, tokenizer, PackedShape(3, 32, ((4, 20),))))
    prefix = random_prefix(model.config)

    def loss_and_gradient(model):
        return jax.jit(jax.value_and_grad(lambda prefix, model: batch_loss(model, prefix, batch)))(prefix, model)

    ours = loss_and_gradient(load_model(base_folder, compute=compute))
    assert set(short_blocks) == {(12, 4, 20, 16)}
    monkeypatch.setattr(attention, "LONG_ROW", 21)
    jax.clear_caches()
    short_blocks.clear()
    expected = loss_and_gradient(model)
    assert not short_blocks
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=MODEL * float(jnp.abs(other).max()))


def program_of_layers(user_options, function, n_layers, n_tokens, n_prefix):
    """Gradients of layers, each of whose output is the next one's queries; and the bytes of a layer's scores."""

    def summed(q, k, v, prefix):
        for _ in range(n_layers):
            q = function(q, k, v, prefix)
        return q.sum()

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads_of(n_tokens, n_prefix)]
    compiled = jax.jit(jax.grad(summed, (0, 1, 2, 3))).lower(*shapes).compile(user_options)
    return compiled, 4 * 2 * 4 * n_tokens * (n_prefix + n_tokens)


@pytest.mark.parametrize(("function", "has_them"), [(in_blocks, False), (whole, True)])
def test_no_array_of_all_scores_is_ever_in_memory(user_options, function, has_them):
    compiled, scores = program_of_layers(user_options, function, 3, 1000, 10)
    assert ("[2,4,1000,1010]" in compiled.as_text()) == has_them
    assert (compiled.memory_analysis().temp_size_in_bytes > 1.75 * scores) == has_them, "three layers', or some blocks'"


@pytest.mark.parametrize(("function", "are_there"), [(in_blocks, False), (whole, True)])
def test_the_scores_of_one_block_at_a_time_are_in_memory_without_gradients_too(user_options, function, are_there):
    n_tokens = 8 * blocked.BLOCK
    compiled = jax.jit(lambda q, k, v: function(q, k, v, None)).lower(*heads_of(n_tokens, None)[:3])
    scores = 4 * 2 * 4 * n_tokens**2
    assert (compiled.compile(user_options).memory_analysis().temp_size_in_bytes > scores / 2) == are_there


@pytest.mark.parametrize(("function", "are_kept"), [(in_blocks, False), (whole, True)])
def test_the_scores_of_a_block_are_not_kept_for_the_backward_pass(user_options, monkeypatch, function, are_kept):
    monkeypatch.setattr(attention, "LONG_ROW", 1)
    compiled, scores = program_of_layers(user_options, function, 8, blocked.BLOCK, 10)
    assert (compiled.memory_analysis().temp_size_in_bytes > 6 * scores) == are_kept
