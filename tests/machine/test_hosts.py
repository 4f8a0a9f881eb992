"""What one process of several does once they have joined: agreeing, leaving, and what it says."""

import json
import signal
import threading
import types
from pathlib import Path
from signal import Signals
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from convert.errors import InputError, RunError
from jaxprefix.config import HostsConfig
from jaxprefix.machine import hosts
from jaxprefix.machine.hosts import Verdict, Vote
from jaxprefix.run.faults import stop_on_signal
from jaxprefix.sharding import make_mesh
from tests.runs import PATIENCE, run_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "a run of several processes also needs --coordinator_address and --process_id"),
        ({"distributed": True, "process_id": 1}, "--distributed detects"),
        ({"coordinator_address": "node0"}, "--coordinator_address must be host:port, found 'node0'"),
        ({"coordinator_address": "", "num_processes": 2, "process_id": 0}, "must be host:port, found ''"),
        ({"coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, "--num_processes must be positive, is 0"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "below --num_processes, is 2"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": -1}, "below --num_processes, is -1"),
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


def test_the_others_failure_is_told_here(second_of_two, monkeypatch):
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda failed: np.array([True, failed]))
    with pytest.raises(InputError, match="process 0 cannot read its inputs; its own error tells why"):
        hosts.agree("read its inputs", lambda: "read")


def test_what_is_so_on_one_process_is_so_anywhere(second_of_two, monkeypatch):
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda flag: np.array([True, flag]))
    assert hosts.anywhere(False)


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


@pytest.mark.usefixtures("second_of_two")
def test_a_mark_that_a_killed_run_left_does_not_show_that_a_folder_is_shared(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(hosts, "wait_until_visible", seen.append)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda number: number)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda failed: np.array([failed]))
    for _ in range(2):
        hosts.check_shared(tmp_path)
    assert len({path.name for path in seen}) == 2


def test_a_run_of_one_process_asks_and_waits_for_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", Mock(side_effect=AssertionError))
    hosts.wait_for_all("end")
    hosts.check_shared(tmp_path / "nowhere")
    before = threading.enumerate()
    with hosts.Watchdog(minutes=30.0):
        assert threading.enumerate() == before, "nor does it watch them"


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("kind", [RunError, jax.errors.JaxRuntimeError])
def test_the_own_error_is_told_though_the_others_are_too_slow_or_gone(monkeypatch, kind):
    def wait_for_all(name):
        raise kind("not all processes reached this step")

    def fail():
        raise InputError("no such file")

    monkeypatch.setattr(hosts, "wait_for_all", wait_for_all)
    with pytest.raises(InputError, match="no such file"):
        hosts.agree("read its inputs", fail)
    with pytest.raises(kind, match="not all processes"):
        hosts.agree("read its inputs", lambda: "read")


def test_one_that_is_slow_for_too_long(monkeypatch):
    def sync(key, timeout_ms):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: sync)
    with pytest.raises(RunError, match="load the base: not all processes reached this step within 3600 seconds"):
        hosts.wait_for_all("load the base")


def test_one_that_is_gone_is_not_taken_for_slow(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNAVAILABLE: another task died")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: Mock(side_effect=gone))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another task died"):
        hosts.wait_for_all("load the base")


def test_one_that_failed_alone_leaves_with_its_own_code(second_of_two, exit_codes, monkeypatch):
    monkeypatch.setattr(hosts, "LEAVE_SECONDS", 0)
    hosts.leave_soon(1)  # not joined yet: nothing to wait for
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", Mock(side_effect=AssertionError))  # where a platform does not work
    hosts.leave_soon(2)
    assert exit_codes.get(timeout=PATIENCE) == 2


def test_a_process_that_hangs_is_ended(second_of_two, exit_codes, capsys):
    with hosts.Watchdog(minutes=1e-4):
        assert exit_codes.get(timeout=PATIENCE) == 1
    assert "error: no start, update, evaluation or checkpoint ended within 0.0001 minutes" in capsys.readouterr().err


@pytest.mark.usefixtures("second_of_two")
def test_a_process_is_ended_that_hangs_for_so_many_minutes_not_one_that_goes_on(exit_codes, monkeypatch):
    """By a clock that the test sets, and at which the watchdog goes on looking."""
    now, looked = [0.0], threading.Event()

    def monotonic():
        if threading.current_thread() is not threading.main_thread():
            looked.set()
        return now[0]

    monkeypatch.setattr(hosts, "time", types.SimpleNamespace(monotonic=monotonic))
    with hosts.Watchdog(minutes=0.01) as watchdog:
        for _ in range(3):
            now[0] += 0.5
            for _ in range(2):  # a look that follows another shows that this one ended nothing
                looked.clear()
                assert looked.wait(PATIENCE)
            watchdog.still_going()
        now[0] += 0.7
        assert exit_codes.get(timeout=PATIENCE) == 1


@pytest.mark.usefixtures("second_of_two")
def test_nothing_watches_a_run_that_has_ended():
    before = threading.enumerate()
    with hosts.Watchdog(minutes=30.0):
        [watching] = set(threading.enumerate()) - set(before)
    watching.join(PATIENCE)
    assert not watching.is_alive()


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


def test_a_save_waits_for_all_unless_it_has_failed_here(monkeypatch):
    waited = []
    barrier = "orbax.checkpoint.multihost.get_barrier_sync_fn"
    monkeypatch.setattr(barrier, lambda: lambda **options: waited.append(options))
    hosts.barrier_unless_failed(key="saved", timeout_ms=7)
    try:
        raise OSError
    except OSError:
        hosts.barrier_unless_failed(key="failed", timeout_ms=7)
    assert waited == [{"key": "saved", "timeout_ms": 7}]


def test_a_barrier_waits_for_an_hour(monkeypatch):
    asked = {}
    barrier = "orbax.checkpoint.multihost.get_barrier_sync_fn"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(barrier, lambda: lambda **options: asked.update(options))
    hosts.wait_for_all("end")
    assert asked == {"key": "jaxprefix end", "timeout_ms": 3_600_000}


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_process_that_waits_for_others(monkeypatch):
    """Python would take notice only after the barrier; in the loop a signal is noted, and stays so."""
    seen = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    barrier = "orbax.checkpoint.multihost.get_barrier_sync_fn"
    monkeypatch.setattr(barrier, lambda: lambda **_: seen.append(signal.getsignal(signal.SIGINT)))
    hosts.wait_for_all("load the base")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with stop_on_signal(run_config(Path())):
        noting = signal.getsignal(signal.SIGINT)
        hosts.wait_for_all("save a checkpoint")
        assert signal.getsignal(signal.SIGINT) is noting
    assert seen == [signal.SIG_DFL, noting]


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
    go_on, stop, save = Verdict(), Verdict(stop=Signals.SIGTERM), Verdict(save=True)
    assert [vote.cast(wish) for wish in (go_on, stop, save, go_on, go_on)] == [go_on, go_on, stop, save, go_on]


def test_an_address_has_a_host():
    with pytest.raises(InputError, match="--coordinator_address must be host:port, found ':1234'"):
        HostsConfig(coordinator_address=":1234", num_processes=2, process_id=0)


@pytest.mark.parametrize("missing", ["coordinator_address", "num_processes", "process_id"])
def test_each_of_several_processes_needs_all_three_flags(missing):
    flags = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
    del flags[missing]
    with pytest.raises(InputError, match=rf"a run of several processes also needs --{missing}$"):
        HostsConfig(**flags)


@pytest.mark.parametrize("port", [0, 2**16])
def test_a_port_that_there_is_not(port):
    with pytest.raises(InputError, match=f"must be host:port, found 'a:{port}'"):
        HostsConfig(coordinator_address=f"a:{port}", num_processes=2, process_id=0)
