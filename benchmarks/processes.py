"""The processes that are measured: side by side in rounds or turns, on one GPU; and the memory that they take."""

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
Turn = dict[str, Any]
"""The measurements of one round, or of one turn."""


def in_process(measure: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function in a new process, and return its result."""
    use_one_gpu()
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(measure, *arguments).result()


def alternate(
    ways: Mapping[str, Sequence[object]], measure: Callable[..., dict[str, Any]], n_rounds: int
) -> dict[str, list[Turn]]:
    """Call `measure` with each way's arguments once a round, each time in a new process; return its results by way."""
    results: dict[str, list[Turn]] = {way: [] for way in ways}
    for number in range(n_rounds):
        for way, arguments in ways.items():
            results[way].append(in_process(measure, *arguments) | {"round": number})
            print(f"round {number + 1}, {way}: {json.dumps(results[way][-1])}", file=sys.stderr, flush=True)
    return results


def take_turns(
    ways: Mapping[str, Sequence[object]], measure: Callable[..., Iterator[Any]], n_turns: int, n_rounds: int = 0
) -> dict[str, list[Turn]]:
    """Run the generator `measure` for every way, in a process of its own, and collect what it yields: one item a turn.

    All processes are started together and take turns, for machines whose speed changes from minute to minute. With
    `n_rounds`, for what fills a GPU's memory, only one runs at a time and has all its turns, every way once a round.
    A way that breaks off keeps the turns that it has had. What a process yields first, once prepared, is the platform
    that it computes on. Raises RuntimeError when that is a CPU for one way and a GPU for another.
    """
    use_one_gpu()
    if not n_rounds:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is for all of them
        return _in_turn(ways, measure, n_turns, platforms={})
    if not any(name.endswith("CLIENT_MEM_FRACTION") for name in os.environ):  # there are two names for it
        os.environ["XLA_CLIENT_MEM_FRACTION"] = ".95"  # PyTorch takes all, JAX by default three quarters
    results: dict[str, list[Turn]] = {way: [] for way in ways}
    platforms: dict[str, str] = {}
    for number, way in itertools.product(range(n_rounds), ways):
        turns = _in_turn({way: ways[way]}, measure, n_turns, platforms)[way]
        results[way] += [turn | {"round": number} for turn in turns]
    return results


def _in_turn(
    ways: Mapping[str, Sequence[object]],
    measure: Callable[..., Iterator[Any]],
    n_turns: int,
    platforms: dict[str, str],
) -> dict[str, list[Turn]]:
    """Start a process for each way, and let them take turns; note their `platforms`, which must be the same."""
    results: dict[str, list[Turn]] = {way: [] for way in ways}
    at_work = {way: _start(measure, arguments) for way, arguments in ways.items()}
    for number in range(n_turns + 1):
        for way, (process, pipe) in [*at_work.items()]:
            try:
                pipe.send(None)
                turn = pipe.recv()
            except (EOFError, OSError):
                del at_work[way]
                process.join()
                print(f"{way} ended with {process.exitcode} in turn {number}", file=sys.stderr, flush=True)
            else:
                if number:
                    results[way].append(turn | {"turn": number})
                else:
                    platforms[way] = turn
        if len({*platforms.values()}) > 1:
            for process, _ in at_work.values():
                process.terminate()
                process.join()
            raise RuntimeError(f"not all compute on the same kind of device, so nothing is compared: {platforms}")
    for process, pipe in at_work.values():
        pipe.close()
        process.join()
    return results


def _start(measure: Callable[..., Iterator[Any]], arguments: Sequence[object]) -> tuple[Any, Connection]:
    """Start a process that, for each item sent to it, advances a generator and sends back what that yields."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_work, args=(theirs, measure, arguments))
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection, measure: Callable[..., Iterator[Any]], arguments: Sequence[object]) -> None:
    turns = measure(*arguments)
    with contextlib.suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(next(turns))


def use_one_gpu() -> None:
    """Let the processes that follow see only the first GPU: PyTorch would take that one, jaxprefix all."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def platform_of(way: str) -> str:
    """Return what a way computes on in this process: cpu or gpu."""
    if way == "jaxprefix":
        import jax

        return jax.default_backend()
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def peak_device_memory(way: str) -> int:
    """Return the peak memory of this process's arrays on its first GPU, in bytes; 0 without one."""
    if way == "jaxprefix":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def descendants_memory() -> int:
    """Return the resident bytes of this process and its descendants; shared pages count once for each process."""
    parents, held = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # ended meanwhile
            continue
        process = int(fields["Pid"])
        parents[process], held[process] = int(fields["PPid"]), int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    family = {os.getpid()}
    while grown := {process for process, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(held.get(process, 0) for process in family)
