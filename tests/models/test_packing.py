"""Texts that lie end to end are computed as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprefix import load_model
from jaxprefix.config import Compute
from jaxprefix.data.batches import lay_out, make_packed_batch, make_padded_batch
from jaxprefix.data.rows import rows_of
from jaxprefix.data.shapes import PackedShape, PaddedShape
from jaxprefix.loss import batch_loss, next_token_loss
from jaxprefix.models import attention
from jaxprefix.models.attention import own_slots
from jaxprefix.models.packing import on_texts, pack, unpack
from tests.arrays import normals, random_prefix
from tests.base_folders import with_config
from tests.examples import EXAMPLES, PROMPTED
from tests.tolerances import FUNCTION, LOSS, MODEL

SHAPES = [
    PackedShape(1, 88, ((9, 15),)),
    PackedShape(3, 32, ((4, 16),)),
    PackedShape(1, 88, ((2, 15), (3, 10), (4, 8))),
    PackedShape(3, 32, ((1, 15), (3, 9))),
]


@pytest.fixture(params=SHAPES, ids=str)
def packed(request, tokenizer):
    return jax.tree.map(jnp.asarray, make_packed_batch(EXAMPLES, tokenizer, request.param))


def columns_of_places(packing):
    return jnp.concatenate([columns.reshape(len(columns), -1) for columns in packing.columns], axis=1)


def test_unpacking_and_packing_undo_each_other(packed):
    (x,) = normals((*packed.tokens.shape, 2, 3))
    columns = columns_of_places(packed.packing)
    has_text = packed.packing.places < columns.shape[1]
    texts = unpack(x, packed.packing)
    np.testing.assert_array_equal(pack(texts, packed.packing), jnp.where(has_text[..., None, None], x, 0))
    assert (texts[columns == packed.tokens.shape[1]] == 0).all()


def test_a_function_of_texts_sees_each_on_a_row_of_its_own(packed, tokenizer):
    seen = []

    def numbered(tokens):
        seen.extend(tokens.tolist())
        return jnp.arange(tokens.size).reshape(tokens.shape), tokens

    numbers, tokens = on_texts(numbered, packed.packing, packed.tokens)
    texts = [inputs for example in EXAMPLES for inputs, _ in rows_of(example, tokenizer.bos_id, tokenizer.eos_id)]
    assert sorted(row[: row.index(0)] if 0 in row else row for row in seen if any(row)) == sorted(texts)
    has_text = packed.packing.places < columns_of_places(packed.packing).shape[1]
    np.testing.assert_array_equal(tokens, jnp.where(has_text, packed.tokens, 0))
    goes_on = has_text[:, 1:] & (on_texts(own_slots, packed.packing, packed.tokens)[:, 1:] > 0)
    assert (jnp.diff(numbers, axis=1)[goes_on] == 1).all()


def test_attention_of_packed_texts_is_that_of_their_model(packed, monkeypatch):
    told, attend = [], attention.attend
    q, k = jnp.zeros((*packed.tokens.shape, 4, 16)), jnp.zeros((len(packed.tokens), 4, packed.tokens.shape[1], 16))
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *others: told.append(others) or q)
    attend(q, k, k, None, None, 0.5, "dense", packed.packing)
    assert told == [(None, None, 0.5, "dense")] * len(packed.packing.columns)


@pytest.mark.parametrize("way", [unpack, pack])
def test_the_gradient_of_a_way_is_that_of_its_indexing(packed, way):
    packing, columns = packed.packing, columns_of_places(packed.packing)
    index = columns if way is unpack else packing.places
    shape = (packed.tokens if way is unpack else columns).shape

    def plainly(x):
        return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)

    (x,) = normals((*shape, 4))
    (weights,) = normals(plainly(x).shape, seed=1)
    ours, expected = (jax.grad(lambda x, f=f: jnp.vdot(f(x), weights))(x) for f in (lambda x: way(x, packing), plainly))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=FUNCTION)


def test_packed_texts_have_the_loss_and_gradient_of_padded_ones(base_folder, model, tokenizer, packed):
    def loss(prefix, model, batch):
        return batch_loss(model, prefix, batch)

    prefix = random_prefix(model.config)
    padded = jax.tree.map(jnp.asarray, make_padded_batch(EXAMPLES, tokenizer, PaddedShape(10, 16)))
    expected = jax.jit(jax.value_and_grad(loss))(prefix, model, padded)
    for same in (model, load_model(base_folder, compute=Compute(remat="block"))):
        for ours, right in zip(jax.jit(jax.value_and_grad(loss))(prefix, same, packed), expected, strict=True):
            np.testing.assert_allclose(ours, right, rtol=0, atol=MODEL * float(jnp.abs(right).max()))


@pytest.mark.parametrize(
    "shape",
    [PaddedShape(4, 20, 8), PackedShape(1, 48, ((4, 20),), 24), PackedShape(2, 32, ((1, 20), (1, 10)), 16)],
    ids=str,
)
@pytest.mark.parametrize(
    "scaled", [{}, {"n_positions": 16, "rotary_scaling": "dynamic", "rotary_factor": 4.0}], ids=str
)
def test_labelled_columns_alone_have_the_loss_and_gradient_of_all(golden_model, tokenizer, shape, scaled):
    model = with_config(golden_model, **scaled)

    def loss(prefix, batch):
        return batch_loss(model, prefix, jax.tree.map(jnp.asarray, batch))

    prefix = random_prefix(model.config)
    few, whole = (lay_out(PROMPTED, tokenizer, shape._replace(n_labels=n)) for n in (shape.n_labels, None))
    assert few.labelled is not None
    assert whole.labelled is None
    for ours, right in zip(*(jax.jit(jax.value_and_grad(loss))(prefix, batch) for batch in (few, whole)), strict=True):
        np.testing.assert_allclose(ours, right, rtol=0, atol=MODEL * float(jnp.abs(right).max()))


def test_texts_of_a_model_whose_heads_do_not_rotate(golden_model, tokenizer, packed):
    """transformers rounds a small fraction of a small head down to no dimension."""
    model = with_config(golden_model, rotary_fraction=0.5 / golden_model.config.head_dim)
    assert model.config.rotary_dim == 0
    prefix = random_prefix(model.config)
    padded = jax.tree.map(jnp.asarray, make_padded_batch(EXAMPLES, tokenizer, PaddedShape(10, 16)))
    expected = batch_loss(model, prefix, padded)
    np.testing.assert_allclose(batch_loss(model, prefix, packed), expected, rtol=LOSS)


def test_dynamic_rotary_scaling_leaves_packed_and_padded_texts_the_same_loss(golden_model, tokenizer, packed):
    """Texts of up to 15 behind a prefix of 7: some reach beyond 16 positions, and in padded rows all would."""
    model = with_config(golden_model, n_positions=16, rotary_scaling="dynamic", rotary_factor=4.0)
    prefix = random_prefix(model.config)
    padded = jax.tree.map(jnp.asarray, make_padded_batch(EXAMPLES, tokenizer, PaddedShape(10, 40)))
    expected = batch_loss(model, prefix, packed)
    np.testing.assert_allclose(batch_loss(model, prefix, padded), expected, rtol=LOSS)
    with_padding = next_token_loss(model.hidden(padded.tokens, prefix)[0], model.head_weight, padded.labels)
    assert abs(with_padding - expected) > 100 * LOSS * expected


def test_dynamic_rotary_scaling_goes_by_the_texts_not_by_their_row(golden_model, packed):
    """Rows of up to 88 columns, texts of up to 15: behind a prefix of 7 the last position is 21."""
    scaled = {"rotary_scaling": "dynamic", "rotary_factor": 4.0}
    prefix = random_prefix(golden_model.config)

    def hidden(**changes):
        return with_config(golden_model, **changes).hidden(packed.tokens, prefix, packing=packed.packing)[0]

    np.testing.assert_array_equal(hidden(**scaled, n_positions=22), hidden())
    assert jnp.abs(hidden(**scaled, n_positions=20) - hidden()).max() > 100 * MODEL
