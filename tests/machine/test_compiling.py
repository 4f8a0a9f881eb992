"""Compiled programs that are kept, and memory that compiling gives back."""

import ctypes
import errno
import os
import subprocess
import sys
import types
import warnings

import jax
import pytest

from jaxprefix.machine import compiling
from jaxprefix.machine.compiling import prepare_compiling
from tests.runs import printed_by


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, ["{}/jaxprefix/compiled", "0.0", "none"]),
        ({"JAX_COMPILATION_CACHE_DIR": "{}/own"}, ["{}/own", "0.0", "none"]),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ["", "0.0", "none"]),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "5"}, ["{}/jaxprefix/compiled", "5.0", "none"]),
        ({"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "all"}, ["{}/jaxprefix/compiled", "0.0", "all"]),
    ],
)
def test_what_is_compiled_is_kept_as_the_user_says(given, kept, tmp_path):
    """By default also what compiles quickly; but not XLA's own cache of kernels, which ends GPU runs that share it."""
    program = "import jax\nfrom jaxprefix.machine.compiling import prepare_compiling\nprepare_compiling()\n"
    program += "print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs, "
    program += "jax.config.jax_persistent_cache_enable_xla_caches, sep=';', end='')"
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = others | {"XDG_CACHE_HOME": str(tmp_path)} | {name: v.format(tmp_path) for name, v in given.items()}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split(";") == [part.format(tmp_path) for part in kept], result.stderr


@pytest.mark.parametrize("attempt", ["pathlib.Path.mkdir", "tempfile.TemporaryFile"])
def test_programs_that_cannot_be_kept_are_told_of_once(capsys, monkeypatch, tmp_path, attempt):
    """Nor do they make JAX warn of each of them."""

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    folder = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attempt, fail)
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        prepare_compiling()
        warnings.warn("Error writing persistent compilation cache entry for 'jit_a'", stacklevel=1)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxprefix" / "compiled"), "it may be read"
        assert "cannot be kept (Read-only file system); set XDG_CACHE_HOME to another" in capsys.readouterr().err
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        prepare_compiling()
        assert "cannot be kept (Read-only file system); set JAX_COMPILATION_CACHE_DIR to" in capsys.readouterr().err
        jax.config.update("jax_compilation_cache_dir", "gs://bucket")
        prepare_compiling()
        assert capsys.readouterr().err == "", "a bucket is no folder"
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)


def test_types_are_what_they_say_whatever_the_environment_says():
    program = (
        "import jax, jax.numpy as jnp\nfrom jaxprefix.machine.compiling import prepare_compiling\nprepare_compiling()\n"
    )
    program += "print(jnp.zeros(1).dtype, jnp.arange(1).dtype)"
    assert printed_by(program, JAX_PLATFORMS="cpu", JAX_ENABLE_X64="1").split() == ["float32", "int32"]


@pytest.fixture
def trimming(monkeypatch):
    """Trim after compiling until the test ends, with a C library of these functions; return JAX's new listeners."""
    added, register = [], jax.monitoring.register_event_duration_secs_listener

    def start(seconds, **functions):
        monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(**functions))
        monkeypatch.setattr(compiling, "TRIM_SECONDS", seconds)
        compiling.trim_after_compiling.__wrapped__()
        return added

    monkeypatch.setattr(
        jax.monitoring,
        "register_event_duration_secs_listener",
        lambda listener: register(listener) or added.append(listener),
    )
    yield start
    for listener in added:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize(("seconds", "trimmed"), [(0.0, [0]), (1e9, [])])
def test_memory_is_trimmed_after_compiling_for_long_and_before_the_program_runs(trimming, seconds, trimmed):
    calls, when_run = [], []
    trimming(seconds, malloc_trim=calls.append)
    program = jax.jit(lambda: jax.debug.callback(lambda: when_run.extend(calls)))
    program()
    program()
    jax.effects_barrier()
    assert when_run == 2 * trimmed


def test_another_c_library_than_glibc_trims_nothing(trimming):
    assert trimming(0.0) == []


def test_a_process_listens_once_however_many_runs_it_makes(trimming):
    listeners = trimming(1e9, malloc_trim=print)
    compiling.trim_after_compiling.cache_clear()
    for _ in range(2):
        compiling.trim_after_compiling()
    assert len(listeners) == 2, "the fixture's and one"
