import errno
import fcntl
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from convert.errors import InputError
from jaxprefix import run_lock
from jaxprefix.run_lock import only_writer


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
    monkeypatch.setattr(run_lock, "_locked", Mock(side_effect=BlockingIOError))
    with pytest.raises(InputError, match="is in use by another process"), only_writer(tmp_path / "run"):
        pass


def in_use(folder):
    """Return by whom the refusal says that a folder is in use."""
    with pytest.raises(InputError, match="is in use by") as error, only_writer(folder):
        pass
    return str(error.value).split("is in use by ")[1]


def test_a_lock_names_its_owner_alone(tmp_path):
    (tmp_path / ".run.lock").write_text("process 1 on a host where it was killed\n")
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "run").startswith(f"process {os.getpid()} on ")


def test_a_lock_that_its_owner_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / ".run.lock"

    def removed_first(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "run")


def test_a_run_has_one_lock_under_all_its_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with only_writer(tmp_path / "run"):
        assert in_use(tmp_path / "link")
