import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprefix.sampling
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.machine.devices import on_a_cpu
from jaxprefix.sampling import Sampling, are_finite, choose_tokens, draw, nucleus
from tests.arrays import normals

SEED = np.uint32(0)
GREEDY = DecodeConfig(decode_method="greedy")
LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "drop_crossing", "kept"),
    [
        (0, 0.0, False, 4),
        (3, 0.0, False, 3),
        (0, 0.7, False, 2),  # 0.5 + 0.3 crosses 0.7: the crossing token stays …
        (0, 0.7, True, 1),  # … or goes
        (0, 0.1, True, 1),  # the likeliest always stays
        (2, 0.6, False, 1),  # of the two left the first has 0.5 / 0.8 = 0.625 ≥ 0.6
        (0, 1.0, False, 4),
    ],
)
def test_a_nucleus_holds_what_top_k_and_top_p_leave(top_k, top_p, drop_crossing, kept):
    shuffled = LOGITS[:, jnp.asarray([2, 0, 3, 1])]
    likeliest, ids = nucleus(shuffled, top_k, top_p, drop_crossing)
    assert int(jnp.isfinite(likeliest).sum()) == kept
    np.testing.assert_array_equal(likeliest[0, :kept], LOGITS[0, :kept])
    np.testing.assert_array_equal(ids[0], [1, 3, 0, 2][: top_k or 4])


@pytest.mark.parametrize(
    "logits", [[1.0, 3.0, 2.0, 3.0], [3.0, 3.0, 3.0], [-np.inf, -np.inf], [2.0, np.inf, 0.0], [np.nan, np.nan]]
)
def test_greedy_takes_the_first_of_the_likeliest_tokens(logits):
    keys, unused = jax.random.split(jax.random.key(0), 2), Sampling(jnp.float32(1), jnp.float32(1), SEED, 0)
    chosen = choose_tokens(jnp.asarray([logits, logits[::-1]]), keys, GREEDY, unused)
    np.testing.assert_array_equal(chosen, [np.argmax(logits), np.argmax(logits[::-1])])


@pytest.mark.parametrize("drop_crossing", [False, True])
def test_a_nucleus_ends_where_its_probabilities_reach_top_p(drop_crossing):
    likeliest, _ = nucleus(jnp.zeros((1, 4)), 0, 0.5, drop_crossing)
    assert jnp.isfinite(likeliest).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("drop_crossing", [False, True])
def test_a_nucleus_of_all_probability_keeps_all_tokens_although_their_sum_is_1_before_the_last(drop_crossing):
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=3, size=(50, 5000)), jnp.float32)
    likeliest, _ = nucleus(logits, 0, 1.0, drop_crossing)
    assert jnp.isfinite(likeliest).all()


def test_samples_are_the_same_where_jax_has_64_bits():
    keys = jax.random.split(jax.random.key(0), 4000)
    logits, sampling = jnp.broadcast_to(LOGITS, (4000, 4)), Sampling(1.0, 0.9, SEED, 0)
    chosen = choose_tokens(logits, keys, DecodeConfig(), sampling)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(choose_tokens(logits, keys, DecodeConfig(), sampling), chosen)


def test_samples_come_from_the_nucleus():
    keys = jax.random.split(jax.random.key(0), 4000)
    shuffled = jnp.broadcast_to(LOGITS[:, jnp.asarray([2, 0, 3, 1])], (4000, 4))
    sampling = Sampling(jnp.float32(1), jnp.float32(0.7), SEED, 0)
    tokens = choose_tokens(shuffled, keys, DecodeConfig(top_k=3), sampling)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, [0, 0.625, 0, 0.375], atol=0.03)


def test_samples_follow_the_softmax_and_the_temperature():
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(LOGITS, (4000, 4))
    for temperature in (1.0, 2.0):
        decode = DecodeConfig(decode_method="sample", temperature=temperature)
        sampling = Sampling(jnp.float32(temperature), jnp.float32(1), SEED, 0)
        shares = np.bincount(choose_tokens(logits, keys, decode, sampling), minlength=4) / 4000
        np.testing.assert_allclose(shares, jax.nn.softmax(LOGITS[0] / temperature), atol=0.03)


@pytest.mark.parametrize("scales", [[8.0], [0.1], [8.0, 0.1]])
@pytest.mark.parametrize("recipe", ["default", "rinna"])
def test_a_nucleus_of_all_tokens_is_the_same_without_sorting_them(monkeypatch, scales, recipe):
    """Of peaked logits the likeliest few are looked at, of flat ones all are sorted after all."""
    numbers = np.random.default_rng(0).standard_normal((200, 300))
    logits = jnp.asarray(np.resize(scales, (200, 1)) * numbers, jnp.float32)
    keys, sampling = jax.random.split(jax.random.key(1), 200), Sampling(1.0, 0.9, SEED, 0)
    decode = DecodeConfig(top_k=0, recipe=recipe)
    expected = choose_tokens(logits, keys, decode, sampling)
    monkeypatch.setattr(jaxprefix.sampling, "LIKELY", 100)
    np.testing.assert_array_equal(choose_tokens(logits, keys, decode, sampling), expected)


def test_a_draw_never_takes_what_has_no_probability():
    logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 3)
    numbers = jnp.asarray([0.0, 0.5, 1 - 2**-24])
    np.testing.assert_array_equal(draw(logits, numbers), [1, 3, 3])


def test_nor_does_a_draw_among_thousands_whose_running_sums_fall_again():
    """XLA's CPU compiler adds in blocks, and rounds in each."""
    (logits,) = normals((512, 4096))
    likeliest, _ = nucleus(3 * logits, 0, 0.9)
    sums = jnp.cumsum(jax.nn.softmax(likeliest), axis=-1)
    assert not on_a_cpu() or (jnp.diff(sums, axis=-1) < 0).any(), "or there is nothing to see"
    for steps in range(1, 5):
        drawn = draw(likeliest, jnp.full(512, 1 - steps * 2**-24))
        assert jnp.isfinite(jnp.take_along_axis(likeliest, drawn[:, None], axis=-1)).all()


def test_temperature_comes_before_the_nucleus():
    """At 4 the three likeliest reach 0.7, at 1 the two."""
    keys = jax.random.split(jax.random.key(0), 500)
    sampling = Sampling(jnp.float32(4), jnp.float32(0.7), SEED, 0)
    chosen = choose_tokens(jnp.broadcast_to(LOGITS, (500, 4)), keys, DecodeConfig(), sampling)
    assert set(np.asarray(chosen).tolist()) == {0, 1, 2}


def test_one_logit_that_is_not_finite_is_noticed_wherever_it_is():
    """−∞ is finite enough: that token has no probability."""
    rows = jnp.asarray([[0, 1, 2], [0, 1, -jnp.inf], [0, jnp.nan, 2], [0, 1, jnp.inf]])
    assert are_finite(rows).tolist() == [True, True, False, False]
