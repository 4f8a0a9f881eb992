"""Hub ids, against a local stand-in for the model hub; each command in a process of its own, as users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.base_folders import make_base_folder
from tests.hub_server import Hub, serve

RESOLVE = "import sys; from jaxprefix.hub import resolve_folder; print(resolve_folder(*sys.argv[1:]))"


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


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The stand-in, which every process started in the test takes for the hub."""
    offered = Hub(folders)
    with serve(offered) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        yield offered


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def resolved(*arguments):
    done = run("-c", RESOLVE, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def error_of(*arguments, **environment):
    done = run("-m", "jaxprefix.cli", "check", "--pretrained_model_dir", *arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_hub_id_generates_and_only_the_needed_files_are_fetched(hub):
    command = ["-m", "jaxprefix.cli", "generate", "--pretrained_model_dir", "user/model", "--prompt", "朝の"]
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
    folder = resolved("user/torch")
    assert "pytorch_model.bin" in hub.fetched()
    assert resolved("user/torch") == folder


def test_a_revision_pins_the_files(hub, folders):
    for revision in ("v1", "b" * 40):
        weights = Path(resolved("user/model", revision), "model.safetensors").read_bytes()
        assert weights == (folders["user/model", "v1"] / "model.safetensors").read_bytes()


def test_an_interrupted_download_goes_on(hub, folders):
    size = (folders["user/model", "main"] / "model.safetensors").stat().st_size
    hub.cut_after = size // 2
    interrupted = run("-c", RESOLVE, "user/model")
    assert interrupted.returncode != 0
    assert "its download broke off; repeat the command to go on" in interrupted.stderr
    assert "spiece.model" in hub.fetched()
    hub.cut_after, hub.requests = None, []
    folder = resolved("user/model")
    assert hub.fetched() == {"model.safetensors"}, "what had arrived is not fetched again, the broken file is"
    weights = Path(folder, "model.safetensors").read_bytes()
    assert weights == (folders["user/model", "main"] / "model.safetensors").read_bytes()


def test_plain_errors(hub, tmp_path):
    assert "the model hub has no such repository, or it is private" in error_of("user/nothing")
    assert "on the model hub it has no revision 'v9'" in error_of("user/model", "--revision", "v9")
    assert "not a hub id" in error_of("no//id")
    assert "is a folder, which has no --revision" in error_of(str(tmp_path), "--revision", "main")
    hub.gated.add("user/model")
    assert "its owner must grant you access" in error_of("user/model")
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    assert "the model hub cannot be reached nor is it in the cache" in error_of("user/model", **unreachable)
