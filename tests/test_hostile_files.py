"""Files from strangers, each made to do harm: refused in little time and memory, nothing run, nothing written."""

import contextlib
import gzip
import io
import json
import shutil
import socket
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert.errors import InputError
from convert.prefix import read_prefix
from convert.untrusted import member
from jaxprefix import lines, load_model, load_prefix, load_tokenizer
from jaxprefix.base_folder import open_base
from jaxprefix.cli import main
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.examples import Chunking, read_examples
from jaxprefix.models import copy_base_model
from jaxprefix.models.config import read_model_config
from tests.base_folders import GOLDEN_BASE, make_base_folder

SECONDS, BYTES = 2, 100 * 2**20
"""What a refusal may take; the promise is 500 MB."""
HOSTILE = {}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
PREFIX = np.ones((10, 384), np.float32)


def hostile(message):
    """Register a function that makes a hostile file in an empty folder and returns what reads it."""

    def register(build):
        HOSTILE[build.__name__] = (build, message)
        return build

    return register


@contextlib.contextmanager
def bounded():
    """Fail if the block takes more than SECONDS or its peak of memory grows by more than BYTES."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    before, start = peak_memory(), time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS
    assert peak_memory() - before < BYTES


def peak_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def state_of(folder: Path) -> list:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))


class CreatesAFile:
    def __reduce__(self):
        return open, ("created-by-pickle", "w")


@hostile(r"asks for builtins.open|asks for io.open")
def a_weight_with_code(folder):
    torch.save(CreatesAFile(), folder / "p.weight")
    return lambda: read_prefix(folder / "p.weight")


@hostile(r"asks for builtins.open|asks for io.open")
def an_old_weight_with_code(folder):
    torch.save({"state": CreatesAFile()}, folder / "p.weight", _use_new_zipfile_serialization=False)
    return lambda: read_prefix(folder / "p.weight")


@hostile(r"asks for builtins.open|asks for io.open")
def a_training_state_with_code(folder):
    torch.save({"encoder": CreatesAFile()}, folder / "state.pt")
    return lambda: convert_command(folder / "state.pt", folder / "run")


def convert_command(source, target):
    convert(ConvertConfig(source, target))


@hostile(r"asks for builtins.open|asks for io.open")
def a_base_model_with_code(folder):
    make_base_folder(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": CreatesAFile()}, folder / "base" / "pytorch_model.bin")
    return lambda: load_model(folder / "base")


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


@hostile("has not 3840 numbers of type float64")
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


@hostile("leads out of its folder, to .*secret.safetensors")
def an_adapter_with_a_link_to_its_weights(folder):
    weights = adapter(folder / "adapter") / "adapter_model.safetensors"
    weights.rename(folder / "secret.safetensors")
    weights.symlink_to("../secret.safetensors")
    return lambda: read_prefix(folder / "adapter")


@hostile("leads out of its folder, to /dev/zero")
def an_adapter_config_without_an_end(folder):
    config = adapter(folder / "adapter") / "adapter_config.json"
    config.unlink()
    config.symlink_to("/dev/zero")
    return lambda: read_prefix(folder / "adapter")


@hostile("leads out of its folder")
def a_run_folder_with_a_link_to_its_prefix(folder):
    adapter(folder / "elsewhere")
    (folder / "run").mkdir()
    (folder / "run" / "prefix").symlink_to("../elsewhere")
    return lambda: read_prefix(folder / "run")


@hostile("is no name of a file")
def links_in_a_circle(folder):
    config = adapter(folder / "adapter") / "adapter_config.json"
    config.unlink()
    config.symlink_to("adapter_config.json")
    return lambda: read_prefix(folder / "adapter")


@hostile("leads out of its folder, to .*secret")
def a_base_model_with_a_link_to_its_weights(folder):
    weights = make_base_folder(folder / "base") / "model.safetensors"
    weights.rename(folder / "secret")
    weights.symlink_to(folder / "secret")
    return lambda: load_model(folder / "base")


@hostile("leads out of its folder, to .*secret")
def a_base_model_that_smuggles_a_file_into_its_copy(folder):
    (folder / "secret").write_text("{}")
    (make_base_folder(folder / "base") / "extra.json").symlink_to(folder / "secret")
    return lambda: copy_base_model(str(folder / "base"), folder / "copy")


def base_with(folder, name, content):
    base = make_base_folder(folder / "base")
    (base / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return lambda: load_model(open_base(str(base)).path)


def base_config(**changes):
    return json.loads((GOLDEN_BASE / "config.json").read_text()) | changes


@hostile(r"config.json: asks for code of its own \(auto_map\), which is never run")
def a_config_with_code(folder):
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "evil/code--configuration.Config"}
    config = base_config(auto_map=auto_map, trust_remote_code=True)
    (folder / "modeling_evil.py").write_text("open('created-by-auto-map', 'w')")
    return base_with(folder, "config.json", config)


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_config(folder):
    return base_with(folder, "config.json", DEEP)


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_tokenizer_config(folder):
    return base_with(folder, "tokenizer_config.json", DEEP)


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_adapter_config(folder):
    (adapter(folder / "adapter") / "adapter_config.json").write_bytes(DEEP)
    return lambda: read_prefix(folder / "adapter")


@hostile("is longer than the 8,388,608 bytes")
def a_config_of_ten_megabytes(folder):
    return base_with(folder, "config.json", base_config(note="x" * 10**7))


@hostile("the key 'hidden_size' stands twice")
def a_config_with_two_answers(folder):
    return base_with(folder, "config.json", b'{"hidden_size": 8, "hidden_size": 64}')


@hostile("num_hidden_layers 1000000000 is more than 128")
def a_config_of_a_billion_layers(folder):
    return base_with(folder, "config.json", base_config(num_hidden_layers=10**9))


@hostile("config.json asks for 128 layers, the weights have no layer 127")
def a_config_deeper_than_its_weights(folder):
    return base_with(folder, "config.json", base_config(num_hidden_layers=128))


@hostile("names files outside its folder")
def an_index_that_climbs_out(folder):
    shards = {"weight_map": {"a": "../../secret.safetensors", "b": "/etc/passwd"}}
    return base_with(folder, "model.safetensors.index.json", shards)


@hostile("is no name of a file|not a readable safetensors file")
def an_index_with_a_name_that_ends_early(folder):
    return base_with(folder, "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors\0.txt"}})


@hostile("leads out of its folder, to .*secret")
def an_index_whose_shard_is_a_link(folder):
    (folder / "secret").write_bytes(b"")
    read = base_with(folder, "model.safetensors.index.json", {"weight_map": {"a": "shard.safetensors"}})
    (folder / "base" / "shard.safetensors").symlink_to("../secret")
    return read


def base_with_weights(folder, change):
    path = make_base_folder(folder / "base") / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return lambda: load_model(folder / "base")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_base_model_with_one_number_that_is_not_finite(tmp_path, dtype, value):
    def change(weights):
        weights |= {name: array.astype(dtype) for name, array in weights.items()}
        weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][-1, -1] = value

    read = base_with_weights(tmp_path, change)
    with pytest.raises(
        InputError, match=r"base: weight gpt_neox.layers.1.mlp.dense_h_to_4h.weight: holds numbers that"
    ):
        read()


@hostile("embed_in.weight: holds numbers of type int8; supported: float64, float32, float16, bfloat16")
def a_base_model_of_whole_numbers(folder):
    name = "gpt_neox.embed_in.weight"
    return base_with_weights(folder, lambda weights: weights.update({name: weights[name].astype(np.int8)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["weight", "safetensors", "npy"])
def test_a_prefix_with_one_number_that_is_not_finite(tmp_path, kind, value):
    array, path = PREFIX.copy(), tmp_path / f"p.{kind}"
    array[-1, -1] = value
    if kind == "weight":
        torch.save(torch.from_numpy(array), path)
    elif kind == "npy":
        np.save(path, array)
    else:
        save_file({"prompt_embeddings": array}, path)
    with pytest.raises(InputError, match="holds 1 numbers that are not finite"):
        read_prefix(path)


@hostile("the tokenizer has 440 pieces, more than the model's vocab_size 400")
def a_tokenizer_larger_than_the_embedding(folder):
    base = make_base_folder(folder / "base", vocab_size=400)
    return lambda: run_command("generate", "--pretrained_model_dir", str(base), "--prompt", "a")


def run_command(*arguments):
    """Run the command line, and raise what it printed as an error."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(list(arguments)) == 2
    raise InputError(printed.getvalue())


@hostile("not a SentencePiece model")
def a_tokenizer_of_garbage(folder):
    return base_with(folder, "spiece.model", np.random.default_rng(0).bytes(100_000))


@hostile("not a tokenizer.json")
def a_deep_tokenizer_json(folder):
    (folder / "tokenizer.json").write_bytes(DEEP)
    return lambda: load_tokenizer(folder)


@hostile("added tokens without a proper id")
def an_added_token_without_a_number(folder):
    return base_with(folder, "added_tokens.json", {"<a>": [[]]})


def test_a_gzip_bomb_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "UNPACKED_BYTES", 2**14)
    monkeypatch.setattr(lines, "GZIP_RATIO", 2)
    write_gzip(tmp_path / "d.jsonl.gz", b'{"text": "a"}\n' * 75_000, 1)
    with bounded(), pytest.raises(InputError, match="unpacks to more than 2 times its size"):
        read_examples(tmp_path / "d.jsonl.gz", Chunking(FakeTokenizer()))


@hostile("unpacks to more than 100 times its size")
def a_gzip_bomb_of_one_line(folder):
    write_gzip(folder / "d.jsonl.gz", bytes(2**25), 8)
    return lambda: read_examples(folder / "d.jsonl.gz", Chunking(FakeTokenizer(), skip_bad_lines=True))


def write_gzip(path, content, times):
    """A gzip file may hold several streams, one behind the other."""
    path.write_bytes(gzip.compress(content, compresslevel=1) * times)


class FakeTokenizer:
    """Fast: the bombs are about lines."""

    def encode(self, text):
        return []


@pytest.mark.parametrize(("build", "message"), HOSTILE.values(), ids=HOSTILE)
def test_is_refused(tmp_path, monkeypatch, build, message):
    monkeypatch.chdir(tmp_path)
    read = build(tmp_path)
    before = state_of(tmp_path)
    with bounded(), pytest.raises(InputError, match=message) as error:
        read()
    assert state_of(tmp_path) == before
    assert len(str(error.value)) < 5000


def test_the_base_that_an_adapter_names_is_not_followed(tmp_path, golden_model):
    for name in ("rinna/japanese-gpt-neox-small", "../../etc", "/etc/passwd", "https://example.org/base"):
        adapter(tmp_path / "adapter", base_model_name_or_path=name, auto_mapping={"parent_library": "evil"})
        np.testing.assert_array_equal(load_prefix(tmp_path / "adapter", golden_model.config), 1.0)
        shutil.rmtree(tmp_path / "adapter")


def test_links_of_the_hubs_cache_and_within_a_folder_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    base = make_base_folder(tmp_path / "base")
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    for path in base.iterdir():
        shutil.copy(path, snapshot.parent.parent / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_model(snapshot).config.n_layer == 3
    (base / "config.json").rename(base / "real.json")
    (base / "config.json").symlink_to("real.json")
    assert read_model_config(base).n_layer == 3
    (tmp_path / "link").symlink_to(base)
    assert read_model_config(tmp_path / "link").n_layer == 3
    with pytest.raises(InputError, match="leads out of its folder"):
        member(base, "../base2/config.json")


def test_errors_do_not_steer_the_terminal():
    assert str(InputError("a\x1b[2Jb\x9bc\ud800\nd あ😃")) == "a\\x1b[2Jb\\x9bc\\ud800\nd あ😃"
    assert str(InputError.all("x:", ["y"] * 50)).endswith("\n  - y\n  - and 10 more")
    assert len(str(InputError("x" * 10**6))) < 5000
