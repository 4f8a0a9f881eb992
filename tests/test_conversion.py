"""`jaxprefix convert`: prefixes, base models and training states, there and back."""

import errno
import functools
import json
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from convert import gpt_neox, table
from convert.errors import InputError
from convert.prefix import from_dynamic_cache, read_prefix, to_dynamic_cache
from convert.weights import weight_files
from jaxprefix import load_model, load_tokenizer, models
from jaxprefix.base_folder import open_base
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from tests.base_folders import GOLDEN, GOLDEN_BASE, changed_weights, make_base_folder, make_bpe_folder
from tests.conversion import converted
from torch_ref.prefix import to_rows

WEIGHT = GOLDEN / "forward.weight"


def test_a_prefix_through_every_format_is_bit_identical(tmp_path):
    place = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    for name in ("p.npy", "p.safetensors", "p.checkpoint", "adapter2", "p.weight"):
        place = converted(place, tmp_path / name, GOLDEN_BASE)
    back, original = (torch.load(path, weights_only=True) for path in (place, WEIGHT))
    assert torch.equal(back, original)
    assert back.dtype == original.dtype


def test_an_adapter_tells_its_shape_without_a_base(tmp_path):
    adapter = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")  # no header
    shape = {"n_layer": "3", "n_head": "4", "head_dim": "16"}
    assert read_prefix(adapter)[1] == shape | {"base_model": str(GOLDEN_BASE)}
    again = converted(adapter, tmp_path / "again")
    np.testing.assert_array_equal(read_prefix(again)[0], read_prefix(WEIGHT)[0])
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(GOLDEN_BASE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_virtual_tokens", 9, "num_virtual_tokens is 9, the weights have 10 positions"),
        ("num_layers", 2, "ask for 256 numbers per position, the weights have 384"),
        ("token_dim", "64", r"num_attention_heads must be positive 32-bit integers, found \[3, '64', 4\]"),
        ("num_layers", True, r"num_attention_heads must be .*, found \[True, 64, 4\]"),
        ("num_layers", 0, r"num_attention_heads must be .*, found \[0, 64, 4\]"),
        ("num_attention_heads", 5, "token_dim 64 is not divisible by num_attention_heads 5"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(tmp_path, field, value, message):
    adapter = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(InputError, match=message):
        read_prefix(adapter)


def test_an_adapter_for_other_heads_is_refused(tmp_path):
    adapter = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    base = make_base_folder(tmp_path / "base", num_attention_heads=2)
    with pytest.raises(InputError, match="n_head: made for 4, this base has 2") as error:
        converted(adapter, tmp_path / "p.weight", base)
    assert "head_dim: made for 16, this base has 32" in str(error.value)
    view = torch.load(WEIGHT, weights_only=True).view(10, 6, 4, 16)
    torch.save(view, tmp_path / "view.weight")
    with pytest.raises(InputError, match="n_head: made for 4, this base has 2"):
        converted(tmp_path / "view.weight", tmp_path / "q.weight", base)


def test_a_prefix_needs_to_know_its_base(tmp_path):
    with pytest.raises(InputError, match="give --pretrained_model_dir"):
        converted(WEIGHT, tmp_path / "adapter")
    base = make_base_folder(tmp_path / "base", num_hidden_layers=2)
    with pytest.raises(InputError, match="it has 384 numbers per position"):
        converted(WEIGHT, tmp_path / "p.weight", base)


def test_torch_is_needed_to_write_its_files_only(monkeypatch, tmp_path):
    expected = torch.load(WEIGHT, weights_only=True).numpy()
    monkeypatch.setitem(sys.modules, "torch", None)
    np.testing.assert_array_equal(np.load(converted(WEIGHT, tmp_path / "p.npy")), expected)
    with pytest.raises(InputError, match="needs PyTorch: pip install torch"):
        converted(WEIGHT, tmp_path / "p.weight")


def test_dynamic_cache_there_and_back():
    folded = read_prefix(WEIGHT)[0]
    cache = to_dynamic_cache(folded, n_layer=3, n_head=4, batch_size=2)
    expected = to_rows(torch.from_numpy(folded)[None], 3, 4)
    for layer in range(3):
        for part, index in ((cache.layers[layer].keys, 2 * layer), (cache.layers[layer].values, 2 * layer + 1)):
            assert torch.equal(part, expected[index].expand(2, -1, -1, -1))
    np.testing.assert_array_equal(from_dynamic_cache(cache), folded)
    halved = to_dynamic_cache(folded, n_layer=3, n_head=4, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN_BASE, dtype=torch.bfloat16)
    assert model(torch.tensor([[5, 6]]), past_key_values=halved).logits.dtype == torch.bfloat16
    with pytest.raises(InputError, match="384 numbers per position do not fit 5 layers and 4 heads"):
        to_dynamic_cache(folded, n_layer=5, n_head=4)


def test_a_cache_of_different_rows_is_no_prefix():
    base = AutoModelForCausalLM.from_pretrained(GOLDEN_BASE)
    with torch.no_grad():
        alike, different = (base(torch.tensor(ids)).past_key_values for ids in ([[5, 6], [5, 6]], [[5, 6], [7, 8]]))
    assert from_dynamic_cache(alike).shape == (2, 384)
    with pytest.raises(InputError, match="the 2 rows of the cache differ"):
        from_dynamic_cache(different)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 120_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_base_model_there_and_back_is_bit_identical(tmp_path, monkeypatch, dtype, shard_bytes):
    source = make_base_folder(tmp_path / "base")
    monkeypatch.setattr(models, "write_weights", functools.partial(table.write_weights, shard_bytes=shard_bytes))
    weights = {name: array.astype(dtype) for name, array in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    copy = converted(source, tmp_path / "copy")
    written: dict[str, np.ndarray] = {}
    files = weight_files(copy)
    assert (len(files) > 1) == (shard_bytes == 120_000)
    for file in files:
        assert file.stat().st_size < shard_bytes + 5_000
        written |= load_file(file)
    assert written.keys() == weights.keys()
    for name, array in weights.items():
        assert written[name].dtype == dtype
        np.testing.assert_array_equal(written[name], array)
    reference = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)  # and transformers reads it
    assert torch.equal(reference.get_output_embeddings().weight, torch.from_numpy(weights["embed_out.weight"]).float())
    with pytest.raises(InputError, match="is not an empty folder"):
        converted(source, copy)


def test_the_weights_of_a_loaded_model_can_be_written(tmp_path):
    base = make_base_folder(tmp_path / "base")
    state = nnx.to_flat_state(nnx.split(load_model(base))[1])
    weights = ((".".join(map(str, path)), np.asarray(leaf[...])) for path, leaf in state)
    table.write_weights(tmp_path, gpt_neox.TABLE, 3, weights)
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, base))
    assert written.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(written[name], array)


def test_nothing_is_written_into_a_folder_that_holds_something(tmp_path):
    converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    with pytest.raises(InputError, match="adapter: is not an empty folder"):
        converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)


def test_others_may_read_what_others_may_read_beside_it(tmp_path):
    folder = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    weights, settings = (folder / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert weights.stat().st_mode == settings.stat().st_mode


def test_sources_that_cannot_be_converted(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        converted(tmp_path / "nowhere", tmp_path / "p.weight")
    with pytest.raises(InputError, match=r"not a run folder with a checkpoint, which a \.pt target needs"):
        converted(tmp_path, tmp_path / "state.pt")


def test_a_base_model_becomes_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"is a base model, which becomes a folder, not a .weight file"):
        converted(GOLDEN_BASE, tmp_path / "base.weight")
    with pytest.raises(InputError, match="is a base model; --pretrained_model_dir is only for"):
        converted(GOLDEN_BASE, tmp_path / "base", GOLDEN_BASE)


def test_a_bases_config_beside_an_adapter_makes_it_no_base(tmp_path):
    adapter = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    shutil.copy(GOLDEN_BASE / "config.json", adapter)
    np.testing.assert_array_equal(np.load(converted(adapter, tmp_path / "p.npy")), read_prefix(WEIGHT)[0])


def test_a_copied_base_keeps_template_and_license_and_no_adapter(tmp_path):
    source = make_base_folder(tmp_path / "base")
    for name in ("chat_template.jinja", "LICENSE", "adapter_config.json", "training_args.bin"):
        (source / name).write_text("{}")
    copy = converted(source, tmp_path / "copy")
    names = {path.name for path in copy.iterdir()}
    assert {"chat_template.jinja", "LICENSE", "config.json", "spiece.model"} < names
    assert names.isdisjoint({"adapter_config.json", "training_args.bin"})
    assert load_tokenizer(copy).fingerprint == load_tokenizer(source).fingerprint


def test_an_adapter_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("convert.prefix.write_safetensors", Mock(side_effect=OSError(28, "No space")))
        with pytest.raises(InputError, match=r"adapter: cannot be written \(No space\)"):
            converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)


def test_a_copy_that_fails_can_be_repeated(tmp_path):
    source = make_base_folder(tmp_path / "base")
    with changed_weights(source) as weights:
        weights[max(weights)] *= np.float32(np.nan)
    for _ in range(2):
        with pytest.raises(InputError, match="holds numbers that are not finite"):
            converted(source, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_copied_gpt2_keeps_its_two_tokenizer_files(tmp_path):
    source = make_bpe_folder(tmp_path / "base")
    found = load_tokenizer(source).fingerprint
    tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(source))
    (source / "tokenizer.json").unlink()
    assert load_tokenizer(converted(source, tmp_path / "copy")).fingerprint == found


def test_the_prefix_of_a_run_whose_description_is_damaged(finished, tmp_path):
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    (run / "config.json").write_text("{")
    converted(run, tmp_path / "p.weight")
    np.testing.assert_array_equal(read_prefix(tmp_path / "p.weight")[0], read_prefix(finished.run_dir)[0])


@pytest.mark.parametrize("suffix", [".weight", ".checkpoint", ".npy", ".safetensors"])
def test_a_base_model_is_no_file(tmp_path, suffix):
    with pytest.raises(InputError, match=rf"is a base model, which becomes a folder, not a {suffix} file"):
        converted(GOLDEN_BASE, tmp_path / f"base{suffix}")


def test_a_conversion_asks_for_the_revision(tmp_path, monkeypatch):
    asked = []

    def opened(*arguments):
        asked.append(arguments)
        return open_base(str(GOLDEN_BASE))

    monkeypatch.setattr("jaxprefix.conversion.open_base", opened)
    convert(ConvertConfig(WEIGHT, tmp_path / "p.npy", "user/model", revision="v1"))
    assert asked == [("user/model", "v1")]


def test_what_cannot_be_written_beside_the_source_is_told_as_such(tmp_path, monkeypatch):
    source = converted(WEIGHT, tmp_path / "adapter", GOLDEN_BASE)
    (source / "file").touch()
    (source / "p.weight.tmp").mkdir()

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space", str(path))

    monkeypatch.setattr("convert.prefix.write_safetensors", full)
    for target in ("file/p.weight", "p.weight", "again"):
        with pytest.raises(InputError, match=f"{target}: cannot be written"):
            converted(source, source / target)
