"""Prefix files and caches that cannot be used."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import DynamicCache

from convert.errors import InputError
from convert.files import save_safetensors
from convert.prefix import from_dynamic_cache, read_prefix, write_adapter
from convert.weights import read_safetensors
from tests.base_folders import GOLDEN_BASE
from tests.conversion import converted


def test_two_tensors_of_which_none_is_the_prefix(tmp_path):
    save_file({name: np.ones((2, 8), np.float32) for name in ("a", "b")}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=r"expected the tensor prompt_embeddings, found 2 others: \['a', 'b'\]"):
        read_prefix(tmp_path / "p.safetensors")


@pytest.mark.parametrize("name", ["p.safetensors", "p.bin"])
def test_parts_of_the_base_that_were_trained_too_are_refused(tmp_path, name):
    """PEFT's modules_to_save: without them, the prefix alone is another model."""
    tensors = {"prompt_embeddings": torch.ones(2, 8), "base_model.lm_head.weight": torch.ones(4, 4)}
    torch.save(tensors, tmp_path / "p.bin")
    save_file({key: tensor.numpy() for key, tensor in tensors.items()}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=r"holds \['base_model.lm_head.weight'\] besides the prefix"):
        read_prefix(tmp_path / name)


def test_a_header_that_asks_for_another_width(tmp_path):
    header = {"n_layer": "1", "n_head": "2", "head_dim": "2"}
    save_file({"prompt_embeddings": np.ones((2, 16), np.float32)}, tmp_path / "p.safetensors", metadata=header)
    with pytest.raises(InputError, match="has 16 numbers per position, which do not fit its header's"):
        read_prefix(tmp_path / "p.safetensors")


def test_a_width_that_is_odd(tmp_path):
    np.save(tmp_path / "p.npy", np.ones((2, 5), np.float32))
    with pytest.raises(InputError, match="has 5 numbers per position, which must be an even number, for keys"):
        read_prefix(tmp_path / "p.npy")


def test_an_adapter_without_weights(tmp_path):
    write_adapter(tmp_path, np.ones((2, 8), np.float32), n_layer=1, n_head=1, header={})
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        read_prefix(tmp_path)


@pytest.mark.parametrize("full_at", ["adapter_config.json.tmp", "adapter_model.safetensors.tmp", "writing"])
def test_an_adapter_that_cannot_be_replaced_stays(tmp_path, monkeypatch, full_at):
    """A full disk may tell only as a file is flushed."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fsync(file):
        if (path := tmp_path / full_at).exists() and os.path.samestat(os.fstat(file), path.stat()):
            fail()

    write_adapter(tmp_path, np.ones((2, 8), np.float32), n_layer=1, n_head=1, header={})
    monkeypatch.setattr(os, "fsync", fsync)
    if full_at == "writing":
        monkeypatch.setattr("convert.prefix.save_safetensors", fail)
    with pytest.raises(OSError, match="No space"):
        write_adapter(tmp_path, np.ones((3, 8), np.float32), n_layer=1, n_head=1, header={})
    assert len(read_prefix(tmp_path)[0]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_folder_of_named_adapters_tells_their_names(tmp_path):
    write_adapter(tmp_path / "smile", np.ones((2, 8), np.float32), n_layer=1, n_head=1, header={})
    with pytest.raises(InputError, match=r"holds no prefix: .*; subfolders that hold one: smile"):
        read_prefix(tmp_path)


def test_a_training_state_is_told_as_such(tmp_path):
    torch.save({"encoder": {}}, tmp_path / "state.pt")
    told = r"found a dict of \['encoder'\]; this is a training state: pass it to train --checkpoint_path"
    with pytest.raises(InputError, match=told):
        read_prefix(tmp_path / "state.pt")


def test_an_adapter_whose_config_is_no_json(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config.json: not valid JSON"):
        read_prefix(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.safetensors", b"\x09\0\0\0\0\0\0\0{", "not a readable safetensors file"),
        ("p.npy", b"\x93NUMPY\x01\0", "not a readable .npy file"),
    ],
)
def test_a_file_that_is_cut_off(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_prefix(tmp_path / name)


def test_a_file_that_is_replaced_between_its_header_and_its_numbers(tmp_path):
    """As a server's prefix is, while a run saves a better one."""
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": np.zeros(3, np.float32)}, path, {})
    weights, _ = read_safetensors(path)
    assert weights["x"].view().tolist() == [0, 0, 0]
    save_safetensors({"x": np.ones(3, np.float32)}, path, {"dev_loss": "6"})
    with pytest.raises(InputError, match=r"x.safetensors: was replaced while it was read; read it again"):
        weights["x"].view()


def test_an_empty_cache():
    config = transformers.AutoConfig.from_pretrained(GOLDEN_BASE)
    for cache in DynamicCache(), DynamicCache(config=config):
        with pytest.raises(InputError, match="the cache is empty: nothing has been written to it"):
            from_dynamic_cache(cache)


def test_a_header_is_one_of_pytorch_whatever_the_source_said(tmp_path):
    save_safetensors({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors", {"format": "mlx", "a": "b"})
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def test_a_disk_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "p.weight").write_bytes(b"")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputError, match=r"p.weight: cannot be read \(Input/output error\)"):
        read_prefix(tmp_path / "p.weight")


def test_five_axes_of_which_one_is_empty(tmp_path):
    np.save(tmp_path / "prefix.npy", np.zeros((2, 2, 0, 4, 8), np.float32))
    with pytest.raises(InputError, match=r"a prefix has axes .* found shape \(2, 2, 0, 4, 8\)"):
        read_prefix(tmp_path / "prefix.npy")


def test_five_axes_of_which_the_second_is_not_of_keys_and_values(tmp_path):
    np.save(tmp_path / "prefix.npy", np.zeros((2, 3, 10, 4, 8), np.float32))
    with pytest.raises(
        InputError, match=r"a layered prefix has axes \[L, 2, P, N, H\], found shape \(2, 3, 10, 4, 8\)"
    ):
        read_prefix(tmp_path / "prefix.npy")


def test_four_axes_of_which_the_second_is_odd(tmp_path):
    np.save(tmp_path / "prefix.npy", np.zeros((10, 3, 4, 8), np.float32))
    with pytest.raises(InputError, match=r"a prefix has axes .* found shape \(10, 3, 4, 8\)"):
        read_prefix(tmp_path / "prefix.npy")


def test_what_safetensors_cannot_write_is_an_error_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        save_safetensors({"x": np.zeros(3, np.float32)}, tmp_path, {})


def test_the_headers_shape_counts_before_the_configs(tmp_path):
    adapter = converted(Path("tests/golden/forward.weight"), tmp_path / "adapter", GOLDEN_BASE)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert read_prefix(adapter)[1]["n_head"] == "4"


def test_of_an_adapters_two_files_safetensors_counts_as_for_peft(tmp_path):
    write_adapter(tmp_path, np.ones((2, 8), np.float32), n_layer=1, n_head=1, header={})
    torch.save({"prompt_embeddings": torch.zeros(2, 8)}, tmp_path / "adapter_model.bin")
    assert read_prefix(tmp_path)[0].min() == 1


def test_an_adapters_config_need_not_say_the_length(tmp_path):
    write_adapter(tmp_path, np.ones((2, 8), np.float32), n_layer=1, n_head=1, header={})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_virtual_tokens"}))
    assert len(read_prefix(tmp_path)[0]) == 2
