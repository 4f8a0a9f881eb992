import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.errors import InputError
from convert.gpt_neox import TABLE
from convert.table import _agree, _as_ours, expand, write_weights
from convert.weights import BLOCK, FiniteWeight, is_finite, stored_weights
from jaxprefix import load_model
from tests.base_folders import changed_weights, make_base_folder


@pytest.fixture
def folder(tmp_path):
    return make_base_folder(tmp_path / "base")


def test_expand_writes_out_every_layer():
    rules = expand({"a": "x", "h.{layer}.w": "layers.{layer}.w", "h.{layer}.b": None}, 2)
    assert rules == {
        "a": "x",
        "h.0.w": "layers.0.w",
        "h.1.w": "layers.1.w",
        "h.0.b": None,
        "h.1.b": None,
    }


def test_our_paths_are_all_different():
    paths = [path for path in expand(TABLE, 3).values() if path]
    assert len(paths) == len(set(paths)) == 4 + 12 * 3


def test_all_problems_are_reported_at_once(folder):
    with changed_weights(folder) as weights:
        weights["gpt_neox.surplus"] = weights.pop("embed_out.weight")
        weights["gpt_neox.final_layer_norm.bias"] = np.zeros(5, np.float32)
    with pytest.raises(InputError) as error:
        load_model(folder)
    assert str(error.value).splitlines()[1:] == [
        "  - unknown weight gpt_neox.surplus",
        "  - missing weight embed_out.weight",
        "  - gpt_neox.final_layer_norm.bias has shape (5,), config.json asks for (64,)",
    ]


@pytest.mark.parametrize("shape", [(64, 191), (192, 64), (64,), ()])
def test_a_weight_that_cannot_be_split_is_told_by_its_shape_in_the_file(tmp_path, shape):
    folder, name = make_base_folder(tmp_path / "base", model_type="gpt2"), "transformer.h.1.attn.c_attn.weight"
    with changed_weights(folder) as weights:
        weights |= {name: np.zeros(shape, np.float32)}
    with pytest.raises(InputError, match=re.escape(f"{name} has shape {shape}, config.json asks for (64, 192)")):
        load_model(folder)


def test_a_split_weight_is_the_files_wherever_it_is_cut(tmp_path):
    folder = make_base_folder(tmp_path / "base", model_type="gpt2")
    in_file = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    split = in_file.T.reshape(3, 64, 64)
    stored = dict(stored_weights(folder))["transformer.h.0.attn.c_attn.weight"]
    weight = FiniteWeight(stored, lambda array: _as_ours(array, ("transpose", "split")), "qkv")
    np.testing.assert_array_equal(weight.read(None), split)
    for index in np.s_[:, 16:48, :], np.s_[1:2, :, 8:9], np.s_[2:, 3:5, :7]:
        np.testing.assert_array_equal(weight.read(index), split[index])
    np.testing.assert_array_equal(weight.read_first("float32").ravel(), in_file[0], "as fingerprints have it")


def test_legacy_buffers_are_dropped(folder):
    expected = load_model(folder)(jnp.asarray([[5, 6]]))[0]
    with changed_weights(folder) as weights:
        weights |= {"gpt_neox.layers.0.attention.masked_bias": np.float32([-1e9])}
    np.testing.assert_array_equal(load_model(folder)(jnp.asarray([[5, 6]]))[0], expected)


def test_shards_equal_the_single_file(folder):
    expected = load_model(folder)(jnp.asarray([[5, 6]]))[0]
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load_model(folder)(jnp.asarray([[5, 6]]))[0], expected)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"index.json: names files that are missing: model-2.safetensors"):
        load_model(folder)
    save_file(weights, folder / "model.safetensors")  # as transformers saves again, and leaves the index there
    np.testing.assert_array_equal(load_model(folder)(jnp.asarray([[5, 6]]))[0], expected)


def test_a_weight_that_stands_twice_is_refused(folder):
    name = "layers.0.mlp.dense_h_to_4h.weight"
    with changed_weights(folder) as weights:
        weights |= {name: 2 * weights[f"gpt_neox.{name}"]}
    with pytest.raises(InputError, match=f"duplicate weight gpt_neox.{name}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [("{", "not valid JSON"), ("{}", "not an index with a weight_map"), ("[]", "expected a JSON object, found list")],
)
def test_a_broken_index_is_refused(folder, index, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=f"index.json: {message}"):
        load_model(folder)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_on_disk(folder, stored):
    with changed_weights(folder) as weights:
        weights |= {name: w.astype(stored) for name, w in weights.items()}
    model = load_model(folder)
    assert model.embed.weight.dtype == jnp.float32
    assert load_model(folder, "bfloat16").embed.weight.dtype == jnp.bfloat16


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_weight_becomes_another_type_as_it_is_read(folder, stored, dtype):
    with changed_weights(folder) as weights:
        weights |= {name: w.astype(stored) for name, w in weights.items()}
    path = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    expected = load_file(folder / "model.safetensors")[path].astype(dtype)
    found = load_model(folder, dtype).layers[1].mlp.up.weight
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found[...]).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("float32", 1e300), ("bfloat16", 3.4e38)])
def test_numbers_that_another_type_does_not_have_are_told(folder, dtype, value):
    with changed_weights(folder) as weights:
        weights["embed_out.weight"] = np.full(weights["embed_out.weight"].shape, -value, np.float64)
    with pytest.raises(InputError, match=rf"weight: holds numbers beyond \S+, the largest that {dtype} can hold"):
        load_model(folder, dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU has memory of its own")
def test_jax_takes_what_is_read_as_it_is(folder, monkeypatch):
    read, copies = FiniteWeight.read, []
    monkeypatch.setattr(
        FiniteWeight, "read", lambda *given, **named: copies.append(read(*given, **named)) or copies[-1]
    )
    for dtype in ("float32", "bfloat16"):
        copies.clear()
        model = load_model(folder, dtype)
        taken = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)}
        assert taken == {copy.ctypes.data for copy in copies}


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights; expected model\.safetensors or"):
        load_model(folder)


def as_torch_file(folder, change=lambda weights: weights, **options):
    """Replace the safetensors file by torch's."""
    weights = {name: torch.from_numpy(array.copy()) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(change(weights), folder / "pytorch_model.bin", **options)


def forward(folder):
    return load_model(folder)(jnp.asarray([[5, 6]]))[0]


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_torch_files_equal_safetensors(tmp_path, model_type, options):
    folder = make_base_folder(tmp_path / "base", model_type=model_type)
    expected = forward(folder)
    as_torch_file(folder, **options)
    np.testing.assert_array_equal(forward(folder), expected)


def test_bfloat16_torch_shards(folder):
    expected = load_model(folder, "bfloat16")(jnp.asarray([[5, 6]]))[0]
    as_torch_file(folder, lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()})
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    for number in range(2):
        torch.save(dict(list(weights.items())[number::2]), folder / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(weights)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load_model(folder, "bfloat16")(jnp.asarray([[5, 6]]))[0], expected)


def test_gpt2_without_its_prefix_and_with_its_tied_head_and_buffers(tmp_path):
    folder = make_base_folder(tmp_path / "base", model_type="gpt2")
    expected = forward(folder)

    with changed_weights(folder) as weights:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["lm_head.weight"] = weights["wte.weight"]
        weights["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
        weights["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    np.testing.assert_array_equal(forward(folder), expected)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_a_tied_head_that_is_another_is_refused(tmp_path, model_type):
    folder = make_base_folder(tmp_path / "base", model_type=model_type, tie_word_embeddings=True)
    (embedding,) = (
        name for name in load_file(folder / "model.safetensors") if name.endswith(("wte.weight", "embed_in.weight"))
    )
    head = {"gpt2": "lm_head.weight", "gpt_neox": "embed_out.weight"}[model_type]
    with changed_weights(folder) as weights:
        weights |= {head: weights[embedding].copy()}
    np.testing.assert_array_equal(load_model(folder).head_weight, load_file(folder / "model.safetensors")[embedding])

    expected = load_file(folder / "model.safetensors")[embedding]
    with changed_weights(folder) as weights:
        del weights[embedding]  # as safetensors' own save_model keeps one of two names
    np.testing.assert_array_equal(load_model(folder).embed.weight[...], expected)

    with changed_weights(folder) as weights:
        weights[embedding] = weights[head].copy()
        weights[head][-1] += 1
    with pytest.raises(InputError, match=rf"{head} differs from \S*{embedding}, to which config.json ties it"):
        load_model(folder)


@pytest.mark.parametrize("row", [0, 1023, 1024, 2500])
def test_all_rows_of_a_copy_are_compared(row):
    one = np.zeros((2501, 2), np.float32)
    other = one.copy()
    assert _agree(one, other)
    other[row, 1] = 1
    assert not _agree(one, other)


def test_a_tied_embedding_that_is_damaged_is_told_as_such(tmp_path):
    folder = make_base_folder(tmp_path / "base", model_type="gpt2")

    with changed_weights(folder) as weights:
        weights["transformer.wte.weight"][0, 0] = np.nan
        weights["lm_head.weight"] = weights["transformer.wte.weight"].copy()
    with pytest.raises(InputError, match=r"wte.weight: holds numbers that are not finite"):
        load_model(folder)


def test_a_bias_that_the_config_denies_is_left_over(tmp_path):
    folder = make_base_folder(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(InputError, match=r"unknown weight gpt_neox.layers.0.attention.dense.bias"):
        load_model(folder)


def test_a_torch_file_with_more_than_weights_is_refused(folder):
    as_torch_file(folder, lambda weights: weights | {"epoch": 3})
    with pytest.raises(InputError, match=r"pytorch_model.bin: expected a dict of weights, found int at 'epoch'"):
        load_model(folder)


def test_a_torch_file_that_is_no_dict_is_refused(folder):
    as_torch_file(folder, lambda weights: list(weights.values()))
    with pytest.raises(InputError, match=r"pytorch_model.bin: expected a dict of weights, found list"):
        load_model(folder)


def test_all_numbers_are_looked_at():
    numbers = np.zeros(BLOCK + 1, np.float32)
    assert is_finite(numbers)
    numbers[-1] = np.nan
    assert not is_finite(numbers)


def test_shards_of_one_weight_each_hold_it_and_the_index_tells_their_size(tmp_path):
    weights = {"x": np.ones((2, 3), np.float32), "y": np.ones(5, np.float32)}
    write_weights(tmp_path, {"a": "x", "b": "y"}, 1, weights.items(), shard_bytes=1)
    assert [[*load_file(path)] for path in sorted(tmp_path.glob("*.safetensors"))] == [["a"], ["b"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": (6 + 5) * 4}


def test_nan_agrees_with_nan_of_another_type():
    assert _agree(np.array([np.nan], np.float32), np.array([np.nan], np.float16))
