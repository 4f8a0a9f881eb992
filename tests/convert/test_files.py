"""Files that appear whole or not at all."""

import errno
import os
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.errors import InputError
from convert.files import filling, replacing, save_safetensors


def interrupted_after(write, text):
    write(text)
    raise KeyboardInterrupt


def test_a_file_takes_its_place_when_it_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(file):
        assert not (tmp_path / "a").exists(), "it would be there before it is whole"
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    assert synced == [(tmp_path / "a").stat().st_ino]
    assert (tmp_path / "a").read_text() == "new"


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        interrupted_after(temporary.write_text, "half of")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_cannot_be_filled_is_as_it_was(tmp_path, exists):
    folder = tmp_path / "a" if exists else tmp_path / "b"
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), filling(folder):
        interrupted_after((folder / "1.tmp").write_text, "half of")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not any((tmp_path / "a").iterdir())


def test_what_a_killed_copy_left_is_in_nobodys_way(tmp_path, monkeypatch):
    (tmp_path / "1.tmp").touch()
    (tmp_path / "adapter_config.json.tmp").touch()
    monkeypatch.chdir(tmp_path)
    with filling(tmp_path.relative_to(tmp_path)):
        (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is not an empty folder"), filling(tmp_path):
        pass


def test_what_file_managers_leave_does_not_count_and_stays(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".nfs0001").touch()
    (tmp_path / "._.DS_Store").touch()
    with pytest.raises(KeyboardInterrupt), filling(tmp_path):
        interrupted_after((tmp_path / "1.tmp").write_text, "half of")
    with filling(tmp_path):
        (tmp_path / "model.safetensors").touch()
    names = {".DS_Store", ".ipynb_checkpoints", ".nfs0001", "._.DS_Store", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_disk_that_refuses_modes_takes_files(tmp_path, monkeypatch):
    """As some mounted by WSL 2 or Docker Desktop do."""
    wanted = tmp_path / "wanted"
    wanted.touch()
    monkeypatch.setattr(os, "chmod", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
    save_safetensors({"a": np.ones(2)}, tmp_path / "a", {})
    assert [*load_file(tmp_path / "a")["a"]] == [1, 1]
    monkeypatch.undo()
    save_safetensors({"a": np.ones(2)}, tmp_path / "b", {})
    assert (tmp_path / "b").stat().st_mode == wanted.stat().st_mode, "readable for all, unlike the library's files"


def test_a_strangers_unfinished_file_is_not_removed(tmp_path):
    (tmp_path / "thesis.tmp").write_text("hours of work")
    with pytest.raises(InputError, match="is not an empty folder"), filling(tmp_path):
        pass
    assert (tmp_path / "thesis.tmp").read_text() == "hours of work"


def test_what_fails_before_there_is_a_file_is_told_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="a fault"), replacing(tmp_path / "a"):
        raise ValueError("a fault")


def test_a_file_whose_name_begins_as_an_unfinished_ones_is_not_removed(tmp_path):
    (tmp_path / "1.tmp.txt").write_text("hours of work")
    with pytest.raises(InputError, match="is not an empty folder"), filling(tmp_path):
        pass
    assert (tmp_path / "1.tmp.txt").read_text() == "hours of work"


@pytest.mark.parametrize("name", ["1.tmp", "adapter_config.json.tmp", "adapter_model.safetensors.tmp"])
def test_what_a_killed_conversion_left_is_removed(tmp_path, name):
    (tmp_path / name).touch()
    with filling(tmp_path):
        assert not any(tmp_path.iterdir())
