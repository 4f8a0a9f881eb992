"""What --overwrite deletes of an earlier run, and what it leaves."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from convert.errors import InputError
from jaxprefix.run import folder
from jaxprefix.run.folder import check_run_folder, open_run_folder
from tests.base_folders import make_base_folder
from tests.runs import begin, check_resumed, run_config


def test_an_overwriting_that_was_cut_short_can_be_repeated(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    begin(config)
    (config.run_dir / "checkpoints").mkdir()
    (config.run_dir / "zz.txt").touch()
    again = dataclasses.replace(config, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_run_folder(again, {"data_sha256": ""})
    open_run_folder(again, {"data_sha256": ""})
    assert [path.name for path in config.run_dir.iterdir()] == ["config.json"]


def test_a_base_model_in_the_run_is_not_overwritten(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    base = make_base_folder(config.run_dir / "base")
    changed = dataclasses.replace(config, overwrite=True, pretrained_model_dir=str(base))
    with pytest.raises(InputError, match="--overwrite would delete it"):
        check_run_folder(changed, {})


def test_a_run_is_not_overwritten_where_its_data_lies_by_another_path(tmp_path, monkeypatch):
    """As on disks that ignore case, or that are mounted twice: no path is resolved to the other one."""
    config = run_config(tmp_path)
    begin(config)
    (tmp_path / "view").symlink_to(config.run_dir)
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    data = shutil.copy(config.data_filepath, config.run_dir)
    changed = dataclasses.replace(config, overwrite=True, data_filepath=tmp_path / "view" / Path(data).name)
    with pytest.raises(InputError, match="--overwrite would delete it"):
        check_run_folder(changed, {})


def test_of_a_link_in_a_run_that_is_overwritten_the_link_goes(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "precious").touch()
    (config.run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    begin(dataclasses.replace(config, overwrite=True))
    assert [path.name for path in config.run_dir.iterdir()] == ["config.json"]
    assert (tmp_path / "disk" / "precious").is_file()


def test_overwriting_goes_on_where_a_file_vanishes_with_another(tmp_path, monkeypatch):
    """As attributes do on the network disks and exFAT of macOS: ._NAME beside NAME."""
    config, unlink = run_config(tmp_path), Path.unlink
    begin(config)
    for name in ("log.txt", "._log.txt", "._config.json"):
        (config.run_dir / name).touch()

    def with_companion(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        unlink(path.with_name(f"._{path.name}"), missing_ok=True)

    monkeypatch.setattr(Path, "unlink", with_companion)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(path.glob("*"), reverse=True)))
    begin(dataclasses.replace(config, overwrite=True))
    assert [path.name for path in config.run_dir.iterdir()] == ["config.json"]


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("n_removed", range(4))
def test_overwriting_that_is_cut_short_leaves_a_run_that_can_be_resumed(tmp_path, monkeypatch, n_removed, last_first):
    config, rmtree, removals = run_config(tmp_path), shutil.rmtree, itertools.count()
    begin(config)
    for name in ("a", "checkpoints", "checkpoints/1", "prefix", "z"):
        (config.run_dir / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: rmtree(path) if next(removals) < n_removed else 1 / 0)
        patch.setattr(Path, "iterdir", lambda path: iter(sorted(path.glob("*"), reverse=last_first)))
        with pytest.raises(ZeroDivisionError):
            begin(dataclasses.replace(config, overwrite=True))
    check_resumed(config)


def test_a_run_of_a_hub_id_can_be_overwritten(tmp_path):
    config = run_config(tmp_path, pretrained_model_dir="user/model")
    begin(config)
    check_run_folder(dataclasses.replace(config, overwrite=True), {})


def test_data_in_a_run_that_a_link_leads_to_is_not_overwritten(tmp_path):
    config = run_config(tmp_path)
    begin(config)
    (tmp_path / "data.jsonl").symlink_to(shutil.copy(config.data_filepath, config.run_dir))
    changed = dataclasses.replace(config, overwrite=True, data_filepath=tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="--overwrite would delete it"):
        check_run_folder(changed, {})
