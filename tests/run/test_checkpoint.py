"""Checkpoints damaged in every file and every way: the one before is taken, or a plain refusal; never a wrong one."""

import json
import os
import random
import shutil
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from convert.errors import InputError, RunError
from jaxprefix.run.checkpoint import Checkpoints, SaveError, from_names, newest_checkpoint

CONTENT = {
    step: {"encoder.weight": np.arange(600, dtype=np.float32).reshape(20, 30) * step, "count": np.int32([step])}
    for step in (4, 8)
}
PROGRESS = {step: {"n_done": step, "best_dev_loss": 7 / step} for step in CONTENT}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step, arrays in CONTENT.items():
            checkpoints.save(step, arrays, PROGRESS[step])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def read(folder, writing=True):
    with Checkpoints(folder, writing) as checkpoints:
        arrays, progress = checkpoints.read()
    return {name: array.tolist() for name, array in arrays.items()}, progress


def content_of(step):
    return {name: array.tolist() for name, array in CONTENT[step].items()}, PROGRESS[step]


def flip(content: bytes, place: float) -> bytes:
    index = int(place * (len(content) - 1))
    return content[:index] + bytes([content[index] ^ 0x11]) + content[index + 1 :]


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "first byte flipped": lambda content: flip(content, 0),
    "a byte flipped": lambda content: flip(content, 0.4),
    "a byte flipped near the beginning": lambda content: flip(content, 0.1),
    "a byte flipped near the end": lambda content: flip(content, 0.9),
    "last byte flipped": lambda content: flip(content, 1),
    "beginning cut off": lambda content: content[1:],
    "end cut off": lambda content: content[:-1],
    "twice": lambda content: content * 2,
    "other bytes": lambda content: random.Random(0).randbytes(len(content)),
    "missing": None,
}


def damage(path, change) -> None:
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_never_give_a_wrong_result(saved, tmp_path, capfd, kind):
    names = sorted(path.relative_to(saved / "8") for path in (saved / "8").rglob("*") if path.is_file())
    fallen_back = 0
    for number, name in enumerate(names):
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / "8" / name, DAMAGES[kind])
        found = read(folder)
        assert found in (content_of(8), content_of(4)), name
        if found == content_of(4):
            fallen_back += 1
            assert f"{folder / '8'}: damaged, " in capfd.readouterr().err
            assert sorted(path.name for path in folder.iterdir()) == ["4", "8.damaged"]
            assert read(folder) == found, "the second time without a word"
            assert capfd.readouterr().err == ""
    assert fallen_back >= 2, "the damage must reach what is read"


def swap(name):
    """Take a part of the checkpoint before in the place of this one's."""

    def change(folder):
        shutil.rmtree(folder / "8" / name)
        shutil.copytree(folder / "4" / name, folder / "8" / name)

    return change


def change_record(change):
    def change_file(folder):
        path = folder / "8" / "progress" / "progress.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return change_file


def file_for_folder(folder):
    shutil.rmtree(folder / "8")
    (folder / "8").touch()


def dangling_link(folder):
    file = folder / "8" / "progress" / "progress.json"
    file.unlink()
    file.symlink_to("nowhere")


FALLS_BACK = {
    "the state of another": swap("state"),
    "the progress of another": swap("progress"),
    "all of another": swap("."),
    "a file in the place of the folder": file_for_folder,
    "a link to nowhere": dangling_link,
    "no object": change_record(lambda record: [record]),
    "no sums": change_record(lambda record: record | {"sha256": {}}),
    "a sum too many": change_record(lambda record: record | {"sha256": record["sha256"] | {"more": "0"}}),
    "a number of another kind": change_record(lambda record: record | {"step": "8"}),
    "deeply nested": lambda folder: (folder / "8/progress/progress.json").write_text("[" * 10**5),
}


@pytest.mark.parametrize("kind", FALLS_BACK)
def test_what_does_not_belong_together_is_damaged(folder, kind):
    FALLS_BACK[kind](folder)
    assert read(folder) == content_of(4)
    assert read(folder) == content_of(4)


def test_an_array_that_is_not_listed_is_missed(folder):
    change_record(lambda record: record["sha256"].pop("encoder.weight") and record)(folder)
    with Checkpoints(folder) as checkpoints, pytest.raises(InputError, match=r"encoder.weight: expected .* nothing"):
        from_names(CONTENT[8], checkpoints.read()[0], folder)


def test_more_files_do_no_harm(folder):
    for place in (".", "8", "8/state", "8/progress", "8/state/d"):
        (folder / place / "more").write_text("more")
    assert read(folder) == content_of(8)


@pytest.mark.parametrize("folder_name", ["state", "progress", "state/d", "state/ocdbt.process_0", "."])
def test_missing_folders(folder, folder_name):
    shutil.rmtree(folder / "8" / folder_name)
    assert read(folder) == content_of(4)


@pytest.mark.parametrize(("old", "new"), [('"n_done": 8', '"n_done": 9'), ("0.875", "0.876"), ("sha256", "sha265")])
def test_progress_that_was_changed(folder, old, new):
    path = folder / "8" / "progress" / "progress.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert read(folder) == content_of(4)


def test_an_array_that_was_changed(folder, tmp_path):
    """A whole checkpoint of Orbax's, of other numbers than its sums tell."""
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(8, {**CONTENT[8], "count": np.int32([9])}, PROGRESS[8])
    shutil.rmtree(folder / "8" / "state")
    shutil.copytree(tmp_path / "other" / "8" / "state", folder / "8" / "state")
    assert read(folder) == content_of(4)


def test_a_checkpoint_under_way_does_not_count(folder):
    (folder / "8").rename(folder / "8.orbax-checkpoint-tmp")
    assert newest_checkpoint(folder) == 4
    assert read(folder) == content_of(4)


def test_all_damaged_is_refused_and_nothing_is_moved(folder):
    for step in CONTENT:
        (folder / str(step) / "progress" / "progress.json").write_text(json.dumps({"progress": {}}))
    message = r"every checkpoint is damaged; train --overwrite starts that run again:\n  - 8: .*\n  - 4: "
    with pytest.raises(InputError, match=message):
        read(folder)
    assert {path.name for path in folder.iterdir()} == {"4", "8"}


def test_reading_anothers_run_moves_nothing(folder):
    (folder / "8" / "progress" / "progress.json").unlink()
    assert read(folder, writing=False) == content_of(4)
    assert {path.name for path in folder.iterdir()} == {"4", "8"}


def test_a_folder_may_have_any_name(saved, tmp_path):
    for name in ("a#b?c", "a%41", "a b", "朝"):
        assert read(shutil.copytree(saved, tmp_path / name / "checkpoints")) == content_of(8)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint to go on from"):
        read(tmp_path)
    with pytest.raises(InputError, match="no such folder of checkpoints"):
        read(tmp_path / "nowhere", writing=False)


def test_two_are_kept_and_what_a_killed_run_left_goes(folder):
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(folder) as checkpoints:
        for step in (12, 16):
            checkpoints.save(step, CONTENT[4], PROGRESS[4])
    assert {path.name for path in folder.iterdir()} == {"12", "16"}


def test_what_a_killed_run_had_no_time_to_remove_goes(folder, tmp_path):
    with Checkpoints(shutil.copytree(folder, tmp_path / "later")) as checkpoints:
        checkpoints.save(12, CONTENT[8], PROGRESS[8])
    shutil.copytree(tmp_path / "later" / "12", folder / "12")
    assert read(folder, writing=False) == content_of(8)
    assert len(list(folder.iterdir())) == 3
    assert read(folder) == content_of(8)
    assert {path.name for path in folder.iterdir()} == {"8", "12"}


def test_checkpoints_that_come_into_sight_late_are_removed_too(folder, monkeypatch):
    """Orbax lists them once; another host's may not be there yet."""
    shutil.copytree(folder / "4", folder / "2")
    with Checkpoints(folder) as checkpoints:
        shutil.move(folder / "2", folder.parent / "2")
        assert checkpoints._manager.all_steps()
        shutil.move(folder.parent / "2", folder / "2")
        monkeypatch.setattr("jaxprefix.run.checkpoint.broadcast_from_first", lambda _: np.int32([8, 4, 2]))
        checkpoints.read()
    assert {path.name for path in folder.iterdir()} == {"4", "8"}


def test_of_what_a_killed_run_left_the_two_newest_good_ones_stay(folder, tmp_path):
    with Checkpoints(shutil.copytree(folder, tmp_path / "later")) as checkpoints:
        for step in (12, 16):
            checkpoints.save(step, CONTENT[8], PROGRESS[8])
    for step in ("12", "16"):
        shutil.copytree(tmp_path / "later" / step, folder / step)
    damage(next((folder / "16").rglob("progress.json")), lambda content: content[1:])
    assert read(folder) == content_of(8)
    assert {path.name for path in folder.iterdir()} == {"16.damaged", "8", "12"}


def test_what_cannot_be_saved_is_told(folder):
    message = r": checkpoint 8 cannot be saved \(.*\); the last good one is 8"
    with Checkpoints(folder) as checkpoints, pytest.raises(RunError, match=message):
        checkpoints.save(8, CONTENT[8], PROGRESS[8])


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    message = r"file/checkpoints: checkpoint 4 cannot be saved \(.*\); there is no earlier one"
    with Checkpoints(tmp_path / "file" / "checkpoints") as checkpoints, pytest.raises(RunError, match=message):
        checkpoints.save(4, CONTENT[4], PROGRESS[4])


def test_reading_anothers_run_leaves_its_save_under_way(folder):
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    read(folder, writing=False)
    assert (folder / "12.orbax-checkpoint-tmp").is_dir()


def test_orbax_is_kept_short_while_a_run_writes(folder):
    before = threading.excepthook
    with Checkpoints(folder, writing=False):
        assert threading.excepthook is before
    with Checkpoints(folder):
        assert threading.excepthook is not before
    assert threading.excepthook is before


def test_a_save_that_failed_is_told_whatever_follows_from_it(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(checkpoints._manager, "close", Mock(side_effect=TimeoutError("barrier")))
    with pytest.raises(SaveError, match="full"), checkpoints:
        raise SaveError("full")


def test_a_missing_file_is_named(folder, capfd):
    (missing := folder / "8" / "progress" / "progress.json").unlink()
    read(folder)
    assert f"8: damaged, No such file or directory: {missing}; going on from 4" in capfd.readouterr().err


@pytest.mark.parametrize("rename", [os.rename, Mock(side_effect=OSError)])  # as a container's layer below refuses it
def test_of_damaged_checkpoints_the_newest_is_kept(folder, monkeypatch, rename):
    monkeypatch.setattr(os, "rename", rename)
    (folder / "3.damaged").mkdir()
    shutil.copytree(folder / "4", folder / "6")  # holds checkpoint 4 instead
    (folder / "8" / "progress" / "progress.json").unlink()
    read(folder)
    assert {path.name for path in folder.iterdir()} == {"4", "8.damaged"}


def test_a_save_waits_for_the_one_before(folder, monkeypatch):
    waited = []
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(12, CONTENT[8], PROGRESS[8])
        manager = checkpoints._manager
        with monkeypatch.context() as patch:
            patch.setattr(manager, "save", lambda *_, **__: waited.append(not manager.is_saving_in_progress()))
            checkpoints.save(16, CONTENT[8], PROGRESS[8])
    assert waited == [True]


def test_what_another_process_cannot_read_is_damaged_for_all(folder, monkeypatch, capfd):
    answers = iter([True, False])
    monkeypatch.setattr("jaxprefix.run.checkpoint.anywhere", lambda flag: flag or next(answers))
    assert read(folder) == content_of(4)
    assert "8: damaged, another process cannot read it; going on from 4" in capfd.readouterr().err


def test_processes_wait_for_a_checkpoint_and_until_a_damaged_one_is_moved(folder, monkeypatch):
    waited = []
    monkeypatch.setattr("jaxprefix.run.checkpoint.wait_until_visible", lambda path: waited.append(path.name))
    monkeypatch.setattr("jaxprefix.run.checkpoint.wait_for_all", waited.append)
    (folder / "8" / "progress" / "progress.json").unlink()
    read(folder)
    assert waited == ["8", "4", "put checkpoint 8 aside"]


def test_a_save_that_fails_in_the_background_is_told(folder, monkeypatch):
    message = r"the checkpoint in progress cannot be saved \(No space left on device\); the last good one is"
    failed = Mock(side_effect=[ValueError("RESOURCE_EXHAUSTED: [os_error_code='28']"), None])

    def save_and_fail():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(12, CONTENT[8], {})
            checkpoints._manager.wait_until_finished()
            monkeypatch.setattr(checkpoints._manager, "wait_until_finished", failed)

    with pytest.raises(RunError, match=message):
        save_and_fail()
