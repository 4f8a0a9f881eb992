"""The encoder, and prefix files on their way between us, PEFT and the original."""

import dataclasses
import json
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.errors import InputError
from convert.prefix import read_prefix, to_folded, to_layers
from jaxprefix import load_model, load_prefix
from jaxprefix.base_folder import base_identity, differing_fields
from jaxprefix.models.config import read_model_config
from jaxprefix.prefix import DirectPrefix, PrefixEncoder, base_keys_values, new_encoder, save_prefix
from tests.arrays import random_prefix
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_base_folder


def test_layout_is_key_then_value_of_each_layer():
    n_layer, n_head, head_dim, length = 3, 2, 4, 5
    folded = np.arange(length * 2 * n_layer * n_head * head_dim).reshape(length, -1)
    view = folded.reshape(length, 2 * n_layer, n_head, head_dim)
    layered = to_layers(folded, n_layer, n_head, head_dim)
    for layer in range(n_layer):
        np.testing.assert_array_equal(layered[layer, 0], view[:, 2 * layer])
        np.testing.assert_array_equal(layered[layer, 1], view[:, 2 * layer + 1])
    np.testing.assert_array_equal(to_folded(layered), folded)


def test_encoder_names_and_shapes_are_the_originals(golden_model):
    encoder = PrefixEncoder(golden_model.config, 10, 11, 12, 0)
    shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.split(encoder)[1])}
    assert shapes == {
        "prefix_wte.weight": (10, 11),
        "prefix_mlp.0.weight": (12, 11),
        "prefix_mlp.0.bias": (12,),
        "prefix_mlp.2.weight": (384, 12),
        "prefix_mlp.2.bias": (384,),
    }


def test_encoder_starts_as_torch_does(golden_model):
    encoder = PrefixEncoder(golden_model.config, 500, 400, 300, 0)
    assert float(encoder.prefix_wte.weight[...].std()) == pytest.approx(1, abs=0.02)
    for name, fan_in in (("0", 400), ("2", 300)):
        for values in (encoder.prefix_mlp[name].weight[...], encoder.prefix_mlp[name].bias[...]):
            assert float(jnp.abs(values).max()) == pytest.approx(fan_in**-0.5, rel=0.05)
            assert float(values.std()) == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.1)


def test_a_direct_prefix_starts_at_the_bases_keys_and_values(model):
    target = base_keys_values(model, 5)
    encoder = new_encoder(model, 5, 10, 0, seed=0)
    assert isinstance(encoder, DirectPrefix)
    np.testing.assert_array_equal(encoder(), target)
    assert new_encoder(model, 440, 10, 0, seed=0)().shape[2] == 440
    with pytest.raises(InputError, match="--prefix_seq_len 441 is more than the base model's 440 token ids"):
        new_encoder(model, 441, 10, 0, seed=0)


def test_fitting_brings_the_encoder_close_to_the_bases_keys_and_values(golden_model):
    target = base_keys_values(golden_model, 10)
    raw = PrefixEncoder(golden_model.config, 10, 10, 10, 42)
    fitted = new_encoder(golden_model, 10, 10, 10, seed=42)
    assert jnp.square(fitted() - target).mean() < 0.97 * jnp.square(raw() - target).mean()


@pytest.mark.parametrize("hidden_dim", [10, 0])
def test_every_leaf_gets_a_gradient(model, hidden_dim):
    encoder = new_encoder(model, 6, 5, hidden_dim, seed=1)
    tokens = jnp.asarray([[5, 6, 7, 8]])
    gradient = jax.jit(jax.grad(lambda e: jax.nn.logsumexp(model(tokens, e())[0]).mean()))(encoder)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == (5 if hidden_dim else 1)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in leaves)
    prefix_gradient = jax.jit(jax.grad(lambda p: jax.nn.logsumexp(model(tokens, p)[0]).mean()))(encoder())
    assert jnp.abs(prefix_gradient).max(axis=(2, 4)).min() > 0, "every layer, key, value and head takes part"


def save_as(kind: str, folded: np.ndarray, path):
    tensor = torch.from_numpy(folded.copy())
    match kind:
        case "weight":
            torch.save(tensor.requires_grad_(), path)
        case "parameter":
            torch.save(torch.nn.Parameter(tensor), path)
        case "old torch":
            torch.save(tensor, path, _use_new_zipfile_serialization=False)
        case "bfloat16" | "float16":
            torch.save(tensor.to(getattr(torch, kind)), path)
        case "saved on a GPU":
            with unittest.mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
                torch.save(tensor, path)
        case "4-D view":
            torch.save(tensor.view(10, 6, 4, 16), path)
        case "safetensors":
            save_file({"anything": folded}, path)
        case "npy" | "npy layered":
            with path.open("wb") as file:
                np.save(file, folded if kind == "npy" else to_layers(folded, 3, 4, 16))


KINDS = ("weight", "parameter", "old torch", "bfloat16", "float16", "saved on a GPU", "4-D view", "safetensors")


@pytest.mark.parametrize("kind", [*KINDS, "npy", "npy layered"])
def test_every_format_is_told_by_content_and_read(golden_model, tmp_path, kind):
    folded, _ = read_prefix(GOLDEN / "forward.weight")
    path = tmp_path / "file"
    save_as(kind, folded, path)
    stored = getattr(torch, kind) if kind in ("bfloat16", "float16") else torch.float32
    expected = torch.from_numpy(folded).to(stored).float().numpy()
    np.testing.assert_array_equal(to_folded(load_prefix(path, golden_model.config)), expected)


def test_a_prefix_of_ones_own_can_be_saved(golden_model, tokenizer, tmp_path):
    prefix = random_prefix(golden_model.config)
    save_prefix(str(tmp_path / "own"), prefix, golden_model.config, tokenizer)
    np.testing.assert_array_equal(load_prefix(tmp_path / "own", golden_model.config, tokenizer), prefix)
    with pytest.raises(InputError, match="a prefix holds floating-point numbers, found int32"):
        golden_model.config.prefix_length(prefix.astype(int))
    with pytest.raises(InputError, match=r"holds NumPy's or JAX's floating-point numbers, found torch\.float32"):
        golden_model.config.prefix_length(torch.from_numpy(np.array(prefix)))
    with pytest.raises(InputError, match="a prefix of this model is an array"):
        save_prefix(tmp_path / "wrong", prefix[:1], golden_model.config, tokenizer)
    for spoilt, problem in ((prefix * jnp.nan, "not finite; it is not written"), (prefix[:, :, :0], "this one has 0")):
        with pytest.raises(InputError, match=problem):
            save_prefix(tmp_path / "own", spoilt, golden_model.config, tokenizer)
    np.testing.assert_array_equal(load_prefix(tmp_path / "own", golden_model.config), prefix)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"data_sha256": ""}')
    with pytest.raises(InputError, match="run: is a run's folder, whose prefix is in prefix/; name that one"):
        save_prefix(tmp_path / "run", prefix, golden_model.config, tokenizer)


def test_a_prefix_leaves_room_for_one_token(golden_model, tokenizer, tmp_path):
    config = dataclasses.replace(golden_model.config, n_positions=8)
    save_prefix(tmp_path / "own", random_prefix(config, 7), config, tokenizer)
    assert load_prefix(tmp_path / "own", config).shape[2] == 7
    with pytest.raises(InputError, match="a prefix must have 1 to 7 positions, this one has 8"):
        save_prefix(tmp_path / "own", random_prefix(config, 8), config, tokenizer)
    with pytest.raises(InputError, match="prefix length 7 leaves no room in 7 positions"):
        load_prefix(tmp_path / "own", dataclasses.replace(config, n_positions=7))


def test_another_base_is_refused_field_by_field(golden_model, tokenizer, tmp_path):
    save_prefix(tmp_path / "prefix", random_prefix(golden_model.config), golden_model.config, tokenizer)
    other = read_model_config(make_base_folder(tmp_path / "other", num_hidden_layers=2, vocab_size=500))
    with pytest.raises(InputError) as error:
        load_prefix(tmp_path / "prefix", other)
    assert "n_layer: made for 3, this base has 2" in str(error.value)
    assert "vocab_size: made for 440, this base has 500" in str(error.value)
    assert "n_head" not in str(error.value)


def test_another_tokenizer_is_refused(golden_model, tokenizer, tmp_path):
    save_prefix(tmp_path / "prefix", random_prefix(golden_model.config), golden_model.config, tokenizer)
    with pytest.raises(InputError, match="tokenizer: made for "):
        load_prefix(tmp_path / "prefix", golden_model.config, dataclasses.replace(tokenizer, fingerprint="0" * 16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((10, 100), np.float32), "it has 100 numbers per position"),
        (np.full((10, 384), np.nan, np.float32), "3840 numbers that are not finite"),
        (np.full((10, 384), 1e300), "3840 numbers that are not finite"),
        (np.ones(384, np.float32), r"found shape \(384,\)"),
        (np.ones((10, 384), np.int32), "expected floating-point numbers, found int32"),
        (np.ones((600, 384), np.float32), "prefix length 600 leaves no room in 512 positions"),
    ],
)
def test_unusable_numbers_are_refused(golden_model, tmp_path, content, message):
    np.save(tmp_path / "p.npy", content)
    with pytest.raises(InputError, match=message):
        load_prefix(tmp_path / "p.npy", golden_model.config)


def test_files_that_are_no_prefix_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is no prefix")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({"state": 1}, tmp_path / "dict")
    torch.save(torch.arange(20).view(4, 5), tmp_path / "integers")
    torch.save(torch.ones(4, 5), tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "cut").write_bytes((tmp_path / "old").read_bytes()[:30])
    for name, message in {
        "text": "not a prefix; expected",
        "empty": "not a prefix; expected",
        "cut": "not a torch file that can be read safely",
        "integers": "expected floating-point numbers, found int64",
        "zip": "not a torch file that can be read safely",
        "folder": "holds no prefix: neither",
        "lora": "peft_type is not PREFIX_TUNING",
        "dict": r"expected one dense tensor, found a dict of \[",
        "missing": "no such prefix file or folder",
    }.items():
        with pytest.raises(InputError, match=message):
            read_prefix(tmp_path / name)


def test_the_header_names_the_base_and_its_tokenizer(golden_model, tokenizer, tmp_path):
    save_prefix(tmp_path / "prefix", random_prefix(golden_model.config), golden_model.config, tokenizer)
    _, header = read_prefix(tmp_path / "prefix")
    assert header["base_model"] == str(GOLDEN_BASE)
    assert header["tokenizer"] == tokenizer.fingerprint
    assert (header["model_type"], header["vocab_size"]) == ("gpt_neox", "440")


@pytest.mark.parametrize("field", ["model_type", "n_layer", "n_head", "head_dim", "vocab_size", "tokenizer"])
def test_each_part_of_what_identifies_a_base_is_compared(golden_model, tokenizer, field):
    identity = base_identity(golden_model.config, tokenizer)
    assert differing_fields(identity, identity) == []
    assert differing_fields(identity | {field: "other"}, identity) == [
        f"{field}: made for other, this base has {identity[field]}"
    ]


def test_the_seed_decides_how_the_encoder_starts(golden_model):
    one, other = (new_encoder(golden_model, 5, 5, 4, seed=seed)() for seed in (0, 1))
    assert (one != other).any()


def test_a_direct_prefix_of_a_base_in_half_precision_is_float32():
    encoder = new_encoder(load_model(GOLDEN_BASE, "bfloat16"), 5, 10, 0, seed=0)
    assert encoder().dtype == encoder.folded[...].dtype == jnp.float32


def test_a_prefix_of_another_architecture_is_refused(golden_model, tokenizer, tmp_path):
    save_prefix(tmp_path / "prefix", random_prefix(golden_model.config), golden_model.config, tokenizer)
    other = dataclasses.replace(golden_model.config, model_type="gpt2")
    with pytest.raises(InputError, match="model_type: made for gpt_neox, this base has gpt2"):
        load_prefix(tmp_path / "prefix", other)


def test_a_prefix_in_half_precision_is_saved_in_float32(golden_model, tokenizer, tmp_path):
    half = random_prefix(golden_model.config).astype(jnp.bfloat16)
    save_prefix(tmp_path / "own", half, golden_model.config, tokenizer)
    stored = load_file(tmp_path / "own" / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(read_prefix(tmp_path / "own")[0], stored)
