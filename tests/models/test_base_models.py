"""Properties that hold for any correct prefix, and settings that must not go unnoticed when wrong."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.errors import InputError
from jaxprefix import load_model
from jaxprefix.models import attention, fingerprint, gpt2, gpt_neox
from jaxprefix.models.config import read_model_config
from tests.arrays import TOKENS, empty_cache, normals, random_prefix
from tests.base_folders import with_config
from tests.tolerances import MODEL


def keys_values(model, tokens):
    """The prefix that real tokens leave behind."""
    _, cache = model(tokens)
    return attention.heads_first(jnp.stack([jnp.concatenate(layer) for layer in cache]))


@pytest.fixture
def neox(model):
    if model.config.model_type != "gpt_neox":
        pytest.skip("of GPT-NeoX alone")
    return model


def prefix_gap(model) -> float:
    """Largest difference between text behind a prefix of real tokens and the concatenated text."""
    head, tail = TOKENS[:1, :9], TOKENS[:1, 9:]
    whole, _ = model(TOKENS[:1])
    split, _ = model(tail, prefix=keys_values(model, head))
    return float(jnp.abs(split - whole[:, 9:]).max())


def test_prefix_of_real_tokens_equals_concatenation(model):
    assert prefix_gap(model) < MODEL


def test_missing_position_offset_is_noticed(model, monkeypatch):
    for module in (gpt_neox, gpt2):
        monkeypatch.setattr(module, "positions_of", lambda slots, *_: slots)
    assert prefix_gap(model) > 100 * MODEL


def test_rotated_prefix_keys_are_noticed(neox):
    head = TOKENS[:1, :9]
    prefix = keys_values(neox, head)
    cos_sin = gpt_neox.rotary_cos_sin(jnp.arange(9)[None], neox.config)
    rotated = jnp.stack([gpt_neox.rotate(layer[:1], cos_sin)[0] for layer in prefix])
    whole, _ = neox(TOKENS[:1])
    split, _ = neox(TOKENS[:1, 9:], prefix=prefix.at[:, 0].set(rotated))
    assert jnp.abs(split - whole[:, 9:]).max() > 100 * MODEL


@pytest.mark.parametrize("change", [{"rotary_base": 500.0}, {"rotary_fraction": 1.0}, {"layer_norm_eps": 0.1}])
def test_wrong_setting_is_noticed(neox, change):
    assert jnp.abs(with_config(neox, **change)(TOKENS)[0] - neox(TOKENS)[0]).max() > 100 * MODEL


def test_swapped_residual_is_noticed(neox):
    swapped = with_config(neox, parallel_residual=not neox.config.parallel_residual)
    assert jnp.abs(swapped(TOKENS)[0] - neox(TOKENS)[0]).max() > 100 * MODEL


def test_empty_prefix_is_the_base_model(model):
    empty = jnp.zeros((model.config.n_layer, 2, 0, model.config.n_head, model.config.head_dim))
    np.testing.assert_allclose(model(TOKENS, empty)[0], model(TOKENS)[0], rtol=0, atol=MODEL)


def test_prefix_changes_every_position(model):
    changed = jnp.abs(model(TOKENS, random_prefix(model.config))[0] - model(TOKENS)[0]).max(axis=-1)
    assert changed.min() > 100 * MODEL


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([[1, 2]], "list"),
        (torch.zeros(2, 3, dtype=torch.int64), "Tensor"),
        (np.zeros(3, np.int32), r"int32 \[3\]"),
        (np.zeros((1, 2, 3), np.int32), r"int32 \[1, 2, 3\]"),
        (np.zeros((2, 0), np.int32), r"int32 \[2, 0\]"),
        (np.zeros((2, 3), np.float32), r"float32 \[2, 3\]"),
    ],
)
def test_what_is_no_array_of_tokens_is_refused(tokens, found):
    with pytest.raises(InputError, match=f"tokens must be an integer array .*; found {found}$"):
        attention.check_inputs(tokens, None, None)


def test_a_cache_needs_slots(model):
    with pytest.raises(InputError, match="a cache needs the slots"):
        model(TOKENS, cache=empty_cache(model.config, 32))


@pytest.mark.parametrize("with_prefix", [True, False])
def test_cached_decode_equals_full_forward(model, with_prefix):
    prefix = random_prefix(model.config) if with_prefix else None
    whole, _ = model(TOKENS, prefix)
    logits, cache = model(TOKENS[:, :10], prefix, empty_cache(model.config, 32), attention.own_slots(TOKENS[:, :10]))
    parts = [logits]
    step = jax.jit(lambda token, cache, slot: model(token, prefix, cache, slot))
    for slot in range(10, TOKENS.shape[1]):
        logits, cache = step(TOKENS[:, slot : slot + 1], cache, jnp.full((2, 1), slot))
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=MODEL)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_what_is_written_beyond_a_caches_end_is_dropped(on_a_gpu, request):
    """As are the tokens that GPUs still compute for rows that have stopped."""
    if on_a_gpu:
        request.getfixturevalue("as_on_a_gpu")
    cache, (new,) = (jnp.zeros((2, 4, 3, 16)),) * 2, normals((2, 4, 1, 16))
    written = attention.write_cache(cache, new, 2 * new, jnp.asarray([[1], [3]]))
    for array, factor in zip(written, (1, 2), strict=True):
        np.testing.assert_array_equal(array[0, :, 1], factor * new[0, :, 0])
        assert jnp.count_nonzero(array) == new[0].size


def test_padding_on_the_right_changes_nothing(model):
    padded = jnp.pad(TOKENS, ((0, 0), (0, 8)), constant_values=3)
    np.testing.assert_allclose(model(padded)[0][:, :24], model(TOKENS)[0], rtol=0, atol=MODEL)


def test_other_types_are_refused(base_folder):
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16; is int8"):
        load_model(base_folder, "int8")


def test_a_type_may_be_jaxs(base_folder):
    assert load_model(base_folder, jnp.bfloat16).embed.weight.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="is 'half-size'"):
        load_model(base_folder, "half-size")


def test_bfloat16_stays_close_to_float32(base_folder, model):
    prefix = random_prefix(model.config)
    half, _ = load_model(base_folder, "bfloat16")(TOKENS, prefix)
    whole, _ = model(TOKENS, prefix)
    assert half.dtype == jnp.float32
    difference = jax.nn.softmax(half) - jax.nn.softmax(whole)
    assert 0 < jnp.abs(difference).mean() < 2e-4


def test_a_fingerprint_is_of_the_weights_whatever_their_file(base_folder, tmp_path):
    config = read_model_config(base_folder)
    weights = load_file(base_folder / "model.safetensors")
    shutil.copy(base_folder / "config.json", tmp_path)
    torch.save({name: torch.from_numpy(weight) for name, weight in weights.items()}, tmp_path / "pytorch_model.bin")
    found = fingerprint(base_folder, config)
    assert fingerprint(tmp_path, config) == found
    for name, weight in weights.items():
        changed = weight.copy()
        changed[(0, -1) if weight.ndim == 2 else -1] += np.float32(1e-3)  # what lies first in the file
        save_file(weights | {name: changed}, tmp_path / "model.safetensors")
        assert fingerprint(tmp_path, config) != found, name


@pytest.mark.parametrize(
    "change", [lambda prefix: prefix[1:], lambda prefix: prefix[..., 1:], lambda prefix: prefix[0]]
)
def test_a_prefix_of_another_model_is_refused(model, change):
    prefix = change(random_prefix(model.config))
    with pytest.raises(InputError, match=rf"is an array \[{model.config.n_layer}, 2, P, 4, 16\], found one of \[.*, "):
        model.config.prefix_length(prefix)
    if prefix.ndim == 5:
        with pytest.raises(InputError, match="a prefix of this model is an array"):
            model(TOKENS, prefix=prefix)


def test_a_path_is_no_prefix(model):
    with pytest.raises(InputError, match="found str"):
        model.config.prefix_length("runs/smile")


def test_a_fingerprint_is_of_the_weights_in_whatever_order_they_stand(base_folder, tmp_path):
    config = read_model_config(base_folder)
    weights = load_file(base_folder / "model.safetensors")
    backwards = {name: torch.from_numpy(weights[name]) for name in reversed(weights)}
    torch.save(backwards, tmp_path / "pytorch_model.bin")
    assert fingerprint(tmp_path, config) == fingerprint(base_folder, config)
