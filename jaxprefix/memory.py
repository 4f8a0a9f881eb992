"""A device or host whose memory is too small: the error that says what to lower and, of a device, by how much."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

import jax

from convert.errors import RunError

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextlib.contextmanager
def within_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a device or host that is full into RunError, which ends with what `advice` returns."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(f"out of memory: {shortage(str(error))}; {advice()}") from error
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise RunError(f"out of memory: this machine has less free than was requested; {advice()}") from error


def shortage(text: str) -> str:
    """Say by how much a device's memory was too small, from the error's text."""
    wanted = re.search(r"allocat\D+(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?\b", text)
    n_gib = float(wanted[1]) * UNITS[wanted[2]] / GIB if wanted else None
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:  # as a CPU's
        asked = "more was requested than is free" if n_gib is None else f"{n_gib:.2f} GiB were requested at once"
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        return f"{asked}; this machine has {size:.2f} GiB in all" if device.platform == "cpu" else asked
    size = stats["bytes_limit"] / GIB
    free = size - stats.get("bytes_in_use", 0) / GIB
    over = "more was requested than"
    if n_gib is not None:
        over = f"{n_gib:.2f} GiB were requested at once, {max(n_gib - free, 0):.2f} more than"
    return f"{over} the {free:.2f} of {size:.2f} GiB that {device.device_kind} has free"
