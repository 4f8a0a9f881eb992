"""Tensors as torch.save writes them, beyond plain state dicts."""

import numpy as np
import pytest
import torch

from convert.errors import InputError
from convert.torch_files import load_torch


def with_attribute(value: torch.Tensor) -> torch.Tensor:
    value.note = "attributes are dropped"
    return value


@pytest.mark.parametrize("make", [torch.nn.Parameter, with_attribute, lambda x: with_attribute(torch.nn.Parameter(x))])
@pytest.mark.parametrize("zipped", [True, False])
def test_parameters_and_tensors_with_attributes_are_their_numbers(tmp_path, make, zipped):
    numbers = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": make(numbers.clone())}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(load_torch(tmp_path / "x.pt")["a"], numbers)


class Subclass(torch.Tensor):
    """What would run code of its own."""


def test_a_tensor_of_a_class_of_its_own_is_refused(tmp_path):
    torch.save(torch.ones(2).as_subclass(Subclass), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"asks for .*Subclass, which is no dense tensor"):
        load_torch(tmp_path / "x.pt")
