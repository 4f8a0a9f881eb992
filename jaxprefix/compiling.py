"""How programs are compiled: kept in a folder for the next start, and the memory that compiling frees given back."""

import ctypes
import functools
import os
import tempfile
import warnings
from pathlib import Path

import jax

from jaxprefix.screen import warn
from jaxprefix.user_cache import OTHER_CACHE, cache_folder

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that has been compiled, or read from the cache; it has not run yet."""
TRIM_SECONDS = 0.1
OWN_CACHE = "set JAX_COMPILATION_CACHE_DIR to another folder, or to nothing"
"""What to do where the user's own cache is of no use; `OTHER_CACHE` is for ours."""


def prepare_compiling() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX has another; give freed memory back; no 64 bits."""
    trim_after_compiling()
    jax.config.update("jax_enable_x64", False)  # types here are what they say
    place, advice = jax.config.jax_compilation_cache_dir, OWN_CACHE  # type: ignore[attr-defined]
    if place is None:
        place, advice = str(cache_folder() / "compiled"), OTHER_CACHE
        jax.config.update("jax_compilation_cache_dir", place)
    if place and "://" not in place:  # nothing is kept, or in a bucket
        _check_writable(Path(place), advice)
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # That of a GPU's kernels, which programs hold anyway, ends runs that share it or cannot write it.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small ones add up to seconds


def _check_writable(folder: Path, advice: str) -> None:
    """Warn, once, of a folder in which no programs can be kept; those that are there may still be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warn(f"{folder}: compiled programs cannot be kept ({error.strerror}); {advice}")
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # JAX's, of each


@functools.cache
def trim_after_compiling() -> None:
    """After each compilation of at least TRIM_SECONDS, return freed heap memory to the system (glibc only).

    That is 50 to 150 MB, too fragmented for the program's arrays to reuse. Registers once per process.
    """
    library = ctypes.CDLL(None)

    def give_back(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= TRIM_SECONDS:
            library.malloc_trim(0)

    if hasattr(library, "malloc_trim"):
        jax.monitoring.register_event_duration_secs_listener(give_back)
