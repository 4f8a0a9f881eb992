"""Prefix files made to do harm: pickles with code, bombs, headers that lie, links."""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from convert.prefix import read_prefix
from tests.hostile.registry import DEEP, PREFIX, hostile


class CreatesAFile:
    def __reduce__(self):
        return open, ("created-by-pickle", "w")


@hostile(r"asks for (builtins|_?io)\.open")
def a_weight_with_code(folder):
    torch.save(CreatesAFile(), folder / "p.weight")
    return lambda: read_prefix(folder / "p.weight")


@hostile(r"asks for (builtins|_?io)\.open")
def an_old_weight_with_code(folder):
    torch.save({"state": CreatesAFile()}, folder / "p.weight", _use_new_zipfile_serialization=False)
    return lambda: read_prefix(folder / "p.weight")


@hostile("pickle holds FRAME")
def a_pickle_in_another_protocol(folder):
    torch.save(CreatesAFile(), folder / "p.weight", pickle_protocol=4)
    return lambda: read_prefix(folder / "p.weight")


@hostile("pickle holds LONG_BINPUT 2000000000")
def a_pickle_that_makes_room_for_billions(folder):
    write_archive(folder / "p.weight", b"\x80\x02]r" + struct.pack("<I", 2_000_000_000) + b".")
    return lambda: read_prefix(folder / "p.weight")


def write_archive(path, pickled, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in {"data.pkl": pickled, **records}.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", content)


@hostile("archive/data.pkl is compressed")
def a_zip_bomb(folder):
    write_archive(folder / "p.weight", b"\x80\x02N" + b"0N" * 2**27 + b".", zipfile.ZIP_DEFLATED)
    assert (folder / "p.weight").stat().st_size < 2**24
    return lambda: read_prefix(folder / "p.weight")


@hostile("archive/data/0 is compressed")
def a_bomb_of_numbers(folder):
    torch.save(torch.zeros(2**26), folder / "plain")
    pickled = zipfile.ZipFile(folder / "plain").read("plain/data.pkl")
    (folder / "plain").unlink()
    write_archive(folder / "p.weight", pickled)
    with zipfile.ZipFile(folder / "p.weight", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**28))
    return lambda: read_prefix(folder / "p.weight")


@hostile("its tensors claim more numbers than it holds")
def one_number_as_a_trillion(folder):
    torch.save(torch.ones(1).expand(2**40), folder / "p.weight")
    return lambda: read_prefix(folder / "p.weight")


@hostile("does not hold 3840 numbers of type float64")
def a_storage_that_is_shorter_than_it_says(folder):
    torch.save(torch.from_numpy(PREFIX), folder / "plain")
    with zipfile.ZipFile(folder / "plain") as archive:
        pickled = archive.read("plain/data.pkl").replace(b"FloatStorage", b"DoubleStorage")
        write_archive(folder / "p.weight", pickled, data_0=archive.read("plain/data/0"))
    return lambda: read_prefix(folder / "p.weight")


def write_safetensors(path, tensors, data=b"", n_header=None):
    header = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", n_header or len(header)) + header + data)
    return lambda: read_prefix(path)


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@hostile("its header claims 1,099,511,627,776 bytes")
def a_safetensors_header_of_a_terabyte(folder):
    return write_safetensors(folder / "p.safetensors", {}, n_header=2**40)


@hostile("not a readable safetensors file")
def a_safetensors_tensor_of_2_to_the_40(folder):
    return write_safetensors(folder / "p.safetensors", {"p": tensor([2**20, 2**20], 0, 2**42)}, bytes(64))


@hostile("not a readable safetensors file")
def a_safetensors_size_that_overflows(folder):
    return write_safetensors(folder / "p.safetensors", {"p": tensor([2**32, 2**32, 4], 0, 0)})


@hostile("not a readable safetensors file")
def overlapping_tensors(folder):
    tensors = {"prompt_embeddings": tensor([2, 8], 0, 64), "q": tensor([2, 8], 32, 96)}
    return write_safetensors(folder / "p.safetensors", tensors, bytes(96))


@hostile("not a readable safetensors file")
def tensors_beyond_the_end(folder):
    return write_safetensors(folder / "p.safetensors", {"p": tensor([2, 8], 64, 128)}, bytes(64))


@hostile("not a readable safetensors file")
def a_deep_safetensors_header(folder):
    return write_safetensors(folder / "p.safetensors", DEEP)


@hostile("is of type F8_E4M3|holds numbers of type F8_E4M3")
def a_safetensors_type_without_a_name(folder):
    return write_safetensors(folder / "p.safetensors", {"p": tensor([2, 8], 0, 16, "F8_E4M3")}, bytes(16))


@hostile("do not fit its header's")
def a_header_that_lies_about_the_shape(folder):
    save_file({"prompt_embeddings": PREFIX}, folder / "p.safetensors", {"n_layer": "0", "n_head": "x"})
    return lambda: read_prefix(folder / "p.safetensors")


def write_npy(path, dtype, shape, data=b""):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return lambda: read_prefix(path)


@hostile("not a readable .npy file")
def an_npy_of_objects(folder):
    np.save(folder / "p.npy", np.array([[CreatesAFile()]], dtype=object), allow_pickle=True)
    return lambda: read_prefix(folder / "p.npy")


@hostile("not a readable .npy file")
def an_npy_of_a_petabyte(folder):
    return write_npy(folder / "p.npy", "<f4", (2**24, 2**24), bytes(64))


@hostile("not a readable .npy file")
def an_npy_header_that_is_code(folder):
    header = b"__import__('os').mkdir('created-by-numpy')\n"
    (folder / "p.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return lambda: read_prefix(folder / "p.npy")


def adapter(folder: Path, **changes) -> Path:
    """An adapter folder whose config says what is in it, with changes."""
    folder.mkdir()
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": PREFIX}, folder / "adapter_model.safetensors")
    return folder


@hostile("points outside its folder, to .*secret.safetensors")
def an_adapter_with_a_link_to_its_weights(folder):
    weights = adapter(folder / "adapter") / "adapter_model.safetensors"
    weights.rename(folder / "secret.safetensors")
    weights.symlink_to("../secret.safetensors")
    return lambda: read_prefix(folder / "adapter")


def adapter_whose_config_leads_to(folder, target):
    config = adapter(folder / "adapter") / "adapter_config.json"
    config.unlink()
    config.symlink_to(target)
    return lambda: read_prefix(folder / "adapter")


@hostile("points outside its folder, to /dev/zero")
def an_adapter_config_without_an_end(folder):
    return adapter_whose_config_leads_to(folder, "/dev/zero")


@hostile("points outside its folder")
def a_run_folder_with_a_link_to_its_prefix(folder):
    adapter(folder / "elsewhere")
    (folder / "run").mkdir()
    (folder / "run" / "prefix").symlink_to("../elsewhere")
    return lambda: read_prefix(folder / "run")


@hostile("cannot be resolved")
def links_in_a_circle(folder):
    return adapter_whose_config_leads_to(folder, "adapter_config.json")


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_adapter_config(folder):
    (adapter(folder / "adapter") / "adapter_config.json").write_bytes(DEEP)
    return lambda: read_prefix(folder / "adapter")
