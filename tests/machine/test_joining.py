"""How a process joins the others, and what it says when they end or never come."""

import os
import socket
import threading
import types

import jax
import pytest

from convert.errors import InputError, RunError
from jaxprefix.config import HostsConfig
from jaxprefix.machine import hosts, joining
from jaxprefix.machine.joining import joined
from tests.pairs import PAGE, free_port, slurm
from tests.runs import PATIENCE

OWN_RISK = {"JAX_ENABLE_COMPILATION_CACHE": "1"}


@pytest.fixture
def nobody_to_join(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)


def join(port: int, process_id: int) -> None:
    with joined(HostsConfig(False, f"127.0.0.1:{port}", 2, process_id)):
        raise AssertionError("joined nobody")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used"):
            join(port, process_id=0)


def test_joining_comes_before_jax_is_used():
    """Not even a process on the host of process 0 asks whether its port is free."""
    jax.devices()
    told = r"cannot join the other processes: .* must be called before any JAX"
    with socket.create_server(("", 0)) as process_0, pytest.raises(InputError, match=told):
        join(process_0.getsockname()[1], process_id=1)


def test_the_page_tells_how_long_processes_wait():
    page = PAGE.read_text()
    assert f"({joining.JOIN_SECONDS} seconds for each of the three)" in page
    assert f"exits with its own code after {hosts.LEAVE_SECONDS} seconds" in page


@pytest.mark.usefixtures("nobody_to_join")
def test_processes_need_as_many_devices(monkeypatch):
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    message = "all processes must have the same number of devices; process 0 has 2, process 1 has 1"
    with pytest.raises(InputError, match=message), joined(HostsConfig(True)):
        pass


@pytest.mark.usefixtures("nobody_to_join")
def test_a_platform_that_does_not_work_is_told_plainly_after_joining(monkeypatch):
    def no_backend():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_backend)
    told = r"^JAX cannot use its devices \(.*\): none is there$"
    with pytest.raises(InputError, match=told), joined(HostsConfig(True)):
        pass


@pytest.mark.parametrize(
    ("set_before", "proxy"),
    [({}, None), ({"http_proxy": "p"}, ""), ({"https_proxy": "p", "no_proxy": "a"}, ""), ({"grpc_proxy": "p"}, "")],
)
def test_a_proxy_is_for_the_rest_of_the_world(monkeypatch, set_before, proxy):
    environment = {**set_before}
    monkeypatch.setattr(os, "environ", environment)
    joining._bypass_proxy()
    assert environment.get("grpc_proxy") == proxy


def test_tasks_of_slurm_that_were_not_joined_are_told(monkeypatch, capsys):
    for name, value in slurm(0, "7").items():  # as in the batch script itself, too
        monkeypatch.setenv(name, value)
    with joined(HostsConfig()):
        assert not capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with joined(HostsConfig()):
        assert "WARNING: SLURM task 0 of 2 makes a run of its own; --distributed" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody_to_join")
@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_what_another_processs_end_does_to_this_one_is_told_plainly(kind, monkeypatch):
    lost = kind("UNKNOWN: Gloo all-reduce failed: Read error: Connection closed by peer\nand pages more")
    told = r"^the other processes cannot be reached, one may have ended \(UNKNOWN: Gloo .* by peer\)$"
    config = HostsConfig(coordinator_address=f"localhost:{free_port()}", num_processes=1, process_id=0)
    with pytest.raises(RunError, match=told), joined(config):
        raise lost
    with pytest.raises(RunError, match=r"\(INTERNAL: NCCL operation .*\); NCCL_DEBUG=INFO tells more$"), joined(config):
        raise kind("INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error")
    for noticed in ("UNAVAILABLE: Connection to coordination service failed", "tasks are unhealthy: Heartbeat timeout"):
        with pytest.raises(RunError, match=rf"^the other .* ended \({noticed}\)$"), joined(config):
            raise kind(noticed)
    for other in ("INTERNAL", "RESOURCE_EXHAUSTED: of NCCL", "invalid literal 'igloo'"):
        with pytest.raises(kind, match=f"^{other}$"), joined(config):
            raise kind(other)


def test_no_cluster_is_found(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="--distributed: no supported cluster was detected"), joined(HostsConfig(True)):
        pass


@pytest.mark.usefixtures("nobody_to_join")
@pytest.mark.parametrize(
    ("hangs", "told"),
    [
        ("initialize", "some of the other processes did not join at 127.0.0.1:{port} within 1 seconds"),
        (
            "devices",
            "all processes joined, but not all told their devices within 1 seconds; does every host see its",
        ),
        (
            "anywhere",
            "all processes joined, but their devices did not reach each other within 1 seconds; NCCL_DEBUG",
        ),
    ],
)
def test_where_joining_hangs_is_told(exit_codes, capsys, monkeypatch, hangs, told):
    monkeypatch.setattr(joining, "JOIN_SECONDS", 1)
    jax.devices()  # which takes long the first time
    place = jax.distributed if hangs == "initialize" else joining
    monkeypatch.setattr(place, hangs, lambda *_, **__: threading.Event().wait())  # for good, as the suite may be long
    config = HostsConfig(False, f"127.0.0.1:{(port := free_port())}", 2, 0)
    threading.Thread(target=lambda: joined(config).__enter__(), daemon=True).start()
    assert exit_codes.get(timeout=PATIENCE) == 2
    assert f"error: {told.format(port=port)}" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody_to_join")
@pytest.mark.parametrize(
    ("platform", "asked", "kept"), [("gpu", {}, False), ("cpu", {}, True), ("gpu", OWN_RISK, True)]
)
def test_several_processes_on_gpus_keep_no_compiled_programs(monkeypatch, platform, asked, kept):
    """A process that finds its program leaves another, which does not, waiting for its share of XLA's trials."""
    monkeypatch.delenv(*OWN_RISK, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "on_a_cpu", lambda: platform == "cpu")
    try:
        with joined(HostsConfig(True)):
            assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.usefixtures("nobody_to_join")
def test_who_has_joined_is_not_given_up(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=0)])
    before = threading.enumerate()
    with joined(HostsConfig(True)):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        own = [timer for timer in timers if timer not in before]
        assert all(timer.finished.is_set() for timer in own), "one would end this program in two minutes"


def test_how_processes_join_and_leave(monkeypatch):
    order = []
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=0)])
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **how: order.append(how["cluster_detection_method"]))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: order.append("shut down"))
    monkeypatch.setattr(joining, "wait_for_all", lambda name: order.append(f"wait to {name}"))
    for config in HostsConfig(True), HostsConfig(False, "127.0.0.1:1", 2, 1):
        with joined(config):
            order.append("run")
    assert order == [None, "run", "wait to end", "shut down", "deactivate", "run", "wait to end", "shut down"]


def test_jax_does_not_take_sigterm_for_itself(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=0)])
    seen = []

    def initialize(*_, **__):
        seen.append(jax.config.jax_enable_preemption_service)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    jax.config.update("jax_enable_preemption_service", True)
    with joined(HostsConfig(True)):
        assert seen == [False]


@pytest.mark.usefixtures("nobody_to_join")
def test_jax_waits_for_as_long_as_it_is_told_and_past_a_proxy(monkeypatch):
    asked, environment = {}, {"http_proxy": "p"}

    def initialize(*_, **how):
        asked.update(how, **environment)

    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=0)])
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with joined(HostsConfig(True)):
        assert asked["initialization_timeout"] > joining.JOIN_SECONDS, "or it would abort before the error is told"
        assert asked["heartbeat_timeout_seconds"] == asked["shutdown_timeout_seconds"] == 30
        assert asked["grpc_proxy"] == ""
