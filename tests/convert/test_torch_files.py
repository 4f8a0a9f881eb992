"""Tensors as torch.save writes them, beyond plain state dicts."""

import os
import resource
import zipfile

import numpy as np
import pytest
import torch

from convert import torch_files
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


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_many_tensors_is_opened_once(tmp_path, zipped):
    """macOS lets a terminal's programs open 256 files."""
    tensors = {str(n): torch.full((2,), n) for n in range(300)}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 100, hard))
    try:
        read = load_torch(tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {name: tensor.tolist() for name, tensor in read.items()} == {str(n): [n, n] for n in range(300)}


class Subclass(torch.Tensor):
    """What would run code of its own."""


def test_a_tensor_of_a_class_of_its_own_is_refused(tmp_path):
    torch.save(torch.ones(2).as_subclass(Subclass), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"asks for .*Subclass, but only dense tensors are read"):
        load_torch(tmp_path / "x.pt")


def saved(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path, message, **options):
    with pytest.raises(InputError, match=message):
        load_torch(path, **options)


def test_a_number_that_was_changed_is_found_by_its_checksum(tmp_path):
    path = saved(tmp_path / "x.pt", torch.full((300,), 1.5))
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(1.5).tobytes() * 300) + 2] ^= 1
    path.write_bytes(content)
    refused(path, "data/0 does not match its checksum")
    assert (load_torch(path, checked=False) != 1.5).sum() == 1


def test_the_order_of_bytes_must_be_this_machines(tmp_path):
    saved(tmp_path / "x.pt", torch.ones(3))
    with zipfile.ZipFile(tmp_path / "x.pt") as archive, zipfile.ZipFile(tmp_path / "big.pt", "w") as other:
        for info in archive.infolist():
            other.writestr(info, b"big" if info.filename.endswith("byteorder") else archive.read(info))
    refused(tmp_path / "big.pt", "its byte order is b'big', not little")


def test_the_old_format_says_how_long_its_storages_are(tmp_path):
    path = saved(tmp_path / "x.pt", torch.full((300,), 1.5), zipped=False)
    content = path.read_bytes()
    numbers = content.index(np.float32(1.5).tobytes() * 300)
    assert content[numbers - 8 : numbers] == (300).to_bytes(8, "little")
    path.write_bytes(content[: numbers - 8] + (299).to_bytes(8, "little") + content[numbers:])
    refused(path, "storage .* does not hold 300 numbers")


@pytest.mark.parametrize(
    ("place", "message"),
    [(11, "does not begin as"), (19, "does not begin as"), (None, r"storages end at byte \d+ of \d+")],
)
def test_the_old_format_begins_and_ends_as_torch_writes_it(tmp_path, place, message):
    path = saved(tmp_path / "x.pt", torch.full((300,), 1.5), zipped=False)
    content = bytearray(path.read_bytes())
    if place is None:
        content[-600:-600] = b"\0\0"  # numbers that are shifted from there on
    else:
        content[place] ^= 1
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize(("size", "fits"), [(6, True), (5, False)])
def test_a_tensor_ends_within_its_storage(size, fits):
    unpickler = torch_files._Unpickler(b"", lambda *_: None, 10**6)
    storage = np.zeros(size, np.float32)
    if fits:
        assert unpickler._rebuild_tensor(storage, 1, (5,), (1,)).shape == (5,)
    else:
        with pytest.raises(ValueError, match="reaches beyond its storage of 5 numbers"):
            unpickler._rebuild_tensor(storage, 1, (5,), (1,))


def test_tied_weights_may_stand_twice_and_no_more(tmp_path):
    weight = torch.ones(100_000)
    twice = load_torch(saved(tmp_path / "two.pt", {"a": weight[:], "b": weight[:]}))
    assert twice.keys() == {"a", "b"}
    refused(saved(tmp_path / "many.pt", {name: weight.view(-1) for name in "abcd"}), "claim more numbers than it holds")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(-1, (5,), (1,)), (4, (5,), (-1,)), (0, (-5,), (1,)), (0, (True,), (1,)), (0, (5,), ())],
)
def test_a_tensor_has_no_negative_sizes(offset, shape, strides):
    """What they reach lies in front of the file's numbers: other memory of this process."""
    unpickler = torch_files._Unpickler(b"", lambda *_: None, 10**6)
    with pytest.raises(ValueError, match="a tensor has an invalid shape"):
        unpickler._rebuild_tensor(np.zeros(6, np.float32), offset, shape, strides)


def test_the_old_formats_order_of_bytes_must_be_this_machines_too(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    place = content.index(b"\x88", content.index(b"little_endian"))
    (tmp_path / "x.pt").write_bytes(content[:place] + b"\x89" + content[place + 1 :])
    with pytest.raises(InputError, match="its byte order is not little"):
        load_torch(tmp_path / "x.pt")


def test_a_storage_has_as_many_numbers_as_it_says(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive, zipfile.ZipFile(tmp_path / "long.pt", "w") as other:
        for info in archive.infolist():
            other.writestr(info, archive.read(info) + (b"more" if info.filename.endswith("data/0") else b""))
    with pytest.raises(InputError, match="data/0 is compressed, or does not hold 3 numbers of type float32"):
        load_torch(tmp_path / "long.pt")


def test_numbers_that_torch_negates_as_it_reads_them_are_refused(tmp_path):
    negated = torch.complex(torch.zeros(4, 6), torch.ones(4, 6)).conj().imag
    torch.save(negated, tmp_path / "negated.pt")
    with pytest.raises(InputError, match=r"a tensor is stored with {'neg': True}; save its clone\(\)"):
        load_torch(tmp_path / "negated.pt")
    torch.save(negated.clone(), tmp_path / "negated.pt")
    np.testing.assert_array_equal(load_torch(tmp_path / "negated.pt"), np.full((4, 6), -1))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_numbers_of_every_type_are_those_that_were_saved(tmp_path, dtype, zipped):
    tensor = torch.tensor([0, 1, {"uint8": 200, "bool": 1}.get(dtype, -3)]).to(getattr(torch, dtype))
    read = load_torch(saved(tmp_path / "x.pt", tensor, zipped))
    assert (read.dtype.name, read.tolist()) == (dtype, tensor.tolist())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_a_tensor_without_numbers_is_read(tmp_path, shape, zipped):
    read = load_torch(saved(tmp_path / "x.pt", {"a": torch.zeros(shape), "b": torch.ones(2)}, zipped))
    assert read["a"].shape == shape
    assert read["b"].tolist() == [1, 1]


def test_a_pickle_has_a_longest_length(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pt", {"a": torch.ones(2)})
    monkeypatch.setattr(torch_files, "PICKLE_BYTES", 100)
    refused(path, "data.pkl is compressed, or longer than 100 bytes")


def test_a_storage_has_one_type(tmp_path):
    one, other = torch.ones(2), torch.ones(2, dtype=torch.int32)
    path = saved(tmp_path / "x.pt", {"a": one, "b": other}, zipped=False)
    keys = [str(tensor.untyped_storage()._cdata).encode() for tensor in (one, other)]
    path.write_bytes(path.read_bytes().replace(keys[1], keys[0]))
    refused(path, f"storage {keys[0].decode()} is described twice, differently")
