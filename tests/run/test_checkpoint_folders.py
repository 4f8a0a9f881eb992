"""Which folders are checkpoints, what reading one takes, and who changes what lies there."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxprefix.run.checkpoint import Checkpoints, newest_checkpoint


def test_reading_needs_nothing_of_orbax_and_is_silent(finished, tmp_path, capfd):
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    os.truncate(run / "checkpoints" / "8" / "_CHECKPOINT_METADATA", 100)
    with Checkpoints(run / "checkpoints", writing=False) as checkpoints:
        assert checkpoints.read()[1]["n_done"] == 8
        assert not checkpoints._in_use
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "make"), [*((name, Path.mkdir) for name in ("9" * 30, "１２", "²", "012")), ("12", Path.touch)]
)
def test_a_folder_of_another_name_and_a_file_are_no_checkpoints(finished, tmp_path, name, make):
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    make(run / "checkpoints" / name)
    assert newest_checkpoint(run / "checkpoints") == 8
    for writing in (False, True):
        with Checkpoints(run / "checkpoints", writing) as checkpoints:
            assert checkpoints.read()[1]["n_done"] == 8


def test_the_newest_is_the_one_of_the_largest_number(tmp_path):
    for name in ("9", "10"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == 10


def test_the_largest_count_of_updates_is_a_checkpoint(tmp_path):
    (tmp_path / str(2**31 - 1)).mkdir()
    assert newest_checkpoint(tmp_path) == 2**31 - 1


def test_of_several_processes_the_first_alone_puts_a_damaged_one_aside(finished, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(finished.run_dir, tmp_path / "run") / "checkpoints"
    (folder / "8" / "progress" / "progress.json").unlink()
    monkeypatch.setattr("jaxprefix.run.checkpoint.is_first", lambda: False)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.read()[1]["n_done"] == 4
    assert {path.name for path in folder.iterdir()} == {"4", "8"}
    assert "damaged" not in capfd.readouterr().err


def test_all_processes_read_the_checkpoint_that_the_first_one_sees(finished, monkeypatch):
    monkeypatch.setattr("jaxprefix.run.checkpoint.broadcast_from_first", lambda _: np.int32([4, -1]))
    with Checkpoints(finished.run_dir / "checkpoints", writing=False) as checkpoints:
        assert checkpoints.read()[1]["n_done"] == 4


def test_an_array_may_lie_in_any_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"array": array}, {})
        checkpoints.finish()
        np.testing.assert_array_equal(checkpoints.read()[0]["array"], array)
