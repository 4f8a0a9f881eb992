"""Hub ids, against a local stand-in for the model hub."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from benchmarks.shapes import SHAPES, make_folder
from convert.errors import InputError
from jaxprefix import load_model, load_prefix, load_tokenizer, save_prefix
from jaxprefix.check import check
from jaxprefix.config import CheckConfig, ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.evaluation import evaluate
from jaxprefix.generation import continue_prompts
from jaxprefix.hub import fetch_weights, resolve_folder
from jaxprefix.inference import open_with_prefix
from jaxprefix.inference_config import EvaluateConfig, GenerateConfig
from jaxprefix.train import train
from tests.arrays import random_prefix
from tests.base_folders import make_base_folder
from tests.hub_server import Hub, serve
from tests.runs import PATIENCE, run_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("repos")
    main, older, torch_only = (make_base_folder(root / name, seed=i) for i, name in enumerate(("main", "v1", "torch")))
    for folder in (main, torch_only):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (torch_only / "model.safetensors").unlink()
    for extra in ("README.md", "flax_model.msgpack", "training_args.bin"):
        (main / extra).write_text("not needed")
    return {("user/model", "main"): main, ("user/model", "v1"): older, ("user/torch", "main"): torch_only}


def download_from(monkeypatch, address: str, cache: Path) -> None:
    here = {"endpoint": address, "cache_dir": cache / "hub"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", functools.partial(snapshot_download, **here))


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The stand-in, which the test, and every process started in it, takes for the hub."""
    offered = Hub(folders)
    with serve(offered) as address:
        download_from(monkeypatch, address, tmp_path / "cache")
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        yield offered


def fetch_all(hub_id: str, revision: str | None = None) -> Path:
    folder = resolve_folder(hub_id, revision)
    fetch_weights(hub_id, folder)
    return folder


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_a_hub_id_generates_and_only_the_needed_files_are_fetched(hub):
    command = ["-m", "jaxprefix", "generate", "--pretrained_model_dir", "user/model", "--prompt", "朝の"]
    done = run(*command, "--max_output_len", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("朝の")
    tokenizer = {"spiece.model", "tokenizer_config.json", "special_tokens_map.json"}
    assert hub.fetched() == {"config.json", "model.safetensors"} | tokenizer
    n_requests = len(hub.requests)
    offline = run(*command, "--max_output_len", "3", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, done.stdout)
    assert len(hub.requests) == n_requests


def test_torch_weights_are_fetched_where_there_are_no_others(hub):
    folder = fetch_all("user/torch")
    assert "pytorch_model.bin" in hub.fetched()
    assert fetch_all("user/torch") == folder


def test_a_revision_pins_the_files(hub, folders):
    for revision in ("v1", "b" * 40):
        weights = (fetch_all("user/model", revision) / "model.safetensors").read_bytes()
        assert weights == (folders["user/model", "v1"] / "model.safetensors").read_bytes()


def test_an_interrupted_download_goes_on(hub, folders):
    size = (folders["user/model", "main"] / "model.safetensors").stat().st_size
    hub.cut_after = size // 2
    with pytest.raises(InputError, match="its download was interrupted; repeat the command to go on"):
        fetch_all("user/model")
    assert "spiece.model" in hub.fetched()
    hub.cut_after, hub.requests = None, []
    folder = fetch_all("user/model")
    assert hub.fetched() == {"model.safetensors"}, "what had arrived is not fetched again, the broken file is"
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (folders["user/model", "main"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user/nothing"], "the model hub has no such repository; if it is private"),
        (["user/model", "v9"], "on the model hub it has no revision 'v9'"),
        (["no//id"], "not a hub id"),
        (["tests/__init__.py"], "__init__.py: no such folder, and"),
        (["tests", "main"], "tests: is a folder; --revision is only for hub ids"),
        (["user/gated"], "access to it is restricted on the model hub"),
        (["user/torch"], "the model hub says: .*403"),
    ],
)
def test_what_the_hub_refuses_is_told_plainly(hub, arguments, message):
    hub.gated.add("user/gated")
    hub.forbidden.add("pytorch_model.bin")
    with pytest.raises(InputError, match=message):
        fetch_all(*arguments)


def test_without_a_hub_or_a_cache_the_error_says_so(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    download_from(monkeypatch, os.environ["HF_ENDPOINT"], tmp_path / "file")
    with pytest.raises(InputError, match="it cannot be fetched into the cache"):
        fetch_all("user/model")
    download_from(monkeypatch, "http://127.0.0.1:9", tmp_path / "empty")
    with pytest.raises(InputError, match=r"it is not all cached, and the model hub does not give the rest \(.*refused"):
        fetch_all("user/model")


def test_a_cache_without_weights_says_what_is_missing(hub, monkeypatch):
    resolve_folder("user/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"it is not all cached.*model\.safetensors"):
        fetch_all("user/model")


def test_a_hub_that_answers_with_an_error_is_quoted(hub):
    hub.fails_with = 503
    with pytest.raises(InputError, match=r"the model hub does not give the rest \(.*503"):
        resolve_folder("user/model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Task error: CAS Client Error"), r"failed \(Task .*\); repeat .* HF_HUB_DISABLE_XET=1"),
        (ValueError("Expecting value"), r"its download failed \(Expecting value\)$"),
        (ImportError("Using SOCKS proxy"), r"its download failed \(Using SOCKS proxy\)$"),
    ],
)
def test_a_download_that_fails_in_another_way_is_told_plainly(monkeypatch, error, message):
    """huggingface_hub's own store of large files, Xet, raises RuntimeError; a login page is no JSON."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    with pytest.raises(InputError, match=message):
        resolve_folder("user/model")


def test_nothing_large_is_fetched_for_a_base_or_data_that_cannot_be_used(hub, folders, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "朝の市場"}\n')
    with pytest.raises(InputError, match=r"makes . examples, fewer than"):
        train(run_config(tmp_path, pretrained_model_dir="user/model", data_filepath=data))
    sizes = {"train_data_size": 13, "dev_data_size": 1, "n_accum_steps": 9}
    with pytest.raises(InputError, match="--n_accum_steps 9 is more than"):
        train(run_config(tmp_path, pretrained_model_dir="user/model", recipe="rinna", **sizes))
    with pytest.raises(InputError, match="no such prefix"):
        evaluate(EvaluateConfig("user/model", prefix_checkpoint_path=tmp_path / "none"))
    with pytest.raises(InputError, match="no such data file"):
        evaluate(EvaluateConfig("user/model", data_filepath=tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="longest prompt"):
        continue_prompts(GenerateConfig("user/model", prompt=["朝" * 3000]))
    foreign = shutil.copytree(folders["user/model", "main"], tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    hub.repos["user/llama", "main"] = foreign
    with pytest.raises(InputError, match="llama"):
        load_model("user/llama")
    assert "model.safetensors" not in hub.fetched()


def test_weights_are_those_of_the_commit_whose_config_was_read(hub, folders):
    folder = resolve_folder("user/model")
    hub.repos = hub.repos | {("user/model", "main"): folders["user/model", "v1"]}  # main moves on meanwhile
    hub.repos["user/model", "a" * 40] = folders["user/model", "main"]
    fetch_weights("user/model", folder)
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (folders["user/model", "main"] / "model.safetensors").read_bytes()


def test_shards_and_their_index_are_fetched(hub, tmp_path):
    folder = make_folder(tmp_path / "shards", SHAPES["1m"], n_shards=3)
    hub.repos["user/shards", "main"] = folder
    load_model("user/shards")
    weights = {path.name for path in folder.glob("model*")}
    assert len(weights) > 3
    assert weights < hub.fetched()


def test_every_file_that_a_base_may_have_is_fetched(hub, tmp_path):
    small = {
        "config.json",
        "spiece.model",
        "spm.model",
        "tokenizer.model",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    }
    small |= {"added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"}
    shards = {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
    (folder := tmp_path / "full").mkdir()
    for name in small | shards:
        (folder / name).write_text(name)
    hub.repos["user/full", "main"] = folder
    resolve_folder("user/full")
    assert hub.fetched() == small
    fetch_all("user/full")
    assert hub.fetched() == small | shards


def test_a_folder_in_the_home_folder_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=ValueError("not asked for")))
    make_base_folder(tmp_path / "base")
    assert load_model("~/base").config.name == "~/base"


def test_generating_and_measuring_take_the_revision_and_the_architecture_that_are_given(hub):
    assert open_with_prefix(GenerateConfig("user/model", revision="v1"))[0].path.name == "b" * 40
    with pytest.raises(InputError, match="contradicts --model_type gpt"):
        open_with_prefix(EvaluateConfig("user/model", model_type="gpt"))


def test_a_variant_of_the_weights_is_not_taken_for_them(hub, folders, tmp_path):
    both = shutil.copytree(folders["user/torch", "main"], tmp_path / "both")
    (both / "model.fp16.safetensors").write_bytes(b"a variant")
    hub.repos["user/both", "main"] = both
    load_model("user/both")
    assert "pytorch_model.bin" in hub.fetched()
    assert "model.fp16.safetensors" not in hub.fetched()


def test_a_repository_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="user/model: no weights in the cache, and the model hub is out of reach"):
        fetch_all("user/model")


def test_what_needs_no_weights_fetches_none(hub, folders):
    load_tokenizer("user/model", "v1")
    list(check(CheckConfig("user/model", revision="v1")))
    assert "model.safetensors" not in hub.fetched()
    here, fetched = load_model(folders["user/model", "v1"]), load_model("user/model", revision="v1")
    np.testing.assert_array_equal(fetched.embed.weight[...], here.embed.weight[...])
    assert fetched.config.name == "user/model"


def test_a_prefix_names_the_revision_of_its_base(hub, tmp_path):
    """PEFT's AutoPeftModelForCausalLM would load the main one beside it."""
    tokenizer = load_tokenizer("user/model")
    for revision in None, "v1":
        config = load_model("user/model", revision=revision).config
        save_prefix(tmp_path / "a", random_prefix(config), config, tokenizer)
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == revision
    convert(ConvertConfig(tmp_path / "a", tmp_path / "b.safetensors"))
    convert(ConvertConfig(tmp_path / "b.safetensors", tmp_path / "c"))
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["revision"] == "v1"
    load_prefix(tmp_path / "c", load_model("user/model").config)
