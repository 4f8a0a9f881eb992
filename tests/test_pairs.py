"""Two processes with two devices each make one run: by the lines of docs/launch.md, and by SLURM's variables."""

import contextlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from convert.prefix import write_adapter
from jaxprefix.train import train
from tests.markers import ON_ANOTHER_HOST, needs_another_host
from tests.pairs import TWO_DEVICES, documented_flags, ended, free_port, slurm, start_pair
from tests.runs import PATIENCE, assert_same_end, losses_of, metrics_of, run_config, start
from tests.tolerances import LOSS

LONG = {"n_epochs": 5}  # of four updates
IMPATIENT = "import jaxprefix.cli, jaxprefix.{0}; jaxprefix.{0}.{1} = 2; jaxprefix.cli.entry_point()"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 20 updates and what its processes printed."""
    config = run_config(tmp_path_factory.mktemp("pair"), **LONG)
    codes, outputs, errors = ended(start_pair(config))
    assert codes == [0, 0], errors
    return config, outputs, errors


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_device(undisturbed, tmp_path):
    alone = run_config(tmp_path, **LONG)
    train(alone)
    for split, n_points in (("train", 20), ("dev", 5)):
        losses = losses_of(undisturbed[0].run_dir, split)
        assert len(losses) == n_points
        np.testing.assert_allclose(losses, losses_of(alone.run_dir, split), rtol=LOSS)


@pytest.mark.slow
@needs_another_host
def test_two_hosts_are_one_mesh(undisturbed, tmp_path):
    """JAX knows hosts apart by the id of their boot, and takes devices of several for slices of a TPU pod."""
    (boot := tmp_path / "boot_id").write_text("11111111-2222-3333-4444-555555555555\n")
    config = run_config(tmp_path, **LONG)
    hosts = [(), (*ON_ANOTHER_HOST, str(boot))]
    pair = [
        start(config, *flags, within=host, **TWO_DEVICES) for host, flags in zip(hosts, documented_flags(), strict=True)
    ]
    codes, _, errors = ended(pair)
    assert codes == [0, 0], errors
    assert "4 device(s)" in errors[0]
    assert_same_end(undisturbed[0], config)


@pytest.mark.slow
def test_resuming_gathers_no_state_from_all_processes(undisturbed, tmp_path):
    """`jax.device_put` of an array to several hosts does, to compare it: many times its size on each device."""
    shutil.copytree(undisturbed[0].run_dir, tmp_path / "run")
    program = """
import jax.experimental.multihost_utils as jax_hosts, jaxprefix.cli, numpy
compare = jax_hosts.assert_equal
def told(array, *arguments, **options):
    print(f"compares {numpy.size(array)} numbers", flush=True)
    compare(array, *arguments, **options)
jax_hosts.assert_equal = told
jaxprefix.cli.entry_point()
"""
    config = run_config(tmp_path, **LONG | {"n_epochs": LONG["n_epochs"] + 1})
    codes, outputs, errors = ended(start_pair(config, "--resume", program=("-c", program)))
    assert codes == [0, 0], errors
    assert max(map(int, re.findall(r"compares (\d+) numbers", "".join(outputs))), default=0) < 100


@pytest.mark.slow
def test_the_first_process_writes_and_speaks_for_both(undisturbed):
    config, outputs, errors = undisturbed
    assert {path.name for path in config.run_dir.iterdir()} == {
        *("config.json", "metrics.jsonl", "log.txt", "tensorboard", "checkpoints", "prefix")
    }
    assert [point["step"] for point in metrics_of(config.run_dir)] == list(range(1, 21))
    assert len(list((config.run_dir / "tensorboard").iterdir())) == 1
    assert "4 device(s)" in errors[0]
    assert "best prefix" in outputs[0]
    assert "best prefix" not in outputs[1]
    assert "loss" not in errors[1]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_resuming_ends_bit_identical(undisturbed, tmp_path):
    config = run_config(tmp_path, **LONG)
    pair = start_pair(config)
    log = config.run_dir / "log.txt"
    while not (log.is_file() and "training: " in log.read_text()):  # from here on the first update is compiled
        assert all(process.poll() is None for process in pair)
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    codes, _, errors = ended(pair)
    assert codes == [143, 143], errors
    n_done = len(losses_of(config.run_dir))
    assert 1 <= n_done < 20
    assert (config.run_dir / "checkpoints" / str(n_done)).is_dir()
    assert f"stopped after update {n_done}; repeat the command with --resume to go on" in errors[0]

    job = str(free_port())  # SLURM's port is made from the job's number
    codes, _, errors = ended(
        [start(config, "--distributed", "--resume", **TWO_DEVICES, **slurm(i, job)) for i in range(2)]
    )
    assert codes == [0, 0], errors
    assert [point["step"] for point in metrics_of(config.run_dir)] == list(range(1, 21))
    assert_same_end(config, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "others", "own"),
    [
        (("--data_filepath", "nowhere.jsonl"), "read its inputs", "nowhere.jsonl: no such data file"),
        (("--mesh", "data=3"), "make its mesh", "--mesh data=3"),
    ],
)
def test_what_fails_on_one_ends_both(tmp_path, flags, others, own):
    config = run_config(tmp_path)
    codes, _, errors = ended(start_pair(config, each=((), flags)))
    assert codes == [2, 2], errors
    assert f"error: process 1 cannot {others}; its own error tells why" in errors[0]
    assert f"error: {own}" in errors[1]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_other_settings_or_data_make_no_run(tmp_path):
    config = run_config(tmp_path)
    reordered, lines = tmp_path / "data.jsonl", config.data_filepath.read_text().splitlines(keepends=True)
    reordered.write_text("".join([*lines[1:], lines[0]]))
    codes, _, errors = ended(start_pair(config, each=((), ("--data_filepath", str(reordered), "--seed", "7"))))
    assert codes == [2, 2], errors
    assert "error: process 1 cannot match process 0's settings; its own error tells why" in errors[0]
    assert re.fullmatch(
        r"error: the settings here differ from those of process 0:\n  - seed: 42 on process 0, 7 here\n"
        r"  - data_sha256: '\w+' on process 0, '\w+' here\n",
        errors[1],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.slow
def test_an_earlier_run_that_one_cannot_see_ends_both(undisturbed, tmp_path):
    earlier = (str(undisturbed[0].run_dir),), (str(tmp_path / "nowhere"),)
    codes, _, errors = ended(start_pair(run_config(tmp_path, **LONG), "--checkpoint_path", each=earlier))
    assert codes == [2, 2], errors
    assert "error: process 1 cannot find the earlier run; its own error tells why" in errors[0]
    assert "nowhere: no such file or folder" in errors[1]


@pytest.mark.slow
def test_processes_that_would_start_from_different_prefixes_change_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0].run_dir, tmp_path / "run")
    config, before = run_config(tmp_path, **LONG), sorted((tmp_path / "run").rglob("*"))
    for number in range(2):
        write_adapter(tmp_path / str(number), np.full((10, 3 * 2 * 64), number, np.float32), 3, 4, {})
    flags = ("--overwrite", "--prefix_hidden_dim", "0", "--checkpoint_path")
    codes, _, errors = ended(start_pair(config, *flags, each=((str(tmp_path / "0"),), (str(tmp_path / "1"),))))
    assert codes == [2, 2], errors
    assert "error: process 1 cannot start from process 0's encoder; its own error tells why" in errors[0]
    assert "the encoder to start from: " in errors[1]
    assert sorted((tmp_path / "run").rglob("*")) == before


FULL = """
import errno, jax, jaxprefix.cli
from orbax.checkpoint._src.checkpointers import async_checkpointer as orbax
commit = orbax._background_wait_for_commit_futures
def on_a_disk_of_its_own(*arguments, **options):
    if jax.process_index() == 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    commit(*arguments, **options)
orbax._background_wait_for_commit_futures = on_a_disk_of_its_own
jaxprefix.cli.entry_point()
"""


@pytest.mark.slow
def test_a_save_that_fails_on_one_ends_both(tmp_path):
    pair = start_pair(run_config(tmp_path), program=("-c", FULL))
    codes, _, errors = ended(pair, timeout=90)  # Orbax by itself: 1200
    assert codes[0] == 1, errors
    assert codes[1] in (1, -signal.SIGABRT)
    assert "cannot be saved (No space left on device)" in errors[0]


@pytest.mark.slow
def test_a_folder_of_runs_that_is_not_shared_ends_both_before_checkpoints_are_looked_at(undisturbed, tmp_path):
    """One has the run, the other has not: nothing of it is taken for damaged."""
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
    shutil.copytree(undisturbed[0].run_dir, tmp_path / "one" / "run")
    impatient = ("-c", IMPATIENT.format("machine.hosts", "VISIBLE_SECONDS"))
    config, other = run_config(tmp_path / "one", **LONG), ("--output_dir", str(tmp_path / "other"))
    codes, _, errors = ended(start_pair(config, "--resume", each=((), other), program=impatient))
    assert codes == [2, 2], errors
    assert (
        "process 1 does not see what process 0 wrote; --output_dir must be a folder that all hosts share" in errors[1]
    )
    assert "damaged" not in errors[0] + errors[1]
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["run"]


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path):
    config = run_config(tmp_path)
    pair = start_pair(config, program=("-c", IMPATIENT.format("machine.joining", "HEARTBEAT_SECONDS")))
    while not (config.run_dir / "log.txt").is_file():
        assert all(process.poll() is None for process in pair)
        time.sleep(0.05)
    pair[1].kill()
    codes, _, errors = ended(pair, timeout=90)
    assert codes[0] in (1, -signal.SIGABRT)
    assert "another task died" in errors[0]


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_process_that_waits_for_others_to_join(tmp_path):
    first, _ = documented_flags()
    with start(run_config(tmp_path), *first) as process:
        port = int(first[first.index("--coordinator_address") + 1].rpartition(":")[2])
        while True:  # until it listens
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) in (-signal.SIGINT, 130)


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer(tmp_path):
    _, second = documented_flags()
    process = start(run_config(tmp_path), *second, program=("-c", IMPATIENT.format("machine.joining", "JOIN_SECONDS")))
    [code], _, [error] = ended([process])
    assert code == 2
    told = r"error: process 0 or another process did not join at 127.0.0.1:\d+ within 2 seconds"
    assert re.fullmatch(told + r"; has each its own --process_id\?\n", error)
