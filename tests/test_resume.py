"""Runs that are gone on with: what may change, and that nothing is lost or done twice."""

import json
import os
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxprefix.loop as loop_module
from convert.errors import InputError
from convert.prefix import read_prefix
from jaxprefix.run.checkpoint import Checkpoints, newest_checkpoint
from jaxprefix.run.folder import open_run_folder
from jaxprefix.train import train
from jaxprefix.update import LossScale
from tests.base_folders import GOLDEN_BASE, changed_weights
from tests.runs import (
    PATIENCE,
    assert_same_end,
    at_update,
    before_updates,
    losses_of,
    metrics_of,
    run_config,
    start,
    stop_at,
)
from tests.tolerances import FUNCTION, LOSS


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])  # the first, beside and at the end of an epoch, the last but one
def test_stopped_and_resumed_ends_bit_identical(finished, tmp_path, monkeypatch, stop_after):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, stop_after)
        stopped = train(config)
    assert (stopped.finished, stopped.n_done) == (False, stop_after)
    assert train(run_config(tmp_path, resume=True)).finished
    assert_same_end(config, finished)


def test_resuming_keeps_log_windows_accumulation_and_loss_scale(tmp_path, monkeypatch):
    changes = {"log_every_n_steps": 4, "n_accum_steps": 2, "fp16": True, "n_epochs": 4, "packing": True}
    whole = run_config(tmp_path, name="whole", **changes)
    train(whole)
    config = run_config(tmp_path, **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        train(config)
    assert train(run_config(tmp_path, resume=True, **changes)).finished
    assert_same_end(config, whole)
    assert len(losses_of(whole.run_dir)) == 2


def test_resume_before_the_first_checkpoint_starts_over(finished, tmp_path):
    config = run_config(tmp_path)
    config.run_dir.mkdir()
    shutil.copy(finished.run_dir / "config.json", config.run_dir)
    assert train(run_config(tmp_path, resume=True)).finished
    assert_same_end(config, finished)
    assert "no checkpoint: starting over" in (config.run_dir / "log.txt").read_text()


def test_a_run_whose_checkpoints_were_removed_does_not_start_over(finished, tmp_path):
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="run: holds a prefix but no checkpoint to resume; use another --save_name"):
        train(run_config(tmp_path, resume=True))
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_prefix_is_saved_behind_the_checkpoint(tmp_path, monkeypatch):
    """However slow the disk, or a kill between the two would leave a run that cannot be resumed."""
    config, order = run_config(tmp_path, n_epochs=1), []
    for owner, name in ((Checkpoints, "save"), (Checkpoints, "finish"), (loop_module, "save_prefix")):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, name=name, function=function: (function(*given), order.append(name))[0]
        )
    train(config)
    assert order[: order.index("save_prefix") + 1][-3:] == ["save", "finish", "save_prefix"]


def test_resume_refuses_other_settings(finished):
    changed = run_config(finished.output_dir, resume=True, max_lr=1e-3, batch_size=2)
    with pytest.raises(InputError) as error:
        train(changed)
    assert "max_lr: was 0.01, now 0.001" in str(error.value)
    assert "batch_size: was 4, now 2" in str(error.value)


def test_resume_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run: no run to resume; without --resume it begins$"):
        train(run_config(tmp_path, resume=True))
    (tmp_path / "run" / "prefix").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run: no run to resume, config.json is missing or damaged$"):
        train(run_config(tmp_path, resume=True))


def test_a_run_killed_before_it_had_a_config_starts_over(tmp_path):
    config = run_config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.json.tmp").write_text("{")
    open_run_folder(config, {})
    assert [path.name for path in config.run_dir.iterdir()] == ["config.json"]
    with pytest.raises(InputError, match="is not empty"):
        open_run_folder(config, {})


def test_a_finished_run_goes_on_for_more_epochs(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    config = run_config(tmp_path, resume=True, n_epochs=4)
    assert train(config).n_done == 16
    assert losses_of(config.run_dir)[:8] == losses_of(finished.run_dir)
    assert [point["step"] for point in metrics_of(config.run_dir)] == list(range(1, 17))
    assert json.loads((config.run_dir / "config.json").read_text())["n_epochs"] == 4
    with pytest.raises(InputError, match=r"n_epochs: was 4, now 2 \(may only be raised\)"):
        train(run_config(tmp_path, resume=True))


def test_more_epochs_are_those_of_a_longer_run(tmp_path):
    """With a rate that does not depend on the run's length."""
    changes = {"recipe": "rinna", "n_training_steps": 40, "train_data_size": 9}
    whole = run_config(tmp_path, name="whole", n_epochs=3, **changes)
    train(whole)
    config = run_config(tmp_path, n_epochs=1, **changes)
    train(config)
    train(run_config(tmp_path, n_epochs=3, resume=True, **changes))
    assert_same_end(config, whole)


def test_a_damaged_checkpoint_costs_its_updates_and_nothing_else(finished, tmp_path, capfd):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    config = run_config(tmp_path, resume=True)
    newest = config.run_dir / "checkpoints" / "8" / "state" / "manifest.ocdbt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert train(config).finished
    assert "checkpoints/8: damaged, DATA_LOSS" in capfd.readouterr().err
    assert "resumed after update 4" in (config.run_dir / "log.txt").read_text()
    assert_same_end(config, finished)


def test_a_base_model_may_move_and_may_not_change(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.copytree(GOLDEN_BASE, tmp_path / "moved")
    config = run_config(tmp_path, resume=True, n_epochs=3, pretrained_model_dir=str(tmp_path / "moved"))
    assert train(config).n_done == 12
    with changed_weights(tmp_path / "moved") as weights:
        weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"] += 1e-3
    with pytest.raises(InputError, match=r"other settings:\n  - weights: was '\w{64}', now '\w{64}'$"):
        train(config)


def test_metrics_that_were_damaged_are_not_guessed(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], "gone", *lines[2:], '{"split": "tr']))
    with pytest.raises(InputError, match=r"metrics.jsonl: line 3 is damaged; remove it and resume again"):
        train(run_config(tmp_path, resume=True, n_epochs=5))
    metrics.write_text("\n".join(lines) + "\n")
    assert train(run_config(tmp_path, resume=True)).finished, "the epochs of the run that was refused are not its own"


def test_metrics_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    order, to_disk, save = [], loop_module.RunLog.to_disk, loop_module.Checkpoints.save

    def note_metrics(log):
        order.append(len(metrics_of(tmp_path / "run")))
        to_disk(log)

    def note_checkpoint(checkpoints, number, *rest):
        order.append(f"checkpoint {number}")
        save(checkpoints, number, *rest)

    synced, fsync = set(), os.fsync
    monkeypatch.setattr(loop_module.RunLog, "to_disk", note_metrics)
    monkeypatch.setattr(loop_module.Checkpoints, "save", note_checkpoint)
    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), fsync(number)))
    train(run_config(tmp_path))
    assert order == [4, "checkpoint 4", 8, "checkpoint 8"]
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_ino in synced


@pytest.mark.parametrize(
    ("every_n_steps", "votes_late", "expected"),
    [(100, False, [3, 6, 8]), (2, False, [2, 4, 6, 8]), (100, True, [4, 8])],
)
def test_minutes_between_checkpoints_begin_anew_with_each(tmp_path, monkeypatch, every_n_steps, votes_late, expected):
    """By a clock that goes on by a minute at each update. Processes that vote hear of a late one an update later."""
    saved, clock = [], types.SimpleNamespace(monotonic=lambda: 0.0)
    wishes = [loop_module.Verdict()]
    if votes_late:
        monkeypatch.setattr(loop_module.Vote, "cast", lambda self, wish: (wishes.append(wish), wishes[-2])[1])
    monkeypatch.setattr(loop_module, "time", clock)
    before_updates(monkeypatch, lambda number: setattr(clock, "monotonic", lambda: 60.0 * number))
    monkeypatch.setattr(loop_module.Checkpoints, "save", lambda self, number, *_: saved.append(number))
    often = {"checkpoint_every_minutes": 2.5, "checkpoint_every_n_steps": every_n_steps}
    train(run_config(tmp_path, train_data_size=23, batch_size=3, n_epochs=1, **often))
    assert saved == expected


@pytest.mark.slow
def test_other_devices_go_on_within_rounding(finished, tmp_path):
    for name in ("run", "four"):
        shutil.copytree(finished.run_dir, tmp_path / name)
        config_file = tmp_path / name / "config.json"
        config_file.write_text(config_file.read_text().replace('"save_name": "run"', f'"save_name": "{name}"'))
    one, four = (run_config(tmp_path, name, n_epochs=4) for name in ("run", "four"))
    train(run_config(tmp_path, n_epochs=4, resume=True))
    process = start(four, "--resume", JAX_NUM_CPU_DEVICES="4")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    np.testing.assert_allclose(losses_of(four.run_dir), losses_of(one.run_dir), rtol=LOSS)
    np.testing.assert_allclose(read_prefix(four.run_dir)[0], read_prefix(one.run_dir)[0], atol=FUNCTION)


def test_what_comes_while_the_dev_set_is_gone_through_costs_no_update(finished, tmp_path, monkeypatch):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "loss_and_ppl", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert newest_checkpoint(config.run_dir / "checkpoints") == 4
    train(run_config(tmp_path, resume=True))
    assert_same_end(config, finished)


def test_a_dev_set_that_was_gone_through_is_logged_once(finished, tmp_path, monkeypatch):
    config = run_config(tmp_path, checkpoint_every_n_steps=100)
    with monkeypatch.context() as patch:
        at_update(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert [point["step"] for point in metrics_of(config.run_dir, "dev")] == [4]
    train(run_config(tmp_path, checkpoint_every_n_steps=100, resume=True))
    assert metrics_of(config.run_dir, "dev") == metrics_of(finished.run_dir, "dev")


def test_a_record_that_was_cut_off_is_dropped(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"split": "tr')
    train(run_config(tmp_path, resume=True, n_epochs=3))
    assert [point["step"] for point in metrics_of(tmp_path / "run")] == list(range(1, 13))


def test_log_and_tensorboard_go_on(finished, tmp_path):
    """Updates that are made again are in TensorBoard once."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    train(run_config(tmp_path, resume=True))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.startswith((finished.run_dir / "log.txt").read_text())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 9))


def test_the_loss_scale_and_its_skipped_updates_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "start", classmethod(lambda cls: cls(jnp.float32(2**30), jnp.int32(0))))
    train(run_config(tmp_path, fp16=True, n_training_steps=2))
    train(run_config(tmp_path, fp16=True, n_training_steps=3, resume=True))
    with Checkpoints(tmp_path / "run" / "checkpoints", writing=False) as checkpoints:
        arrays, progress = checkpoints.read()
    assert float(arrays["loss_scale"]) == 2**27
    assert progress["n_skipped"] == 3


def test_a_run_of_one_epoch_that_ends_in_its_dev_set_goes_on_with_it(tmp_path, monkeypatch):
    config = run_config(tmp_path, n_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "loss_and_ppl", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert train(run_config(tmp_path, n_epochs=1, resume=True)).best_dev_loss == losses_of(config.run_dir, "dev")[0]
    assert (config.run_dir / "prefix").is_dir()
