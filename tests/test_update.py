"""One update: what it computes, what it leaves alone, and how often it is compiled."""

import dataclasses
import unittest.mock
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprefix import load_model
from jaxprefix import update as update_module
from jaxprefix.data.batches import Batch, make_padded_batch
from jaxprefix.data.rows import IGNORED
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.prefix import DirectPrefix, new_encoder
from jaxprefix.recipe import RECIPES
from jaxprefix.sharding import make_mesh, replicated
from jaxprefix.update import (
    FrozenBase,
    LearningRate,
    LossScale,
    TrainState,
    first_state,
    learning_rate,
    make_optimizer,
    make_update,
)
from tests.base_folders import GOLDEN_BASE
from tests.examples import EXAMPLES
from tests.on_devices import OPTIMIZED, in_a_process, needed_by_accumulation
from tests.runs import run_config
from tests.tolerances import FUNCTION, MODEL

RATE = LearningRate(*map(jnp.float32, (0.1, 0, 0, 100, 1)))
ADAMW = run_config(Path()).adamw


def stacked(tokenizer, *groups) -> Batch:
    parts = [make_padded_batch(group, tokenizer, PaddedShape(10, 16)) for group in groups]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


@pytest.fixture
def start(golden_model):
    """A function that makes a fresh state: an update may consume it."""

    def make(optimizer, loss_scale=None):
        encoder = new_encoder(golden_model, 6, 5, 4, seed=0)
        return TrainState(encoder, optimizer.init(encoder), loss_scale)

    return make


def run(start, base, batch, recipe="default", optimizer=None, loss_scale=None):
    optimizer = optimizer or optax.sgd(1.0)
    update = make_update(ADAMW, RECIPES[recipe], make_mesh())
    with unittest.mock.patch.object(update_module, "make_optimizer", return_value=optimizer):
        moved, outcome = update(start(optimizer, loss_scale), RATE, FrozenBase.of(base), batch)
    return moved, outcome.loss


def gap(first, second) -> float:
    """Largest difference between two encoders."""
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_an_update_is_float32_where_jax_has_64_bits(start, golden_model, tokenizer):
    update, optimizer = make_update(ADAMW, RECIPES["default"], make_mesh()), make_optimizer(ADAMW, RATE)
    with jax.enable_x64(True):
        made = jax.eval_shape(update, start(optimizer), RATE, FrozenBase.of(golden_model), stacked(tokenizer, EXAMPLES))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made)} == {"float32", "int32"}


def test_update_follows_the_gradient_of_the_mean_loss(start, golden_model, tokenizer):
    batch = stacked(tokenizer, EXAMPLES)
    moved, loss = run(start, golden_model, batch)
    encoder = start(optax.sgd(1.0)).encoder

    def mean_loss(encoder):
        counts = batch.labels[0] != IGNORED
        log_probabilities = jax.nn.log_softmax(golden_model(jnp.asarray(batch.tokens[0]), encoder())[0])
        targets = jnp.asarray(np.where(counts, batch.labels[0], 0))[..., None]
        return -jnp.mean(jnp.take_along_axis(log_probabilities, targets, axis=-1)[..., 0], where=counts)

    expected, gradient = jax.jit(jax.value_and_grad(mean_loss))(encoder)
    assert float(loss) == pytest.approx(float(expected), rel=FUNCTION)
    assert gap(moved.encoder, optax.apply_updates(encoder, jax.tree.map(jnp.negative, gradient))) < MODEL


def test_accumulation_equals_one_large_batch(start, golden_model, tokenizer):
    whole, loss = run(start, golden_model, stacked(tokenizer, EXAMPLES))
    parts, loss_of_parts = run(start, golden_model, stacked(tokenizer, EXAMPLES[:1], EXAMPLES[1:], []))
    assert float(loss) == pytest.approx(float(loss_of_parts), rel=FUNCTION)
    assert gap(whole.encoder, parts.encoder) < FUNCTION


def test_rinna_averages_the_means_of_micro_batches(start, golden_model, tokenizer):
    groups = (EXAMPLES[:1], EXAMPLES[1:])
    losses = [float(run(start, golden_model, stacked(tokenizer, group))[1]) for group in groups]
    _, loss = run(start, golden_model, stacked(tokenizer, *groups), "rinna")
    _, sound = run(start, golden_model, stacked(tokenizer, *groups))
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=FUNCTION)
    assert abs(float(sound) - float(loss)) > 1e-3


@pytest.mark.parametrize("recipe", ["default", "rinna"])
def test_what_has_no_label_has_no_part_in_the_mean(start, golden_model, tokenizer, recipe):
    groups = (EXAMPLES[:1], EXAMPLES[1:])
    without, loss = run(start, golden_model, stacked(tokenizer, *groups), recipe)
    beside, same_loss = run(start, golden_model, stacked(tokenizer, *groups, []), recipe)
    assert float(same_loss) == pytest.approx(float(loss), rel=FUNCTION)
    assert gap(without.encoder, beside.encoder) < FUNCTION


def test_order_of_a_batch_does_not_matter(start, golden_model, tokenizer):
    forward, _ = run(start, golden_model, stacked(tokenizer, EXAMPLES))
    backward, _ = run(start, golden_model, stacked(tokenizer, EXAMPLES[::-1]))
    assert gap(forward.encoder, backward.encoder) < FUNCTION


def test_padding_has_no_part_in_the_update(start, golden_model, tokenizer):
    tight = stacked(tokenizer, EXAMPLES)
    wide = Batch(
        np.pad(tight.tokens, ((0, 0), (0, 3), (0, 9)), constant_values=77),
        np.pad(tight.labels, ((0, 0), (0, 3), (0, 9)), constant_values=IGNORED),
    )
    assert gap(run(start, golden_model, tight)[0].encoder, run(start, golden_model, wide)[0].encoder) < FUNCTION


def test_the_base_is_bit_identical_afterwards_and_the_step_compiles_once(start, golden_model, tokenizer, tmp_path):
    before = [np.array(leaf) for leaf in jax.tree.leaves(golden_model)]
    mesh, config = make_mesh(), run_config(tmp_path)
    update = make_update(config.adamw, RECIPES["default"], mesh)
    state, golden_model = jax.device_put((start(make_optimizer(config.adamw, RATE)), golden_model), replicated(mesh))
    for group, max_lr in ((EXAMPLES, 0.1), (EXAMPLES[:2], 0.2), (EXAMPLES[3:], 0.3)):
        rate = learning_rate(dataclasses.replace(config, max_lr=max_lr), 3)
        rate = jax.device_put(rate, replicated(mesh))
        state, _ = update(given := state, rate, FrozenBase.of(golden_model), stacked(tokenizer, group))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "two states would take twice the memory"
    assert update._cache_size() == 1
    for leaf, copy in zip(jax.tree.leaves(golden_model), before, strict=True):
        np.testing.assert_array_equal(leaf, copy)


def test_no_decay_on_biases(tmp_path, golden_model):
    encoder = new_encoder(golden_model, 6, 5, 4, seed=0)
    still = jax.tree.map(jnp.zeros_like, encoder)
    config = run_config(tmp_path, weight_decay=0.5, max_lr=0.1, n_training_steps=100, n_epochs=1)
    optimizer = make_optimizer(config.adamw, optax.constant_schedule(0.1))
    moved = optax.apply_updates(encoder, optimizer.update(still, optimizer.init(encoder), encoder)[0])
    for name in ("0", "2"):
        old, new = encoder.prefix_mlp[name], moved.prefix_mlp[name]
        np.testing.assert_allclose(new.weight[...], old.weight[...] * 0.95, rtol=1e-6)
        np.testing.assert_array_equal(new.bias[...], old.bias[...])
    np.testing.assert_allclose(moved.prefix_wte.weight[...], encoder.prefix_wte.weight[...] * 0.95, rtol=1e-6)


@pytest.mark.parametrize(("grad_clip", "norm"), [(0.01, 0.01), (0.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm_and_averaged_by_the_betas(tmp_path, golden_model, grad_clip, norm):
    encoder = new_encoder(golden_model, 6, 5, 4, seed=0)
    ones = jax.tree.map(jnp.ones_like, encoder)
    gradient = jax.tree.map(lambda one: one * 5 / optax.tree.norm(ones), ones)
    config = run_config(tmp_path, grad_clip=grad_clip, adam_beta1=0.75, adam_beta2=0.5)
    optimizer = make_optimizer(config.adamw, optax.constant_schedule(0.1))
    _, (_, (adam, *_)) = optimizer.update(gradient, optimizer.init(encoder), encoder)
    assert float(optax.tree.norm(adam.mu)) == pytest.approx(norm / 4, rel=1e-4)
    assert float(optax.tree.sum(adam.nu)) == pytest.approx(norm**2 / 2, rel=1e-4)


def test_adams_epsilon_is_that_of_the_settings(tmp_path):
    """The first step is the gradient over its own size plus epsilon."""
    encoder, ones = (DirectPrefix(fill((1, 2, 3, 1, 2))) for fill in (jnp.zeros, jnp.ones))
    optimizer = make_optimizer(run_config(tmp_path, adam_eps=1.0, grad_clip=0.0).adamw, optax.constant_schedule(0.1))
    step, _ = optimizer.update(ones, optimizer.init(encoder), encoder)
    np.testing.assert_allclose(step(), -0.05, rtol=FUNCTION)


def rates(tmp_path, n_updates, **changes):
    config = run_config(tmp_path, max_lr=1.0, min_lr=0.1, **changes)
    rate = learning_rate(config, n_updates)
    return [round(float(rate(n)), 4) for n in range(n_updates)]


def test_learning_rate_decays_over_the_run_to_min_lr(tmp_path):
    assert rates(tmp_path, 5) == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(tmp_path, 6, n_warmup_steps=2) == [0.1, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert min(rates(tmp_path, 50)) == 0.1


def test_rinna_steps_the_schedule_twice_and_over_the_requested_steps(tmp_path):
    assert rates(tmp_path, 8, recipe="rinna", n_training_steps=10) == [1.0, 0.8, 0.6, 0.4, 0.2, 0, 0, 0]
    assert rates(tmp_path, 4, recipe="rinna", n_training_steps=10, n_warmup_steps=4) == [0, 0.5, 1.0, 0.6667]
    assert rates(tmp_path, 2, recipe="rinna", n_training_steps=10**12) == [1.0, 1.0]
    assert rates(tmp_path, 4, recipe="rinna", n_training_steps=4, n_warmup_steps=6) == [0, 0.3333, 0.6667, 0]


def test_float16_scales_the_loss_and_skips_what_overflows(start, tokenizer):
    base = load_model(GOLDEN_BASE, "float16")
    batch = stacked(tokenizer, EXAMPLES)
    scaled, loss = run(start, base, batch, loss_scale=LossScale.start())
    plain, plain_loss = run(start, base, batch)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-3)
    assert 0 < gap(scaled.encoder, plain.encoder) < 1e-3
    assert int(scaled.loss_scale.n_good) == 1

    huge = LossScale(jnp.float32(1e38), jnp.int32(5))
    skipped, _ = run(start, base, batch, loss_scale=huge)
    assert gap(skipped.encoder, start(optax.sgd(1.0)).encoder) == 0
    assert float(skipped.loss_scale.value) == pytest.approx(5e37)
    assert int(skipped.loss_scale.n_good) == 0


@pytest.mark.parametrize(("loss", "each"), [(np.inf, 1.0), (np.nan, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(start, golden_model, tokenizer, monkeypatch, loss, each):
    def spoilt(encoder, *_):
        return jnp.float32(loss), jax.tree.map(lambda leaf: jnp.full_like(leaf, each), encoder)

    monkeypatch.setattr(update_module, "loss_and_gradient", spoilt)
    optimizer = optax.sgd(1.0, momentum=0.9)
    moved, _ = run(start, golden_model, stacked(tokenizer, EXAMPLES), optimizer=optimizer)
    for after, before in zip(*map(jax.tree.leaves, (moved, start(optimizer))), strict=True):
        np.testing.assert_array_equal(after, before)


def test_an_update_reports_the_norm_of_the_gradient_before_clipping(start, golden_model, tokenizer, monkeypatch):
    def known(encoder, *_):
        ones = jax.tree.map(jnp.ones_like, encoder)
        return jnp.float32(1), jax.tree.map(lambda one: one * 5 / optax.tree.norm(ones), ones)

    monkeypatch.setattr(update_module, "loss_and_gradient", known)
    adamw = run_config(Path(), grad_clip=0.01).adamw
    state, base = start(make_optimizer(adamw, RATE)), FrozenBase.of(golden_model)
    _, outcome = make_update(adamw, RECIPES["default"], make_mesh())(state, RATE, base, stacked(tokenizer, EXAMPLES))
    assert float(outcome.gradient_norm) == pytest.approx(5, rel=FUNCTION)


def test_loss_scale_doubles_after_a_thousand_good_updates():
    scale = LossScale(jnp.float32(1024), jnp.int32(998))
    scale = scale.adjusted(jnp.bool_(True))
    assert (float(scale.value), int(scale.n_good)) == (1024, 999)
    scale = scale.adjusted(jnp.bool_(True))
    assert (float(scale.value), int(scale.n_good)) == (2048, 0)


def test_the_loss_scale_starts_at_two_to_the_tenth_and_ends_at_one():
    scale = LossScale.start()
    assert float(scale.value) == 1024
    for _ in range(12):
        scale = scale.adjusted(jnp.bool_(False))
    assert float(scale.value) == 1


@pytest.mark.parametrize(
    ("given", "scaled"), [({"dtype": "float16"}, True), ({"fp16": True}, True), ({"bf16": True}, False), ({}, False)]
)
def test_float16_has_a_loss_scale_by_whichever_flag(tmp_path, golden_model, given, scaled):
    state = first_state(run_config(tmp_path, **given), new_encoder(golden_model, 6, 5, 4, seed=0))
    assert (state.loss_scale is not None) == scaled


def test_accumulation_needs_no_second_copy_of_the_base():
    """A CPU's compiler would transpose all bfloat16 weights before the loop over micro-batches."""
    of_one, of_several = in_a_process(needed_by_accumulation, 1, 3, JAX_PLATFORMS="cpu", **OPTIMIZED)
    assert of_several - of_one < 0.1 * 2 * 4 * 12 * 512**2
