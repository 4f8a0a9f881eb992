"""Files from strangers, each made to do harm: refused in little time and memory, nothing run, nothing written."""

import contextlib
import json
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.errors import InputError
from convert.prefix import read_prefix
from convert.untrusted import JSON_BYTES, member
from jaxprefix import load_model, load_prefix
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.data import lines
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.evaluation import evaluate
from jaxprefix.inference_config import EvaluateConfig
from jaxprefix.models.config import read_model_config
from jaxprefix.run.description import check_base, setting_of
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_base_folder
from tests.hostile import others, prefixes
from tests.hostile.others import FakeTokenizer, base_with_weights, write_gzip
from tests.hostile.prefixes import adapter
from tests.hostile.registry import DEEP, PREFIX, builds
from tests.memory import forget_peak, memory

SECONDS, BYTES = 2, 100 * 2**20
"""What a refusal may take of a processor and of memory (SECURITY.md)."""


@contextlib.contextmanager
def bounded():
    """Fail if the block takes more than SECONDS of a processor or its peak of memory grows by more than BYTES."""
    forget_peak()
    before, start = memory("VmHWM"), time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert memory("VmHWM") - before < BYTES


def state_of(folder: Path) -> list:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))


@pytest.mark.parametrize("build", builds(others, prefixes), ids=lambda build: build.__name__)
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, build):
    monkeypatch.chdir(tmp_path)
    read = build(tmp_path)
    before = state_of(tmp_path)
    with bounded(), pytest.raises(InputError, match=build.refused_with) as error:
        read()
    assert state_of(tmp_path) == before
    assert len(str(error.value)) < 5000


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


@pytest.mark.parametrize(
    "content",
    [
        b'{"data_sha256": ' + DEEP + b"}",
        b'{"data_sha256": "", "suffix": "a", "suffix": "b"}',
        b'{"data_sha256": "", "suffix": "' + b"a" * JSON_BYTES + b'"}',
        None,
    ],
    ids=["deep", "doubled", "long", "a link out of its folder"],
)
def test_a_run_folder_with_a_hostile_config_is_none(tmp_path, content):
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    if content is None:
        (tmp_path / "outside.json").write_text('{"data_sha256": "", "suffix": "a"}')
        path.symlink_to(tmp_path / "outside.json")
    else:
        path.write_bytes(content)
    with bounded():
        assert setting_of(path.parent, "suffix") is None
        assert setting_of(path.parent / "prefix", "suffix") is None
        with pytest.raises(InputError, match=r"not a run, config\.json is missing or damaged"):
            check_base(path.parent, {})


@pytest.mark.parametrize("setting", [{"max_seq_len": 0}, {"max_seq_len": -5}, {"max_seq_len": True}, {"suffix": ["a"]}])
def test_a_run_folder_with_absurd_settings(tmp_path, setting):
    prefix = save_run(tmp_path / "run", setting)
    config = EvaluateConfig(str(GOLDEN_BASE), prefix, data_filepath=GOLDEN / "documents.jsonl", n_samples=0)
    (name, value), *_ = setting.items()
    with (
        bounded(),
        pytest.raises(InputError, match=re.escape(f"run: its config.json has an invalid {name}, {value!r}")),
    ):
        evaluate(config)


def save_run(folder, settings):
    convert(ConvertConfig(GOLDEN / "forward.weight", folder / "prefix", str(GOLDEN_BASE)))
    (folder / "config.json").write_text(json.dumps({"data_sha256": "", **settings}))
    return folder


def test_a_gzip_bomb_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "UNPACKED_BYTES", 2**14)
    monkeypatch.setattr(lines, "GZIP_RATIO", 2)
    write_gzip(tmp_path / "d.jsonl.gz", b'{"text": "a"}\n' * 75_000, 1)
    with bounded(), pytest.raises(InputError, match="unpacks to more than 2 times its size"):
        read_examples(tmp_path / "d.jsonl.gz", Chunking(FakeTokenizer()))


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
    with pytest.raises(InputError, match="points outside its folder"):
        member(base, "../base2/config.json")


def test_errors_do_not_steer_the_terminal():
    assert str(InputError("a\x1b[2Jb\x9bc\ud800\nd あ😃")) == "a\\x1b[2Jb\\x9bc\\ud800\nd あ😃"
    assert str(InputError.all("x:", ["y"] * 50)).endswith("\n  - y\n  - and 10 more")
    assert len(str(InputError("x" * 10**6))) < 5000
