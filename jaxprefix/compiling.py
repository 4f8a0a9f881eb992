"""How programs are compiled: kept in a folder for the next start, and the memory that compiling frees given back."""

import ctypes
import functools
import os
import sys
import tempfile
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxprefix.config import OTHER_CACHE, cache_folder
from jaxprefix.hosts import all_see, is_first

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that has been compiled, or read from the cache; it has not run yet."""
TRIM_SECONDS = 0.1


def prepare_compiling() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX has another; give freed memory back; no 64 bits."""
    trim_after_compiling()
    jax.config.update("jax_enable_x64", False)  # types here are what they say
    advice = "set JAX_COMPILATION_CACHE_DIR to another folder"
    if not _programs_place():
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        advice = OTHER_CACHE
    if "://" not in _programs_place():  # a bucket
        _check_writable(Path(_programs_place()), advice)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small ones add up to seconds


def _programs_place() -> str:
    """Return the folder or bucket in which JAX keeps compiled programs; empty if it keeps none."""
    return jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]


def _check_writable(folder: Path, advice: str) -> None:
    """Warn, once, of a folder in which no programs can be kept; those that are there may still be read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"WARNING: {folder}: compiled programs cannot be kept ({error.strerror}); {advice}", file=sys.stderr)
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # JAX's, of each
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own, for GPUs, would be an error


def keep_only_shared_programs() -> None:
    """Of several processes, keep no compiled programs unless all have the same folder; they call this together.

    JAX lets process 0 alone fill it. With one for each host, process 0 would find its programs next time while the
    others compile, and on GPUs wait for process 0 to try its share of each program's kernels: for good.
    """
    place = _programs_place()
    if "://" in place or all_see(Path(place or os.devnull)):
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX goes by what it has decided before
    if is_first():
        what = f"{place or 'no folder'}: not seen by all processes, so compiled programs are not kept"
        print(f"WARNING: {what}; set JAX_COMPILATION_CACHE_DIR to a folder that all hosts share", file=sys.stderr)


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
