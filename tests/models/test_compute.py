"""Whatever way a model is computed, what comes out is the same."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprefix import load_model
from jaxprefix.config import Compute
from jaxprefix.machine.devices import compiling_for
from jaxprefix.models import abstract_model, attention, gpt2, gpt_neox
from jaxprefix.models.attention import attend, heads_first, square_causal
from jaxprefix.models.config import read_model_config
from jaxprefix.models.layers import (
    FEW_ROWS,
    Embedding,
    activate,
    after,
    einsum,
    frozen_matmul,
    layer_norm,
    matmul,
    rotate,
)
from tests.arrays import TOKENS, empty_cache, normals, random_prefix
from tests.base_folders import GOLDEN_BASE
from tests.markers import needs_gpu
from tests.models.attending import attended, outputs_and_gradients
from tests.tolerances import BFLOAT16, FUNCTION, HALF_CACHE, HALF_GRADIENT, MODEL


@pytest.fixture
def heads():
    """q, k, v [2, 30, 4, 16] and a layer's prefix [2, 7, 4, 16]."""
    return normals(*[(2, 30, 4, 16)] * 3, (2, 7, 4, 16))


def lowered_gradient(base, tokens):
    gradient = jax.grad(lambda prefix, base: base.hidden(tokens, prefix)[0].sum())
    return jax.jit(gradient).lower(random_prefix(base.config), base)


def needed_memory(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@jax.default_matmul_precision("highest")  # of JAX's own attention, which a GPU would compute in TF32
def test_square_causal_attention_is_the_dense_one(heads):
    square = outputs_and_gradients(lambda *inputs: square_causal(*inputs, 0.25, "xla"), *heads)
    expected = outputs_and_gradients(attended, *heads)
    for ours, theirs in zip(square, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FUNCTION * float(jnp.abs(theirs).max()))


@jax.default_matmul_precision("highest")
def test_square_causal_attention_without_a_prefix(heads):
    q, k, v, _ = heads
    np.testing.assert_allclose(
        square_causal(q, k, v, None, 0.25, "xla"), attended(q, k, v, None), rtol=0, atol=FUNCTION
    )


def test_causal_attention_that_is_not_square_is_another_one(heads):
    q, k, v, prefix = heads
    fronts = jnp.broadcast_to(prefix[:, None], (2, 2, *prefix.shape[1:]))
    keys, values = (jnp.concatenate([front, x], axis=1) for front, x in zip(fronts, (k, v), strict=True))
    top_left = jax.nn.dot_product_attention(q, keys, values, is_causal=True, implementation="xla")
    assert jnp.abs(top_left - attended(q, k, v, prefix)).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"dtype": jnp.float16}, True),
        ({"dtype": jnp.float32}, False),
        ({"slots": True}, False),
        ({"tokens": 30}, False),
        ({"method": "dense"}, False),
        ({"method": "cudnn", "tokens": 30}, True),
        ({"method": "cudnn", "slots": True}, False),
    ],
)
def test_cudnn_is_chosen_on_gpus_for_long_whole_rows_in_half_precision(monkeypatch, changes, chosen):
    """Unless another method is asked for. It gets the model's own scale."""
    calls = []
    monkeypatch.setattr(attention, "cudnn_takes", lambda head_dim: True)
    monkeypatch.setattr(attention, "square_causal", lambda *inputs: calls.append(inputs) or inputs[0])
    q = jnp.zeros((1, changes.get("tokens", 512), 2, 16), changes.get("dtype", jnp.bfloat16))
    slots = attention.own_slots(q) if "slots" in changes else None
    attended(q, q, q, None, slots, 0.5, changes.get("method", "auto"))
    assert [scale for *_, scale, _ in calls] == [0.5] * chosen


@pytest.mark.parametrize("base_folder", ["parallel", "gpt2"], indirect=True)
def test_attention_is_computed_by_the_method_that_was_asked_for(base_folder, monkeypatch, traced_anew):
    methods = []
    for module in (gpt_neox, gpt2):
        monkeypatch.setattr(module, "attend", lambda q, *given: methods.append(given[5]) or q)
    base = abstract_model(read_model_config(base_folder), Compute("cudnn"))
    jax.eval_shape(lambda base: base.hidden(TOKENS)[0], base)
    assert set(methods) == {"cudnn"}


@pytest.mark.parametrize(
    ("capability", "taken"),
    [("9.0", {8, 64, 128, 256}), ("8.0", {8, 64, 128}), ("7.5", set()), ("gfx90a", set()), (None, set())],
)
def test_cudnn_takes_heads_by_the_gpus_generation(capability, taken):
    device = types.SimpleNamespace(platform="gpu", **({"compute_capability": capability} if capability else {}))
    with compiling_for([device]):
        assert {width for width in (8, 12, 64, 128, 256, 264) if attention.cudnn_takes(width)} == taken


def test_gradients_towards_the_prefix_are_summed_over_rows_in_float32():
    """bfloat16 has 8 bits, of which 1 + 601 · 2⁻⁹ needs 11."""
    front, rows = jnp.ones((1, 1, 1)), jnp.zeros((602, 1, 1, 1), jnp.bfloat16)
    weights = jnp.full(602, 2.0**-9).at[0].set(1)

    def weighed(front):
        return (attention._behind(front, rows)[:, 0, 0, 0] * weights.astype(jnp.bfloat16)).sum(dtype=jnp.float32)

    assert jax.jit(jax.grad(weighed))(front) == 1 + 601 * 2.0**-9


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cudnn", marks=needs_gpu)])
@pytest.mark.parametrize("width", [64, 80, 96, pytest.param(256, marks=needs_gpu)])
def test_square_causal_attention_in_bfloat16_is_as_close_to_float32_as_the_dense_one(implementation, width):
    if implementation == "cudnn" and not attention.cudnn_takes(width):
        pytest.skip("cuDNN needs Ampere or later, for wide heads Hopper")
    rows, front = (2, 600, 4, width), (2, 10, 4, width)
    halves = normals(rows, rows, rows, front, dtype=jnp.bfloat16)
    square = outputs_and_gradients(lambda *inputs: square_causal(*inputs, width**-0.5, implementation), *halves)
    same = outputs_and_gradients(lambda *inputs: attended(*inputs, None, None, "dense"), *halves)
    exact = outputs_and_gradients(attended, *(x.astype(jnp.float32) for x in halves))
    for ours, theirs, right in zip(square, same, exact, strict=True):
        strayed, allowed = (jnp.linalg.norm(x.astype(jnp.float32) - right) for x in (ours, theirs))
        assert strayed < BFLOAT16 * allowed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 0, 48), (1, 2, 48), (FEW_ROWS, 48), (FEW_ROWS + 1, 48)])
def test_products_of_few_rows_are_those_of_many(shape, dtype):
    x, weight = normals(shape, (96, 48), dtype=dtype)
    right = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(jax.jit(matmul)(x, weight), right, rtol=0, atol=FUNCTION * abs(right).max(initial=0))
    gradient = jax.jit(jax.grad(lambda weight: (matmul(x, weight) * right).sum()))(weight)
    expected = right.reshape(-1, 96).T @ np.asarray(x, np.float64).reshape(-1, 48)
    rounded = max(FUNCTION, jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(gradient), expected, rtol=0, atol=rounded * abs(expected).max())


@pytest.mark.parametrize("n_rows", [1, FEW_ROWS + 1])
def test_a_weight_of_two_out_axes_is_one_of_their_product(n_rows):
    x, weight, gradient = normals((n_rows, 48), (3, 32, 48), (n_rows, 3, 32))

    def product_and_gradient(x, weight, gradient):
        product, pull_back = jax.vjp(frozen_matmul, x, weight)
        return product, pull_back(gradient)[0]

    flat = jax.jit(product_and_gradient)(x, weight.reshape(96, 48), gradient.reshape(n_rows, 96))
    split = jax.jit(product_and_gradient)(x, weight, gradient)
    for one, other in zip(split, flat, strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)


@pytest.mark.parametrize(
    ("dtype", "n_rows", "result"),
    [
        (jnp.float32, 1, "f32[96,1]"),
        (jnp.float32, FEW_ROWS, f"f32[96,{FEW_ROWS}]"),
        (jnp.float32, FEW_ROWS + 1, f"f32[{FEW_ROWS + 1},96]"),
        (jnp.bfloat16, 1, "f32[2,96]"),
        (jnp.bfloat16, 2, "f32[2,96]"),
    ],
)
def test_the_compiler_leaves_products_of_few_rows_as_they_are(user_options, dtype, n_rows, result):
    arrays = jnp.zeros((n_rows, 48), dtype), jnp.zeros((96, 48), dtype)
    assert f"{result}{{1,0}} dot(" in jax.jit(matmul).lower(*arrays).compile(user_options).as_text()


def test_nothing_of_an_mlps_width_is_written_out_for_every_row(user_options):
    base = abstract_model(read_model_config(GOLDEN_BASE))
    program = lowered_gradient(base, jnp.zeros((128, 64), int)).compile(user_options).as_text()
    written = re.findall(r"%wrapped_broadcast\S* = f32\[([\d,]+)\]", program)
    assert "f32[128,64,256]" in program
    assert "128,64,256" not in written
    assert "128,64,64" in written, "layer norms' weights are, so lines are understood"


def test_a_loop_makes_no_float32_copy_of_a_half_precision_table(user_options):
    def follow(table, ids):
        return jax.lax.fori_loop(0, 5, lambda _, ids: table(ids).sum(axis=-1).astype(jnp.int32), ids)

    table = Embedding(4096, 64)
    table.weight = nnx.Param(jnp.zeros((4096, 64), jnp.bfloat16))
    assert needed_memory(jax.jit(follow).lower(table, jnp.arange(3)).compile(user_options)) < table.weight.nbytes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_attention_to_a_cache_in_float32_is_that_to_one_in_half_precision(heads, dtype):
    q, k, v = (heads_first(x.astype(dtype)) for x in heads[:3])
    q, slots = heads_first(q[:, :, -1:]), jnp.asarray([[29], [11]])
    same, wide = (jax.jit(attend)(q, k.astype(t), v.astype(t), None, slots) for t in (dtype, jnp.float32))
    assert wide.dtype == dtype
    np.testing.assert_allclose(np.float32(wide), np.float32(same), rtol=0, atol=HALF_CACHE * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layer", ["attention", "attention to a sink", "layer norm", "rotation"])
def test_gradients_in_half_precision_are_as_exact_as_its_roundoff(heads, dtype, layer):
    """A sink is a key that takes almost all of every query's weight; where values have a mean it shows in q and k."""
    q, k, v, prefix = heads
    if layer == "attention to a sink":
        q, v, prefix = q.at[..., 0].set(6), v + 1, prefix.at[0, 0, :, 0].set(3).at[1].add(1)
    function, inputs = {
        "attention": (attended, (q, k, v, prefix)),
        "attention to a sink": (attended, (q, k, v, prefix)),
        "layer norm": (lambda x: layer_norm(x, k[0, 0, 0], v[0, 0, 0], 1e-5), (q + 1,)),
        "rotation": (lambda x: rotate(x, (jnp.cos(k[:, :, 0, :8]), jnp.sin(k[:, :, 0, :8]))), (q,)),
    }[layer]

    rounded = [x.astype(dtype) for x in inputs]
    _, *gradients = outputs_and_gradients(function, *rounded)
    _, *exact = outputs_and_gradients(function, *(x.astype(jnp.float32) for x in rounded))
    for ours, right in zip(gradients, exact, strict=True):
        assert jnp.linalg.norm(ours - right) < HALF_GRADIENT * jnp.finfo(dtype).eps * jnp.linalg.norm(right)


@pytest.mark.parametrize("base_folder", ["parallel"], indirect=True)
def test_caches_have_gradients_with_block_recomputation_too(base_folder, model):
    """Those that are read, and through those that are written."""
    other, prefix = load_model(base_folder, compute=Compute(remat="block")), random_prefix(model.config)
    cache = jax.tree.map(lambda zeros: zeros + 0.1, empty_cache(model.config, 40))
    slots = jnp.broadcast_to(10 + jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    def summed(inputs, model):
        return sum(jnp.sin(array).sum() for array in jax.tree.leaves(model.hidden(TOKENS, *inputs, slots)))

    gradients = (jax.jit(jax.grad(summed))((prefix, cache), each) for each in (other, model))
    for ours, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert jnp.abs(expected).max() > 0
        np.testing.assert_allclose(ours, expected, rtol=0, atol=MODEL * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpu_may_not_round_float32_factors_to_tf32(dtype):
    factors = jnp.zeros((3, 4), dtype), jnp.zeros((5, 4), jnp.float32)
    for left, right in (factors, factors[::-1]):
        lowered = jax.jit(lambda left, right: einsum("ri,oi->ro", left, right)).lower(left, right)
        assert "precision = [HIGHEST, HIGHEST]" in lowered.as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_on_a_gpu_products_and_their_gradients_have_the_bases_type(as_on_a_gpu, dtype):
    """Devices that share a weight add up half as many bytes, and multiply at half precision's speed."""
    x, weight, gradient = normals((3, 48), (96, 48), (3, 96), dtype=dtype)
    program = jax.make_jaxpr(lambda *inputs: jax.vjp(frozen_matmul, *inputs[:2])[1](inputs[2])[0])(x, weight, gradient)
    assert (
        re.findall(r":(\w+)\[\S+\] = dot_general", str(program))
        == [{"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]] * 2
    )


def test_what_is_recomputed_waits_for_its_gradient_on_a_gpu_too(as_on_a_gpu):
    x, gradient = jnp.arange(3.0), jnp.full(3, jnp.inf)
    np.testing.assert_array_equal(jax.jit(after)(gradient, x), x)
    assert "optimization_barrier %arg0, %arg1" in jax.jit(lambda *inputs: after(*inputs)).lower(gradient, x).as_text()


@pytest.mark.parametrize("base_folder", ["parallel", "gpt2"], indirect=True)
def test_block_recomputation_keeps_one_array_of_each_layer(base_folder, user_options):
    config = read_model_config(base_folder)

    def added_by_a_layer(remat):
        deep, deeper = (dataclasses.replace(config, n_layer=n) for n in (2, 4))
        bases = (abstract_model(each, Compute(remat=remat)) for each in (deep, deeper))
        needed = [needed_memory(lowered_gradient(base, TOKENS).compile(user_options)) for base in bases]
        return (needed[1] - needed[0]) / 2

    assert added_by_a_layer("block") < 2 * TOKENS.size * config.n_embd * 4
    assert added_by_a_layer("elementwise") > 8 * TOKENS.size * config.n_embd * 4


def test_layer_norms_keep_their_input_alone(user_options):
    def summed(x, weight):
        for _ in range(8):
            x = x + jnp.sin(layer_norm(x, weight, weight, 1e-5))
        return x.sum()

    x = jnp.zeros((4, 64, 256))
    assert needed_memory(jax.jit(jax.grad(summed)).lower(x, x[0, 0]).compile(user_options)) < (8 + 3) * x.nbytes


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_activations_are_computed_in_float32(activation):
    x = jnp.linspace(-4, 4, 999, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(activate(x, activation), activate(x.astype(jnp.float32), activation).astype(x.dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layer", ["layer norm", "rotation"])
def test_layers_in_half_precision_round_once(dtype, layer):
    """And so do their gradients."""
    cos_sin = tuple(normals((2, 3, 8), (2, 3, 8)))
    function, shapes = {
        "layer norm": (lambda *inputs: layer_norm(*inputs, 1e-5), ((9, 48), (9, 48), (48,), (48,))),
        "rotation": (lambda x: rotate(x, cos_sin), ((2, 3, 4, 16), (2, 3, 4, 16))),
    }[layer]

    def computed(gradient, *inputs):
        out, pull_back = jax.vjp(function, *inputs)
        return out, pull_back(gradient)[0]

    halves = normals(*shapes, dtype=dtype)
    wide = computed(*(x.astype(jnp.float32) for x in halves))
    for ours, exact in zip(computed(*halves), wide, strict=True):
        np.testing.assert_array_equal(ours, exact.astype(dtype))


def test_activations_keep_their_input_alone(user_options):
    config = read_model_config(GOLDEN_BASE)
    bases = (abstract_model(dataclasses.replace(config, n_layer=n)) for n in (2, 4))
    fewer, more = (needed_memory(lowered_gradient(base, TOKENS).compile(user_options)) for base in bases)
    assert (more - fewer) / 2 < 16 * TOKENS.size * config.n_embd * 4  # one more of the MLP's width would make 17.7
