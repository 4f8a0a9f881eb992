import errno
import gc
import os
import types
import weakref
from pathlib import Path

import jax
import pytest

import jaxprefix.decode
import jaxprefix.train as train_module
from convert.errors import RunError
from jaxprefix.cli import main
from jaxprefix.evaluation import evaluate
from jaxprefix.inference_config import EvaluateConfig
from jaxprefix.machine import devices
from jaxprefix.machine.memory import FRACTIONS, released_after_errors, shortage
from jaxprefix.run.faults import less_memory
from tests.base_folders import GOLDEN_BASE
from tests.runs import run_config

ASKED = {
    "Out of memory while trying to allocate 2147483648 bytes.": 2.0,
    "Out of memory while trying to allocate 12.50GiB.": 12.5,
    "Failed to allocate request for 1.5GiB (1610612736B) on device": 1.5,
    "Ran out of memory. Tried to allocate 16.00G, exceeds": 16.0,
    "Failed to allocate memory.": None,
    "something else": None,
}
"""What XLA says behind RESOURCE_EXHAUSTED, and the GiB that it names."""


@pytest.mark.parametrize(("text", "n_gib"), ASKED.items())
def test_what_was_asked_for_is_read_from_the_error(text, n_gib):
    asked = "more was requested than is free" if n_gib is None else f"{n_gib:.2f} GiB were requested at once"
    in_all = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert shortage(f"RESOURCE_EXHAUSTED: {text}") == f"{asked}; this machine has {in_all:.2f} GiB in all"


@pytest.fixture
def gpu_memory(monkeypatch):
    """What a GPU says of its memory, for a test to change: it says nothing at first."""
    stats = {}
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats, device_kind="H100")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    return stats


def test_the_hosts_memory_says_nothing_of_a_gpus(gpu_memory):
    assert shortage("RESOURCE_EXHAUSTED: allocate 2.00GiB") == "2.00 GiB were requested at once"


FREE = " the 10.00 free of the 11.00 GiB of H100 that JAX may use"


@pytest.mark.parametrize(
    ("n_gib", "told"),
    [
        ("12.50", "12.50 GiB were requested at once, 2.50 more than"),
        ("2.00", "2.00 GiB were requested at once, which are not in one piece within"),
        ("", "more was requested than"),
    ],
)
def test_a_gpu_tells_how_much_is_free(gpu_memory, monkeypatch, n_gib, told):
    gpu_memory |= {"bytes_limit": 11 * 2**30, "bytes_in_use": 2**30}
    text = f"RESOURCE_EXHAUSTED: allocate {n_gib}GiB"
    assert shortage(text) == f"{told}{FREE}; XLA_CLIENT_MEM_FRACTION=.95 allows it more"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert shortage(text) == told + FREE, "both together would be an error"
    gpu_memory["pool_bytes"] = 10 * 2**30  # the system has not given it the last one
    assert shortage(text) == told + FREE


def test_memory_that_others_hold_is_told_of(gpu_memory):
    gpu_memory |= {"bytes_limit": 11 * 2**30, "bytes_in_use": 2**30, "pool_bytes": 2 * 2**30}
    others = "which others hold: JAX may use 11.00 GiB of H100, but got 2.00. Look for other programs"
    assert others in shortage("RESOURCE_EXHAUSTED: allocate 9.00GiB")
    assert others not in shortage("RESOURCE_EXHAUSTED: allocate 9.01GiB")


@pytest.mark.parametrize(
    ("full", "told"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB."),
            "12.50 GiB were requested at once; ",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Autotuning failed for HLO: %a = f32[]\n: No valid config found!"),
            "more was requested than is free; this machine has {:.2f} GiB in all (INTERNAL: Autotuning failed for HLO: "
            "%a = f32[]); ",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: CUBLAS_STATUS_ALLOC_FAILED"),
            "more was requested than is free; this machine has {:.2f} GiB in all (INTERNAL: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate", "7.safetensors"), "this machine has less free than was requested; "),
        (MemoryError("Unable to allocate 500. MiB"), "this machine has less free than was requested; "),
    ],
)
def test_generating_with_too_little_memory_tells_what_to_lower(monkeypatch, capsys, full, told):
    def fail(*_):
        raise full

    monkeypatch.setattr(jaxprefix.decode, "_decode", fail)
    assert main(["generate", "--pretrained_model_dir", str(GOLDEN_BASE), "--prompt", "a", "--batch_size", "3"]) == 1
    error = capsys.readouterr().err
    n_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert f"error: out of memory: {told.format(n_gib)}" in error
    assert "lower --batch_size 3 or --max_output_len 128, or use --dtype bfloat16" in error
    with pytest.raises(RunError, match="lower --batch_size 16 or --max_output_len 60 or --max_seq_len"):
        evaluate(EvaluateConfig(str(GOLDEN_BASE)))
    for dtype in "float16", "bfloat16":
        with pytest.raises(RunError, match=r"lower --batch_size 16 or --max_output_len 60 or --max_seq_len$"):
            evaluate(EvaluateConfig(str(GOLDEN_BASE), dtype=dtype))
    monkeypatch.setattr(devices, "cuda_generation", lambda: 7)
    with pytest.raises(RunError, match="or use --dtype float16"):
        evaluate(EvaluateConfig(str(GOLDEN_BASE)))
    assert "--dtype float16" in less_memory(run_config(Path("runs")))


@pytest.mark.parametrize(
    "end",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of memory"),
        RunError("no number is finite"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_that_a_notebook_keeps_holds_no_base_model(tmp_path, monkeypatch, end):
    held = []

    def fails(run, *_):
        held.append(weakref.ref(run.base))
        raise end

    monkeypatch.setattr(train_module, "loop", fails)
    with pytest.raises(RunError) as kept:
        train_module.train(run_config(tmp_path, save_model=False, save_log=False))
    gc.collect()
    assert held[0]() is None, kept


def test_what_the_caller_is_handling_stays_the_callers():
    """And causes in a circle have an end."""
    error, other = RunError("error"), RunError("other")
    other.__cause__ = error

    def with_variable():
        variable = "the caller's"
        raise ValueError(variable)

    def caller():
        try:
            with_variable()
        except ValueError:
            with released_after_errors():
                raise error from other

    with pytest.raises(RunError, match="error"):
        caller()
    handled = error.__context__.__traceback__.tb_next.tb_frame
    assert handled.f_locals == {"variable": "the caller's"}
