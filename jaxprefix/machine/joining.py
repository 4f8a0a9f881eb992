"""How the processes of a run find each other, and what they say when others end or never come."""

import collections
import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator

import jax

from convert.errors import InputError, RunError, first_line
from jaxprefix.config import HostsConfig
from jaxprefix.machine.devices import devices, on_a_cpu
from jaxprefix.machine.hosts import anywhere, end_at_once, ended_by_ctrl_c, wait_for_all
from jaxprefix.machine.memory import FULL
from jaxprefix.machine.screen import warn

JOIN_SECONDS = 120
"""How long a process waits for the others to join, then to announce their devices, then for these to connect."""
HEARTBEAT_SECONDS = 30
"""A process that has been silent for this long counts as dead, and the others end."""


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Join the other processes of a run for the duration of the `with`. JAX must not have been used before.

    Raises InputError when the cluster is not recognised, the port is taken, JAX is in use already, or processes have
    unequal numbers of devices; RunError when the others can no longer be reached. If not all have joined after
    JOIN_SECONDS, or they cannot reach each other, the program ends with an error, before JAX would abort it.
    """
    if config.several:
        with plain_where_others_end():
            _join(config)
            yield
            wait_for_all("end")
        jax.distributed.shutdown()
    else:
        _warn_of_slurm()
        devices()  # fails plainly where a platform does not work
        yield


def _join(config: HostsConfig) -> None:
    """Connect this process to the others, and check that their devices can reach each other."""
    _connect(config)
    _check_devices()
    if not on_a_cpu() and "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
        # XLA divides the choice of a program's kernels among processes: one that does not find the program in its
        # cache would wait forever for the share of one that does.
        jax.config.update("jax_enable_compilation_cache", False)
    unreached = InputError(
        f"all processes joined, but their devices did not reach each other within {JOIN_SECONDS} seconds; "
        "NCCL_DEBUG=INFO tells more, NCCL_SOCKET_IFNAME chooses the network"
    )
    with _within_time(unreached):
        anywhere(False)


def _connect(config: HostsConfig) -> None:
    """Connect this process to the others."""
    if config.process_id == 0 and config.coordinator_address is not None:
        _check_port(int(config.coordinator_address.rpartition(":")[2]))
    _bypass_proxy()
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
    address = config.coordinator_address or "the address that --distributed found"
    who = "some of the other processes" if config.process_id == 0 else "process 0 or another process"
    missing = f"{who} did not join at {address} within {JOIN_SECONDS} seconds; has each its own --process_id?"
    try:
        with _within_time(InputError(missing)):
            jax.distributed.initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                cluster_detection_method=None if config.distributed else "deactivate",
                initialization_timeout=2 * JOIN_SECONDS,  # never expires before the timer
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        raise InputError(f"--distributed: no supported cluster was detected ({error})") from error
    except RuntimeError as error:
        raise InputError(f"cannot join the other processes: {error}") from error


def _check_devices() -> None:
    """Exchange devices, before a slow download can delay a process, and check that all have the same number."""
    untold = InputError(
        f"all processes joined, but not all told their devices within {JOIN_SECONDS} seconds; does every host see its "
        "GPUs? With JAX_PLATFORMS=cuda, one that does not says so"
    )
    with _within_time(untold):
        counts = collections.Counter(device.process_index for device in devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items()))
        raise InputError(f"all processes must have the same number of devices; {found}")


@contextlib.contextmanager
def _within_time(error: InputError) -> Iterator[None]:
    """End the program with an error if the block, which waits for other processes, takes longer than JOIN_SECONDS."""
    timer = threading.Timer(JOIN_SECONDS, end_at_once, [error])
    timer.daemon = True
    timer.start()
    try:
        with ended_by_ctrl_c():
            yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def plain_where_others_end() -> Iterator[None]:
    """Turn the communication errors that arise when other processes end into RunError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        lost = re.search(r"\b(gloo|nccl)|coordination service|heartbeat", str(error), re.IGNORECASE)
        if not lost or FULL.search(str(error)):
            raise
        reason, hint = first_line(error), "; NCCL_DEBUG=INFO tells more" if "nccl" in lost[0].lower() else ""
        raise RunError(f"the other processes cannot be reached, one may have ended ({reason}){hint}") from error


def _check_port(port: int) -> None:
    """Raise InputError when a port is taken: JAX would abort the program."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # its own text repeats the address
        raise InputError(f"--coordinator_address: port {port} cannot be used ({reason})") from error


def _bypass_proxy() -> None:
    """Reach the other processes directly where a proxy is set for the rest of the world."""
    proxies = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC takes the first that is set; empty means no proxy
    if any(map(os.environ.get, proxies)):  # else left unset: JAX warns of any such variable
        os.environ[proxies[0]] = ""


def _warn_of_slurm() -> None:
    """Warn that each of SLURM's tasks makes a run of its own, unless --distributed joins them."""
    task, n_tasks = os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set only by srun
    if task is not None and n_tasks != "1":
        warn(f"SLURM task {task} of {n_tasks} makes a run of its own; --distributed joins all tasks in one run")
