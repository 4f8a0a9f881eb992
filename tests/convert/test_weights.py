"""Which files hold a base model's weights, and what is read of them."""

import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.errors import InputError
from convert.weights import has_weights, read_safetensors, weight_files
from tests.base_folders import make_base_folder

NAMES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_file_of_any_kind_makes_a_base(tmp_path, name):
    (tmp_path / name).touch()
    assert has_weights(tmp_path)


def test_safetensors_count_before_torchs_files(tmp_path):
    folder = make_base_folder(tmp_path / "base")
    torch.save({}, folder / "pytorch_model.bin")
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_a_file_that_is_replaced_by_one_of_its_size_and_time_is_told(tmp_path):
    path, other = tmp_path / "p.safetensors", tmp_path / "other.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    save_file({"a": np.ones(3, np.float32)}, other)
    weights, _ = read_safetensors(path)
    found = path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, path)
    with pytest.raises(InputError, match="was replaced while it was read"):
        weights["a"].view()
