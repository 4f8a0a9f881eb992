"""Compiled programs are kept in a folder for the next start; memory that compiling frees goes back to the system."""

import ctypes
import functools
import os
import tempfile
import warnings
from pathlib import Path

import jax

from jaxprefix.machine.screen import warn
from jaxprefix.machine.user_cache import OTHER_CACHE, cache_folder

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for a program that was compiled, or read from the cache, and has not run yet."""
TRIM_SECONDS = 0.1
OWN_CACHE = "set JAX_COMPILATION_CACHE_DIR to another folder, or to nothing"
"""What to do if a cache folder that the user chose cannot be used; `OTHER_CACHE` is for our default."""


def prepare_compiling() -> None:
    """Keep programs in the user's cache folder unless JAX has another; return freed memory; switch 64-bit types off."""
    trim_after_compiling()
    jax.config.update("jax_enable_x64", False)  # this package relies on 32-bit defaults
    place, advice = jax.config.jax_compilation_cache_dir, OWN_CACHE  # type: ignore[attr-defined]
    if place is None:
        place, advice = str(cache_folder() / "compiled"), OTHER_CACHE
        jax.config.update("jax_compilation_cache_dir", place)
    if place and "://" not in place:  # else nothing is kept, or it is kept in a bucket
        _check_writable(Path(place), advice)
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # XLA's cache of GPU kernels, which programs contain anyway, ends runs that share it or cannot write to it.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small ones add up to seconds


def _check_writable(folder: Path, advice: str) -> None:
    """Warn, once, about a folder in which no programs can be kept; those already there may still be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warn(f"{folder}: compiled programs cannot be kept ({error.strerror}); {advice}")
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # JAX's, for each


@functools.cache
def trim_after_compiling() -> None:
    """After each compilation of at least TRIM_SECONDS, return freed heap memory to the system (glibc only).

    That frees 50 to 150 MB, too fragmented for the program's arrays to reuse. Registers once per process.
    """
    library = ctypes.CDLL(None)

    def give_back(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= TRIM_SECONDS:
            library.malloc_trim(0)

    if hasattr(library, "malloc_trim"):
        jax.monitoring.register_event_duration_secs_listener(give_back)
