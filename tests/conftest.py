import gc
import importlib.util
import json
import os
import queue
import shutil
import signal
import threading
import types
from pathlib import Path

import jax
import pytest
import tokenizers

from jaxprefix import load_model, load_tokenizer
from jaxprefix.machine.devices import alone_on_a_cpu, compiling_for
from jaxprefix.train import train
from tests.base_folders import GOLDEN_BASE, SAMPLE, make_base_folder
from tests.errors import Recorder
from tests.runs import run_config

QUICK_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Half of the time that XLA compiles for a CPU, or less; a version that does not know a flag aborts."""


def pytest_addoption(parser):
    parser.addoption("--record-errors", type=Path, help="file for the messages that each test triggers")
    parser.addoption("--gpu", action="store_true", help="compute on a GPU; without it, on a CPU wherever there is one")


def pytest_configure(config):
    """Choose device and compiler flags, also for the processes that tests start; record messages for docs/errors.md.

    Without --gpu that is the CPU, on which PyTorch and other devices agree to float32 precision. All processes of a
    session record into one file.
    """
    if config.option.gpu:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU's memory is for all processes of the session
        if jax.default_backend() != "gpu":
            raise pytest.UsageError("--gpu: JAX finds no GPU")
    else:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would spin on the cores of the other processes
    gc.set_threshold(50_000, 20, 100)  # a collection walks all that JAX and PyTorch have made: a tenth of tracing
    if jax.__version__.startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILER}"
    if path := config.option.record_errors:
        if not hasattr(config, "workerinput"):
            path.unlink(missing_ok=True)
        config.pluginmanager.register(Recorder(path.absolute()))


def pytest_collection_modifyitems(items):
    """Tests of DeepSpeed's engine run where it is installed (make parity)."""
    if importlib.util.find_spec("deepspeed") is None:
        for item in items:
            if item.get_closest_marker("deepspeed"):
                item.add_marker(pytest.mark.skip(reason="needs deepspeed, see make parity"))


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Compile equal programs once a session, although every run jits an update of its own."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def quick_compiling():
    """Compile without optimisations, here and in the processes that tests start: most programs run once."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def traced_anew():
    """Reuse nothing that was traced or compiled before, and leave nothing for later tests."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def users_compiling(quick_compiling, traced_anew):
    """Compile with optimisations, as users do, where numbers are compared with another program's."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def user_options(users_compiling):
    """Skip tests of what jax 0.10 makes for a CPU elsewhere; return `compile` options with a user's fusion emitters."""
    if not alone_on_a_cpu() or not jax.__version__.startswith("0.10."):
        pytest.skip("is about what jax 0.10 makes for a CPU")
    return {"xla_cpu_use_fusion_emitters": True}


@pytest.fixture
def as_on_a_gpu():
    """Trace the programs of a GPU, which then run on a CPU."""
    with compiling_for([types.SimpleNamespace(platform="gpu")]):
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(GOLDEN_BASE)


@pytest.fixture(scope="session")
def golden_model():
    return load_model(GOLDEN_BASE)


BASES = {"parallel": {}, "sequential": {"use_parallel_residual": False}, "gpt2": {"model_type": "gpt2"}}


@pytest.fixture(scope="session", params=BASES)
def base_folder(request, tmp_path_factory):
    return make_base_folder(tmp_path_factory.mktemp("base") / "tiny", **BASES[request.param])


@pytest.fixture(scope="session")
def model(base_folder):
    return load_model(base_folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted run of 8 updates in 2 epochs."""
    config = run_config(tmp_path_factory.mktemp("runs"))
    assert train(config).finished
    return config


@pytest.fixture
def exit_codes(monkeypatch):
    """The codes with which the program would have been ended at once."""
    codes = queue.Queue()

    def never_return(code):
        codes.put(code)
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", never_return)
    return codes


@pytest.fixture
def heeding_ctrl_c():
    """Here and in programs that are started, even where pytest runs in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """Byte-level BPE as Pythia's and open-calm's: bos and eos are one token, config.json gives the ids."""
    folder = tmp_path_factory.mktemp("bpe")
    backend = tokenizers.ByteLevelBPETokenizer()
    documents = [json.loads(line)["text"] for line in SAMPLE.read_text().splitlines()]
    backend.train_from_iterator(documents, vocab_size=600, special_tokens=["<|endoftext|>", "<|padding|>"])
    backend.enable_truncation(5)  # as some files have it; whoever loads it must not obey
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {"600": {"content": "<extra>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}))
    return folder


@pytest.fixture
def own_bpe(bpe_folder, tmp_path):
    """A copy of that folder, for a test to change."""
    return shutil.copytree(bpe_folder, tmp_path / "bpe")
