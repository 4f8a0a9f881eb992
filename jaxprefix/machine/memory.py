"""Plain errors for a device or host out of memory, which say what to lower; errors that hold no base model."""

import contextlib
import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import jax

from convert.errors import PlainError, RunError, first_line

GIB = 2**30
FULL = re.compile(r"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|ALLOC_FAILED|Autotuning failed.*No valid config", re.DOTALL)
"""What errors say on a full device: XLA's, CUDA's, its libraries'; and one from a GPU that could try no kernel."""
CHARACTERS = 120
"""How many characters are quoted of an error that does not say RESOURCE_EXHAUSTED."""
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables, the latter deprecated, for the share of a GPU's memory that JAX takes."""
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextlib.contextmanager
def within_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a device or host that is full into RunError, which ends with what `advice` returns."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not FULL.search(str(error)):
            raise
        cause = "" if "RESOURCE_EXHAUSTED" in str(error) else f" ({first_line(error)[:CHARACTERS]})"
        raise RunError(f"out of memory: {shortage(str(error))}{cause}; {advice()}") from error
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise RunError(f"out of memory: this machine has less free than was requested; {advice()}") from error


@contextlib.contextmanager
def released_after_errors() -> Iterator[None]:
    """Clear the local variables of the functions that an error has passed through; one of them may be a base model.

    A notebook keeps its last error, and with it those variables.
    """
    released = {sys.exception()}  # an error that the caller is handling is the caller's
    try:
        yield
    except (PlainError, KeyboardInterrupt) as error:
        link: BaseException | None = error
        while link is not None and link not in released:
            traceback.clear_frames(link.__traceback__)
            released.add(link)
            link = link.__cause__ or link.__context__
        raise


def shortage(text: str) -> str:
    """Say by how much a device's memory was too small, from the error's text."""
    wanted = re.search(r"allocat\D+(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?\b", text)
    n_gib = float(wanted[1]) * UNITS[wanted[2]] / GIB if wanted else None
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:  # as on a CPU
        asked = "more was requested than is free" if n_gib is None else f"{n_gib:.2f} GiB were requested at once"
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        return f"{asked}; this machine has {size:.2f} GiB in all" if device.platform == "cpu" else asked
    size = stats["bytes_limit"] / GIB
    if n_gib is not None and stats.get("pool_bytes", math.inf) / GIB + n_gib <= size:
        return (
            f"{n_gib:.2f} GiB were requested at once, which others hold: JAX may use {size:.2f} GiB of "
            f"{device.device_kind}, but got {stats['pool_bytes'] / GIB:.2f}. Look for other programs, a notebook's "
            "kernel, or another library in this process"
        )
    free = size - stats.get("bytes_in_use", 0) / GIB
    if n_gib is None:
        over = "more was requested than"
    elif n_gib > free:
        over = f"{n_gib:.2f} GiB were requested at once, {n_gib - free:.2f} more than"
    else:  # in pieces, or taken by other programs
        over = f"{n_gib:.2f} GiB were requested at once, which are not in one piece within"
    told = f"{over} the {free:.2f} free of the {size:.2f} GiB of {device.device_kind} that JAX may use"
    if device.platform == "gpu" and not any(map(os.environ.get, FRACTIONS)):
        told += f"; {FRACTIONS[0]}=.95 allows it more"
    return told
