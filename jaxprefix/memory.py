"""What compiling leaves behind is given back; a device's memory that was too small, told plainly."""

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator

import jax

from convert.errors import RunError

GIB = 2**30
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program that has been compiled, or read from the cache; it has not run yet."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@functools.cache
def trim_after_compiling(seconds: float = 0.1) -> None:
    """After each compilation of at least `seconds`, return freed heap memory to the system (glibc only).

    That is 50 to 150 MB, too fragmented for the program's arrays to reuse. Registers once per process.
    """
    library = ctypes.CDLL(None)

    def give_back(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= seconds:
            library.malloc_trim(0)

    if hasattr(library, "malloc_trim"):
        jax.monitoring.register_event_duration_secs_listener(give_back)


@contextlib.contextmanager
def within_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn JAX's error of a device that is full into RunError, which ends with what `advice` returns."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(f"out of memory: {shortage(str(error))}; {advice()}") from error


def shortage(text: str) -> str:
    """Say by how much a device's memory was too small, from the error's text."""
    wanted = re.search(r"allocat\D+(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?\b", text)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    size = stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free = size - stats.get("bytes_in_use", 0)
    over = "more was asked for than"
    if wanted:
        n_bytes = float(wanted[1]) * UNITS[wanted[2]]
        over = f"{n_bytes / GIB:.2f} GiB were asked for at once, {max(n_bytes - free, 0) / GIB:.2f} more than"
    return f"{over} the {free / GIB:.2f} of {size / GIB:.2f} GiB that {device.device_kind} has free"
