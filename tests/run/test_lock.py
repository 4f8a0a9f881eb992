import dataclasses
import errno
import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

import jaxprefix.train as train_module
from convert.errors import InputError
from jaxprefix.run import lock
from jaxprefix.run.lock import only_run, only_writer
from jaxprefix.train import train
from tests.runs import run_config


def test_a_disk_that_is_full_at_the_start_keeps_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with (
        pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"),
        only_writer(tmp_path / "run"),
    ):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/run", "file: cannot be written (Not a directory)"),
        ("n" * 250, ".lock: cannot be written (File name too long)"),
    ],
)
def test_a_lock_that_cannot_be_made(tmp_path, name, message):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=re.escape(message)), only_writer(tmp_path / name):
        pass


def test_a_run_that_fails_leaves_no_lock(tmp_path):
    with pytest.raises(ValueError, match="a fault"), only_writer(tmp_path / "run"):
        raise ValueError("a fault")
    assert not any(tmp_path.iterdir())


def test_the_working_folder_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with only_writer(Path()):
        assert (tmp_path / ".run.lock").is_file()


def test_an_owner_who_leaves_at_that_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_locked", Mock(side_effect=BlockingIOError))
    with pytest.raises(InputError, match="is in use by another process"), only_writer(tmp_path / "run"):
        pass


def test_an_owner_who_has_not_yet_said_its_name(tmp_path, monkeypatch):
    (tmp_path / ".run.lock").touch()
    monkeypatch.setattr(lock, "_locked", Mock(side_effect=BlockingIOError))
    with pytest.raises(InputError, match="is in use by another process; wait"), only_writer(tmp_path / "run"):
        pass


def test_a_lock_in_a_folder_that_has_become_read_only_stays_and_is_told_to_nobody(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, only_writer(tmp_path / "run"):
        patch.setattr(Path, "unlink", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "run")


def test_a_host_that_has_crashed_is_waited_for(tmp_path, monkeypatch, capsys):
    """A file server keeps the locks of such a host for a while."""
    monkeypatch.setattr(time, "sleep", slept := Mock())
    (tmp_path / ".run.lock").write_text("process 7 on elsewhere\n")
    file = (tmp_path / "lock").open("w")
    monkeypatch.setattr(lock, "_locked", Mock(side_effect=[BlockingIOError, BlockingIOError, file]))
    with only_writer(tmp_path / "run"):
        told = f"{tmp_path}/.run.lock is held by process 7 on elsewhere; waiting up to 120 s, since that host may have"
        assert capsys.readouterr().err.startswith(told)
    assert slept.call_count == 2


def test_a_host_that_holds_a_lock_for_long_has_not_crashed(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", Mock())
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.01)
    (tmp_path / ".run.lock").write_text("process 7 on elsewhere\n")
    monkeypatch.setattr(lock, "_locked", Mock(side_effect=BlockingIOError))
    with pytest.raises(InputError, match="is in use by process 7 on elsewhere; wait"), only_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of_or_refused(tmp_path, monkeypatch, capsys, number):
    """TensorStore needs some to write checkpoints; a run would end at its first."""
    for kind in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, kind, Mock(side_effect=OSError(number, os.strerror(number))))
    with only_writer(tmp_path / "run", checkpoints=False):
        assert capsys.readouterr().err.startswith(f"WARNING: {tmp_path}: does not support file locks")
    told = f"{tmp_path}: does not support file locks, which checkpoints need; choose one on another disk"
    with pytest.raises(InputError, match=told), only_writer(tmp_path / "run"):
        pass
    assert not any(tmp_path.iterdir())


def test_where_there_is_but_one_kind_of_lock_that_one_is_used(tmp_path):
    """The system lets a process take it again, but not another one."""
    program = """
import errno, fcntl, sys
from pathlib import Path
from jaxprefix.run.lock import only_writer
def none(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = none
with only_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert f"is in use by process {first.pid} on " in second.stderr
        assert (tmp_path / ".run.lock").exists()
        first.communicate("")
    assert first.returncode == 0


def in_use(folder):
    """Return by whom the refusal says that a folder is in use."""
    with pytest.raises(InputError, match="is in use by") as error, only_writer(folder):
        pass
    return str(error.value).split("is in use by ")[1]


def test_a_lock_names_its_owner_alone(tmp_path):
    (tmp_path / ".run.lock").write_text("process 1 on a host where it was killed\n")
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "run").startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_that_is_removed_or_made_anew_meanwhile_is_not_taken(tmp_path, monkeypatch, made_anew):
    """Else each of two processes would hold the lock of a file of its own."""
    flock, path = fcntl.flock, tmp_path / ".run.lock"

    def removed_first(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        if made_anew:
            path.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "run")


def test_a_run_that_writes_locks_its_folder_and_asks_whether_all_see_where_it_lies(tmp_path, monkeypatch):
    shared, config = [], run_config(tmp_path)
    monkeypatch.setattr(lock, "check_shared", shared.append)
    with only_run(config):
        assert in_use(config.run_dir)
    assert shared == [tmp_path]
    with only_run(dataclasses.replace(config, save_log=False, save_model=False)):
        assert not any(tmp_path.iterdir())
    assert len(shared) == 1


def test_a_run_has_one_lock_under_all_its_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "link")


def test_a_run_without_checkpoints_needs_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda file: False)
    with only_run(run_config(tmp_path, save_model=False)):
        pass
    told = "does not support file locks, which checkpoints need"
    with pytest.raises(InputError, match=told), only_run(run_config(tmp_path)):
        pass


def test_a_host_that_may_have_crashed_is_waited_for_no_longer_than_told(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    (tmp_path / ".run.lock").write_text("process 7 on elsewhere\n")
    monkeypatch.setattr(lock, "_locked", locked := Mock(side_effect=[BlockingIOError] * 200))
    with pytest.raises(InputError, match="is in use by process 7 on elsewhere"), only_writer(tmp_path / "run"):
        pass
    assert locked.call_count == 122
    assert capsys.readouterr().err.count("waiting up to 120 s") == 1


def test_a_run_in_use_is_refused_before_the_base_model_is_loaded(finished, monkeypatch):
    monkeypatch.setattr(train_module, "load_model", lambda *_: pytest.fail("loaded"))
    with (
        only_writer(finished.run_dir),
        pytest.raises(InputError, match=r"is in use by process \d+ on .*\.run\.lock"),
    ):
        train(run_config(finished.output_dir, resume=True))


def test_the_lock_goes_with_its_owner(tmp_path):
    program = "import sys, os, pathlib; from jaxprefix.run.lock import only_writer as o\n"
    program += "with o(pathlib.Path(sys.argv[1])): print('held', flush=True); os.read(0, 1); os._exit(9)"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        with (
            pytest.raises(InputError, match=f"is in use by process {owner.pid} on "),
            only_writer(tmp_path / "run"),
        ):
            pass
        owner.communicate(b"x")
    with only_writer(tmp_path / "run"):
        pass
    assert not any(tmp_path.iterdir())
