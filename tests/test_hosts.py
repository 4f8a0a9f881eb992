"""Two processes with two devices each make one run: by the lines of docs/launch.md, and by SLURM's variables."""

import json
import os
import queue
import re
import shutil
import signal
import socket
import threading
import time
import types

import jax
import numpy as np
import pytest

from convert.errors import InputError, RunError
from convert.prefix import read_prefix
from jaxprefix import hosts
from jaxprefix.hosts import joined
from jaxprefix.launch import HostsConfig
from jaxprefix.train import train
from tests.pairs import TWO_DEVICES, documented_flags, ended, free_port, start_pair
from tests.runs import losses_of, metrics_of, run_config, start
from tests.tolerances import LOSS

IMPATIENT = "import jaxprefix.cli, jaxprefix.hosts as h; h.{} = 2; jaxprefix.cli.entry_point()"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 8 updates and what its processes printed."""
    config = run_config(tmp_path_factory.mktemp("pair"))
    codes, outputs, errors = ended(start_pair(config))
    assert codes == [0, 0], errors
    return config, outputs, errors


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_device(undisturbed, tmp_path):
    alone = run_config(tmp_path)
    train(alone)
    for split, n_points in (("train", 8), ("dev", 2)):
        losses = losses_of(undisturbed[0].run_dir, split)
        assert len(losses) == n_points
        np.testing.assert_allclose(losses, losses_of(alone.run_dir, split), rtol=LOSS)


@pytest.mark.slow
def test_the_first_process_writes_and_speaks_for_both(undisturbed):
    config, outputs, errors = undisturbed
    assert {path.name for path in config.run_dir.iterdir()} == {
        *("config.json", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "prefix")
    }
    assert [point["step"] for point in metrics_of(config.run_dir)] == list(range(1, 9))
    assert len(list((config.run_dir / "tensorboard").iterdir())) == 1
    assert "4 device(s)" in errors[0]
    assert "best prefix" in outputs[0]
    assert "best prefix" not in outputs[1]
    assert "loss" not in errors[1]


def slurm(process: int, job: str) -> dict[str, str]:
    """What srun tells a task of one node's two."""
    place = {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", **place}


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_resuming_ends_bit_identical(undisturbed, tmp_path):
    config = run_config(tmp_path)
    pair = start_pair(config)
    log = config.run_dir / "log.txt"
    while not (log.is_file() and "training: " in log.read_text()):  # from here on the first update is compiled
        assert all(process.poll() is None for process in pair)
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    codes, _, errors = ended(pair)
    assert codes == [143, 143], errors
    n_done = len(losses_of(config.run_dir))
    assert 1 <= n_done < 8
    assert (config.run_dir / "checkpoints" / str(n_done)).is_dir()
    assert f"stopped after update {n_done}; repeat the command with --resume to go on" in errors[0]

    job = str(free_port())  # SLURM's port is made from the job's number
    codes, _, errors = ended(
        [start(config, "--distributed", "--resume", **TWO_DEVICES, **slurm(i, job)) for i in range(2)]
    )
    assert codes == [0, 0], errors
    assert [point["step"] for point in metrics_of(config.run_dir)] == list(range(1, 9))
    np.testing.assert_array_equal(read_prefix(config.run_dir)[0], read_prefix(undisturbed[0].run_dir)[0])


@pytest.mark.slow
def test_what_fails_on_one_ends_both(tmp_path):
    config = run_config(tmp_path)
    first, second = documented_flags()
    codes, _, errors = ended([start(config, *first), start(config, *second, "--data_filepath", "nowhere.jsonl")])
    assert codes == [2, 2], errors
    assert "error: process 1 cannot read its inputs; its own error tells why" in errors[0]
    assert "error: nowhere.jsonl: no such data file" in errors[1]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_other_settings_or_data_make_no_run(tmp_path):
    config = run_config(tmp_path)
    first, last = (tmp_path / "data.jsonl"), config.data_filepath.read_text().splitlines(keepends=True)
    first.write_text("".join([*last[1:], last[0]]))
    one, other = documented_flags()
    pair = [start(config, *one), start(config, *other, "--data_filepath", str(first), "--seed", "7")]
    codes, _, errors = ended(pair)
    assert codes == [2, 2], errors
    assert "error: process 1 cannot have process 0's settings; its own error tells why" in errors[0]
    assert re.fullmatch(
        r"error: differs from process 0 in:\n  - seed: there 42, here 7\n  - data_sha256: there '\w+', here '\w+'\n",
        errors[1],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.slow
def test_an_earlier_run_that_one_cannot_see_ends_both(undisturbed, tmp_path):
    config, places = run_config(tmp_path), (undisturbed[0].run_dir, tmp_path / "nowhere")
    pair = [
        start(config, *flags, "--checkpoint_path", str(place), **TWO_DEVICES)
        for flags, place in zip(documented_flags(), places, strict=True)
    ]
    codes, _, errors = ended(pair)
    assert codes == [2, 2], errors
    assert "error: process 1 cannot find the earlier run; its own error tells why" in errors[0]
    assert "nowhere: no run, config.json is missing or damaged" in errors[1]


@pytest.mark.slow
def test_a_folder_of_runs_that_is_not_shared_ends_both_before_checkpoints_are_looked_at(undisturbed, tmp_path):
    """One has the run, the other has not: nothing of it is taken for damaged."""
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
    shutil.copytree(undisturbed[0].run_dir, tmp_path / "one" / "run")
    impatient = ("-c", IMPATIENT.format("VISIBLE_SECONDS"))
    pair = [
        start(run_config(tmp_path / place), *flags, "--resume", program=impatient, **TWO_DEVICES)
        for place, flags in zip(("one", "other"), documented_flags(), strict=True)
    ]
    codes, _, errors = ended(pair)
    assert codes == [2, 2], errors
    assert (
        "process 1 does not see what process 0 wrote; --output_dir must be a folder that all hosts share" in errors[1]
    )
    assert "damaged" not in errors[0] + errors[1]
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["run"]


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path):
    config = run_config(tmp_path)
    pair = start_pair(config, program=("-c", IMPATIENT.format("HEARTBEAT_SECONDS")))
    while not (config.run_dir / "log.txt").is_file():
        assert all(process.poll() is None for process in pair)
        time.sleep(0.05)
    pair[1].kill()
    codes, _, errors = ended(pair, timeout=30)
    assert codes[0] in (1, -signal.SIGABRT)
    assert "another task died" in errors[0]


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer(tmp_path):
    _, second = documented_flags()
    process = start(run_config(tmp_path), *second, program=("-c", IMPATIENT.format("JOIN_SECONDS")))
    [code], _, [error] = ended([process])
    assert code == 2
    assert re.fullmatch(r"error: process 0, or some other, did not join at 127.0.0.1:\d+ within 2 seconds\n", error)


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
    with pytest.raises(InputError, match=r"the other processes cannot be joined: .* must be called before any JAX"):
        join(free_port(), process_id=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "many processes need --coordinator_address and --process_id, too"),
        ({"distributed": True, "process_id": 1}, "--distributed finds what"),
        ({"coordinator_address": "node0"}, "--coordinator_address is host:port, found 'node0'"),
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


@pytest.mark.usefixtures("second_of_two")
def test_settings_that_differ_are_named(monkeypatch):
    there = json.dumps({"seed": 42, "suffix": " 😃", "mesh": None}).encode()
    padded = np.frombuffer(there.ljust(hosts.SETTINGS_BYTES, b"\0"), np.uint8)
    monkeypatch.setattr(hosts, "first_says", lambda own: padded)
    hosts.check_same({"seed": 42, "suffix": " 😃", "mesh": None})
    with pytest.raises(InputError, match=r"differs from process 0 in:\n  - seed: there 42, here 7$"):
        hosts.check_same({"seed": 7, "suffix": " 😃", "mesh": None})


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
    message = "all processes need as many devices; process 0 has 2, process 1 has 1"
    with pytest.raises(InputError, match=message), joined(HostsConfig(True)):
        pass


@pytest.mark.parametrize(
    ("set_before", "proxy"),
    [({}, None), ({"http_proxy": "p"}, ""), ({"https_proxy": "p", "no_proxy": "a"}, ""), ({"grpc_proxy": "p"}, "")],
)
def test_a_proxy_is_for_the_rest_of_the_world(monkeypatch, set_before, proxy):
    environment = {**set_before}
    monkeypatch.setattr(os, "environ", environment)
    hosts._bypass_proxy()
    assert environment.get("grpc_proxy") == proxy


def test_tasks_of_slurm_that_were_not_joined_are_told(monkeypatch, capsys):
    for name, value in slurm(0, "7").items():  # as in the batch script itself, too
        monkeypatch.setenv(name, value)
    with joined(HostsConfig()):
        assert not capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with joined(HostsConfig()):
        assert "WARNING: task 0 of SLURM's 2 makes a run of its own; --distributed" in capsys.readouterr().err


@pytest.mark.usefixtures("second_of_two")
def test_the_own_error_is_told_though_the_others_are_too_slow(monkeypatch):
    def wait_for_all(name):
        raise RunError("not all processes came to it")

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
    with pytest.raises(RunError, match="load the base: not all processes came to it within 3600 seconds"):
        hosts.wait_for_all("load the base")


def test_one_that_failed_alone_leaves_with_its_own_code(second_of_two, exit_codes, monkeypatch):
    monkeypatch.setattr(hosts, "LEAVE_SECONDS", 0)
    hosts.leave_soon(2)  # not joined yet: nothing to wait for
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    hosts.leave_soon(1)
    assert exit_codes.get(timeout=10) == 1


def test_no_cluster_is_found(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="--distributed: finds no cluster that it knows"), joined(HostsConfig(True)):
        pass


def test_nobody_joins(exit_codes, capsys):
    threading.Thread(target=hosts._give_up, args=[HostsConfig(False, "node0:1", 2, 0)], daemon=True).start()
    assert exit_codes.get(timeout=10) == 2
    assert capsys.readouterr().err == "error: some of the other processes did not join at node0:1 within 120 seconds\n"


def test_a_process_that_hangs_is_ended(second_of_two, exit_codes, capsys):
    with hosts.Watchdog(minutes=1e-4):
        assert exit_codes.get(timeout=10) == 1
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
    with joined(HostsConfig(True)):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        own = [timer for timer in timers if timer.function is hosts._give_up]
        assert all(timer.finished.is_set() for timer in own), "one would end this program in two minutes"
