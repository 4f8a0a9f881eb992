"""Layers in a loop, or recomputed, give what they give one after the other."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix import load_model
from jaxprefix.check import compiled_memory
from jaxprefix.config import CheckConfig, Compute
from jaxprefix.data.shapes import PaddedShape
from jaxprefix.loss import next_token_loss
from jaxprefix.models import abstract_model
from jaxprefix.models.attention import own_slots
from jaxprefix.models.config import read_model_config
from jaxprefix.models.layers import scanned_dtype
from tests.arrays import TOKENS, empty_cache, random_prefix
from tests.base_folders import GOLDEN_BASE, make_base_folder
from tests.tolerances import BFLOAT16, MODEL


@jax.jit
@jax.grad
def loss_gradient(prefix, model):
    return next_token_loss(model.hidden(TOKENS, prefix)[0], model.head_weight, TOKENS)


@pytest.mark.parametrize(
    "compute", [Compute(remat="block"), Compute(scan_layers=True), Compute("dense", "block", True)]
)
def test_a_model_computed_otherwise_is_the_same(base_folder, model, compute):
    other, prefix = load_model(base_folder, compute=compute), random_prefix(model.config)
    forward = jax.jit(lambda model: model(TOKENS, prefix))
    for ours, expected in zip(*map(jax.tree.leaves, (forward(other), forward(model))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=MODEL)
    gradient, expected = (loss_gradient(prefix, each) for each in (other, model))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=MODEL * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("remat", ["elementwise", "block"])
def test_scanned_layers_in_bfloat16_stray_no_further_than_unrolled_ones(base_folder, model, remat):
    computes, prefix = (Compute(remat=remat, scan_layers=True), Compute()), random_prefix(model.config)
    rounded = (load_model(base_folder, "bfloat16", compute=compute) for compute in computes)
    exact = loss_gradient(prefix, model)
    scanned, unrolled = (jnp.linalg.norm(loss_gradient(prefix, each) - exact) for each in rounded)
    assert scanned < BFLOAT16 * unrolled


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about a CPU's compiler")
@pytest.mark.parametrize("base_folder", ["parallel", "gpt2"], indirect=True)
def test_scanned_layers_are_not_copied_in_another_type(base_folder):
    config = CheckConfig(str(base_folder), bf16=True, compute=Compute(remat="block", scan_layers=True))
    model = read_model_config(base_folder)
    work = [compiled_memory(config, dataclasses.replace(model, n_layer=n), PaddedShape(2, 24))[1] for n in (2, 6)]
    assert (work[1] - work[0]) / 4 < 12 * model.n_embd**2  # a fourth of a layer's matrices in float32


def test_scanned_layers_take_a_cache(base_folder, model):
    other, prefix = load_model(base_folder, compute=Compute(scan_layers=True)), random_prefix(model.config)
    forward = jax.jit(lambda model, tokens, *rest: model(tokens, prefix, *rest))
    _, cache = forward(other, TOKENS[:, :10], empty_cache(model.config, 32), own_slots(TOKENS[:, :10]))
    logits, _ = forward(other, TOKENS[:, 10:11], cache, jnp.full((2, 1), 10))
    np.testing.assert_allclose(logits[:, 0], forward(model, TOKENS)[0][:, 10], rtol=0, atol=MODEL)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the bits that a CPU keeps")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_second_derivatives_are_right_or_refused(scan_layers):
    """Arrays kept as bits have none: the product with the Hessian would be half as long as it is."""
    compute = Compute(scan_layers=scan_layers)
    model, half = (load_model(GOLDEN_BASE, dtype, compute=compute) for dtype in ("float32", "bfloat16"))
    prefix, direction = (random_prefix(model.config, seed=seed) for seed in (1, 2))

    @jax.jit
    def slope(prefix, model):
        return (jax.grad(lambda prefix: jnp.sin(model(TOKENS, prefix)[0]).mean())(prefix) * direction).sum()

    product, step = (jax.jit(jax.grad(slope))(prefix, model) * direction).sum(), 1e-2
    ends = [slope(prefix + distance * direction, model) for distance in (step, -step)]
    np.testing.assert_allclose(product, (ends[0] - ends[1]) / (2 * step), rtol=0.02)
    with pytest.raises(NotImplementedError, match="second derivatives in bfloat16 on a CPU"):
        jax.grad(slope)(prefix, half)


@pytest.mark.parametrize(("remat", "n_waiting"), [("block", 3), ("elementwise", 0)])
def test_block_recomputation_sums_a_layers_gradient_of_the_prefix_before_the_next_layers(remat, n_waiting):
    """XLA would keep the terms of all layers till the end; a CPU's compiler drops the barrier."""
    model = abstract_model(read_model_config(GOLDEN_BASE), Compute(remat=remat))
    lowered = loss_gradient.lower(random_prefix(model.config), model).as_text()
    assert len(re.findall(r"optimization_barrier %\S+ : tensor<2x7x4x16xf32>", lowered)) == n_waiting


def test_gpus_keep_numbers_not_bits(as_on_a_gpu):
    assert scanned_dtype(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)) == jnp.bfloat16


def test_scanning_changes_the_program(base_folder):
    plain, scanned = (load_model(base_folder, compute=Compute(scan_layers=scan)) for scan in (False, True))
    prefix = random_prefix(plain.config)
    forward = jax.make_jaxpr(lambda base: base.hidden(TOKENS, prefix)[0])
    assert "scan" in str(forward(scanned))
    assert "scan" not in str(forward(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_takes_the_weights_of_all_layers_one_behind_the_other(base_folder, dtype):
    layers = load_model(base_folder, dtype).layers
    scanned = load_model(base_folder, dtype, compute=Compute(scan_layers=True)).layers
    for whole, *parts in zip(*map(jax.tree.leaves, (scanned, *layers)), strict=True):
        np.testing.assert_array_equal(np.asarray(whole).view(parts[0].dtype), np.stack(parts))


def test_a_weight_of_all_layers_has_left_the_host_before_the_next_is_read(base_folder, monkeypatch):
    """A GPU's transfers go on in the background: the host would hold several such weights, gigabytes each."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda array: waited.append(array.shape) or array)
    scanned = load_model(base_folder, compute=Compute(scan_layers=True))
    assert waited == [leaf.shape for leaf in jax.tree.leaves(scanned.layers)]


def test_layers_that_differ_cannot_be_scanned(tmp_path):
    folder = make_base_folder(tmp_path / "base", model_type="gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match="--scan_layers: the layers of this base model differ"):
        load_model(folder, compute=Compute(scan_layers=True))
