"""The devices that programs are compiled for: this machine's, unless others are named, which need not be there."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from convert.errors import InputError

_named: Sequence[Any] = ()


def devices() -> Sequence[Any]:
    """Return the devices that rows and weights may be split over: of all processes, unless others are named."""
    return _named or _found(jax.devices)


def own_device() -> Any:
    """Return this process's first device: all devices are of its kind."""
    return _named[0] if _named else _found(jax.local_devices)[0]


def _found(find: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return the devices that JAX finds. Raises InputError for a platform that is asked for and does not work."""
    try:
        return find()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        reason = str(error) or "none is there"
        raise InputError(f"JAX cannot use its devices (JAX_PLATFORMS={asked}): {reason}") from error


def on_a_cpu() -> bool:
    """Tell whether this computes on CPUs, for what their compiler needs and a GPU's is better off without."""
    return own_device().platform == "cpu"


def alone_on_a_cpu() -> bool:
    """Tell whether a CPU is the only device; GPUs are fast at other forms, and several devices split an array."""
    return on_a_cpu() and len(devices()) == 1


@contextlib.contextmanager
def compiling_for(named: Sequence[Any]) -> Iterator[None]:
    """Compile for these devices; a GPU will do that is only described (`jax.experimental.topologies`).

    What was traced for other devices is forgotten, before and after: some of it depends on them.
    """
    global _named
    before, others = _named, list(named) != list(devices())
    if others:
        jax.clear_caches()
    _named = named
    try:
        yield
    finally:
        _named = before
        if others:
            jax.clear_caches()
