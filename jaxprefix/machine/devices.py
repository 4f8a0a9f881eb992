"""The devices that programs are compiled for: this machine's, or others that are named and need not exist."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax

from convert.errors import InputError

FIRST_WITH_BFLOAT16 = 8
"""NVIDIA's first generation (Ampere) whose GPUs multiply bfloat16 as fast as float16, and run cuDNN's attention."""

_named: Sequence[Any] = ()
_naming = threading.RLock()


def devices() -> Sequence[Any]:
    """Return the devices that rows and weights may be split over: those of all processes, or the named ones."""
    return _named or _found(jax.devices)


def own_device() -> Any:
    """Return this process's first device; all devices are of its kind."""
    return _named[0] if _named else _found(jax.local_devices)[0]


def _found(find: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return the devices that JAX finds. Raises InputError if the requested platform does not work."""
    try:
        return find()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        reason = str(error) or "none is there"
        raise InputError(f"JAX cannot use its devices (JAX_PLATFORMS={asked}): {reason}") from error


def on_a_cpu() -> bool:
    """Tell whether programs run on CPUs, whose compiler needs some workarounds that GPUs do better without."""
    return own_device().platform == "cpu"


def cuda_generation() -> int | None:
    """Return the generation of this process's NVIDIA GPU, the first number of its compute capability; else None."""
    capability = str(getattr(own_device(), "compute_capability", ""))  # "9.0"; AMD's are names
    return int(capability.partition(".")[0]) if re.fullmatch(r"\d+\.\d+", capability) else None


def half_type() -> Literal["bfloat16", "float16"]:
    """Return the half-precision type to use: NVIDIA's GPUs before Ampere turn bfloat16 into float32 to multiply."""
    generation = cuda_generation()
    return "float16" if generation is not None and generation < FIRST_WITH_BFLOAT16 else "bfloat16"


def alone_on_a_cpu() -> bool:
    """Tell whether one CPU is the only device: for code that is slow on GPUs, or with arrays split over devices."""
    return on_a_cpu() and len(devices()) == 1


@contextlib.contextmanager
def compiling_for(named: Sequence[Any]) -> Iterator[None]:
    """Compile for these devices, which may be mere descriptions of GPUs (`jax.experimental.topologies`).

    JAX's caches are cleared before and after if traced programs would differ. Threads take turns.
    """
    global _named
    with _naming:
        before, traced_for, changes = _named, _traits(), False
        try:
            _named = named
            if changes := _traits() != traced_for:
                jax.clear_caches()
            yield
        finally:
            _named = before
            if changes:
                jax.clear_caches()


def _traits() -> tuple[bool, bool, int | None]:
    """Return everything about the devices that traced programs depend on."""
    return on_a_cpu(), alone_on_a_cpu(), cuda_generation()
