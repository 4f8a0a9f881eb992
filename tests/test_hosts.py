"""What one process of several does: joining, agreeing, leaving, and what it says."""

import json
import os
import queue
import socket
import threading
import types

import jax
import numpy as np
import pytest

from convert.errors import InputError, RunError
from jaxprefix import hosts, joining
from jaxprefix.config import HostsConfig
from jaxprefix.hosts import Vote
from jaxprefix.joining import joined
from jaxprefix.sharding import make_mesh
from tests.pairs import free_port, slurm
from tests.runs import PATIENCE

OWN_RISK = {"JAX_ENABLE_COMPILATION_CACHE": "1"}


def join(port: int, process_id: int) -> None:
    with joined(HostsConfig(False, f"127.0.0.1:{port}", 2, process_id)):
        raise AssertionError("joined nobody")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used"):
            join(port, process_id=0)


def test_joining_comes_before_jax_is_used():
    jax.devices()
    with pytest.raises(InputError, match=r"cannot join the other processes: .* must be called before any JAX"):
        join(free_port(), process_id=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "a run of several processes also needs --coordinator_address and --process_id"),
        ({"distributed": True, "process_id": 1}, "--distributed detects"),
        ({"coordinator_address": "node0"}, "--coordinator_address must be host:port, found 'node0'"),
        ({"coordinator_address": "", "num_processes": 2, "process_id": 0}, "must be host:port, found ''"),
        ({"coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, "--num_processes must be positive, is 0"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "below --num_processes, is 2"),
        ({"stall_minutes": 0.0}, "--stall_minutes must be positive, is 0.0"),
    ],
)
def test_flags_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        HostsConfig(**settings)


@pytest.fixture
def second_of_two(monkeypatch):
    """This process, taken for the second of two that need not wait for each other."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "wait_for_all", lambda name: None)


def first_says(monkeypatch, settings):
    """Have process 0 send its settings, as JAX does: what the others give must have the same shape."""
    content = np.frombuffer(json.dumps(settings).encode(), np.uint8)

    def from_first(own):
        sent = content if own.ndim else np.array(len(content))
        assert own.shape == sent.shape
        return sent

    monkeypatch.setattr(hosts, "broadcast_from_first", from_first)


@pytest.mark.usefixtures("second_of_two")
def test_settings_that_differ_are_named(monkeypatch):
    long = " 😃" * 50_000
    first_says(monkeypatch, {"seed": 42, "suffix": long, "mesh": None})
    hosts.check_same({"seed": 42, "suffix": long, "mesh": None})
    with pytest.raises(InputError, match=r"differ from those of process 0:\n  - seed: 42 on process 0, 7 here$"):
        hosts.check_same({"seed": 7, "suffix": long, "mesh": None})


@pytest.fixture
def exit_codes(monkeypatch):
    """The codes with which the program would have been ended at once."""
    codes = queue.Queue()

    def never_return(code):
        codes.put(code)
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", never_return)
    return codes


def test_the_others_failure_is_told_here(second_of_two, monkeypatch):
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda failed: np.array([True, failed]))
    with pytest.raises(InputError, match="process 0 cannot read its inputs; its own error tells why"):
        hosts.agree("read its inputs", lambda: "read")


def test_a_folder_that_is_not_shared(second_of_two, monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "VISIBLE_SECONDS", 0)
    with pytest.raises(InputError, match="process 1 does not see what process 0 wrote; --output_dir must be a folder"):
        hosts.wait_until_visible(tmp_path / "config.json")


@pytest.mark.usefixtures("second_of_two")
def test_an_old_run_in_a_folder_that_is_not_shared_does_not_count(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hosts, "VISIBLE_SECONDS", 0)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda number: number)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda failed: np.array([failed]))
    with pytest.raises(InputError, match="process 1 does not see what process 0 wrote"):
        hosts.check_shared(tmp_path)
    monkeypatch.setattr(hosts, "is_first", lambda: True)
    hosts.check_shared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_processes_need_as_many_devices(monkeypatch):
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    message = "all processes must have the same number of devices; process 0 has 2, process 1 has 1"
    with pytest.raises(InputError, match=message), joined(HostsConfig(True)):
        pass


def test_a_platform_that_does_not_work_is_told_plainly_after_joining(monkeypatch):
    def no_backend():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_backend)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
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


@pytest.mark.usefixtures("second_of_two")
def test_the_own_error_is_told_though_the_others_are_too_slow(monkeypatch):
    def wait_for_all(name):
        raise RunError("not all processes reached this step")

    def fail():
        raise InputError("no such file")

    monkeypatch.setattr(hosts, "wait_for_all", wait_for_all)
    with pytest.raises(InputError, match="no such file"):
        hosts.agree("read its inputs", fail)
    with pytest.raises(RunError, match="not all processes"):
        hosts.agree("read its inputs", lambda: "read")


def test_one_that_is_slow_for_too_long(monkeypatch):
    def sync(key, timeout_ms):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: sync)
    with pytest.raises(RunError, match="load the base: not all processes reached this step within 3600 seconds"):
        hosts.wait_for_all("load the base")


def test_one_that_failed_alone_leaves_with_its_own_code(second_of_two, exit_codes, monkeypatch):
    monkeypatch.setattr(hosts, "LEAVE_SECONDS", 0)
    hosts.leave_soon(2)  # not joined yet: nothing to wait for
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    hosts.leave_soon(1)
    assert exit_codes.get(timeout=PATIENCE) == 1


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_what_another_processs_end_does_to_this_one_is_told_plainly(kind, monkeypatch):
    lost = kind("UNKNOWN: Gloo all-reduce failed: Read error: Connection closed by peer\nand pages more")
    told = r"^the other processes cannot be reached, one may have ended \(UNKNOWN: Gloo .* by peer\)$"
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    config = HostsConfig(coordinator_address=f"localhost:{free_port()}", num_processes=1, process_id=0)
    with pytest.raises(RunError, match=told), joined(config):
        raise lost
    with pytest.raises(RunError, match=r"\(INTERNAL: NCCL operation .*\); NCCL_DEBUG=INFO tells more$"), joined(config):
        raise kind("INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error")
    for other in ("INTERNAL", "RESOURCE_EXHAUSTED: of NCCL", "invalid literal 'igloo'"):
        with pytest.raises(kind, match=f"^{other}$"), joined(config):
            raise kind(other)


def test_no_cluster_is_found(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="--distributed: no supported cluster was detected"), joined(HostsConfig(True)):
        pass


@pytest.mark.parametrize(
    ("hangs", "told"),
    [
        ("initialize", "some of the other processes did not join at 127.0.0.1:{port} within 0.01 seconds"),
        (
            "devices",
            "all processes joined, but not all told their devices within 0.01 seconds; does every host see its",
        ),
        (
            "anywhere",
            "all processes joined, but their devices did not reach each other within 0.01 seconds; NCCL_DEBUG",
        ),
    ],
)
def test_where_joining_hangs_is_told(exit_codes, capsys, monkeypatch, hangs, told):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.01)
    place = jax.distributed if hangs == "initialize" else joining
    monkeypatch.setattr(place, hangs, lambda *_, **__: threading.Event().wait(PATIENCE))
    config = HostsConfig(False, f"127.0.0.1:{(port := free_port())}", 2, 0)
    threading.Thread(target=lambda: joined(config).__enter__(), daemon=True).start()
    assert exit_codes.get(timeout=PATIENCE) == 2
    assert f"error: {told.format(port=port)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "asked", "kept"), [("gpu", {}, False), ("cpu", {}, True), ("gpu", OWN_RISK, True)]
)
def test_several_processes_on_gpus_keep_no_compiled_programs(monkeypatch, platform, asked, kept):
    """A process that finds its program leaves another, which does not, waiting for its share of XLA's trials."""
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(joining, "on_a_cpu", lambda: platform == "cpu")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    try:
        with joined(HostsConfig(True)):
            assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_process_that_hangs_is_ended(second_of_two, exit_codes, capsys):
    with hosts.Watchdog(minutes=1e-4):
        assert exit_codes.get(timeout=PATIENCE) == 1
    assert "error: no update, evaluation or checkpoint ended within 0.0001 minutes" in capsys.readouterr().err


@pytest.mark.usefixtures("second_of_two")
def test_a_failure_of_the_system_is_told_to_the_others(monkeypatch):
    told = []
    gather = lambda failed: told.append(bool(failed)) or np.array([False, failed])  # noqa: E731
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)

    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        hosts.agree("open the log", fail)
    assert told == [True]


def test_a_barrier_waits_for_an_hour(monkeypatch):
    asked = {}
    barrier = "orbax.checkpoint.multihost.get_barrier_sync_fn"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(barrier, lambda: lambda **options: asked.update(options))
    hosts.wait_for_all("end")
    assert asked == {"key": "jaxprefix end", "timeout_ms": 3_600_000}


def test_who_has_joined_is_not_given_up(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(process_index=0)])
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    before = threading.enumerate()
    with joined(HostsConfig(True)):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        own = [timer for timer in timers if timer.function is hosts.end_at_once and timer not in before]
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


def test_a_setting_that_process_0_does_not_have_differs(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    first_says(monkeypatch, {"seed": 42})
    with pytest.raises(InputError, match="checkpoint_sha256: None on process 0, 'a' here"):
        hosts.check_same({"seed": 42, "checkpoint_sha256": "a"})
    with pytest.raises(InputError, match="seed: 42 on process 0, None here"):
        hosts.check_same({})


def test_a_wish_is_followed_one_update_later_by_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = Vote(make_mesh())
    go_on = Vote.GO_ON
    assert [vote.cast(wish) for wish in (go_on, 16, go_on, go_on)] == [go_on, go_on, 16, go_on]


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
