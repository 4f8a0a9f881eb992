"""How programs are compiled: kept in a folder for the next start, and the memory that compiling frees given back."""

import ctypes
import functools
import os
import sys
import tempfile
import warnings

import jax

from jaxprefix.config import OTHER_CACHE, cache_folder

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that has been compiled, or read from the cache; it has not run yet."""
TRIM_SECONDS = 0.1


def prepare_compiling() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX has another; give freed memory back; no 64 bits."""
    trim_after_compiling()
    jax.config.update("jax_enable_x64", False)  # types here are what they say
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = cache_folder() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            what = f"{folder}: compiled programs cannot be kept ({error.strerror}); {OTHER_CACHE}"
            print(f"WARNING: {what}", file=sys.stderr)
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # JAX's, of each
        jax.config.update("jax_compilation_cache_dir", str(folder))  # one that is full may still be read
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small ones add up to seconds


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
