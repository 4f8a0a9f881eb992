"""What a run starts from: another run's encoder, a prefix file, its own checkpoint."""

import dataclasses
import json
import math
import os
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.errors import InputError
from convert.prefix import ADAPTER_WEIGHTS, read_prefix
from jaxprefix import load_model, start
from jaxprefix.run.checkpoint import Checkpoints
from jaxprefix.train import train
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_base_folder
from tests.conversion import converted
from tests.runs import losses_of, run_config
from tests.tolerances import LOSS


def test_a_run_can_start_from_another_runs_encoder(finished, tmp_path):
    config = run_config(tmp_path, checkpoint_path=finished.run_dir, n_training_steps=1, max_lr=1e-9, min_lr=0.0)
    train(config)
    assert losses_of(config.run_dir, "dev") == pytest.approx(losses_of(finished.run_dir, "dev")[-1:], rel=LOSS)


def test_a_direct_prefix_can_start_from_a_prefix_file(finished, tmp_path):
    changes = {"prefix_hidden_dim": 0, "n_training_steps": 1, "max_lr": 1e-9, "min_lr": 0.0}
    config = run_config(tmp_path, checkpoint_path=finished.run_dir / "prefix", **changes)
    train(config)
    np.testing.assert_allclose(read_prefix(config.run_dir)[0], read_prefix(finished.run_dir)[0], atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_seq_len": 20}, r"encoder.prefix_wte.weight: expected shape \(20, 10\), found \(10, 10\)"),
        ({"prefix_hidden_dim": 7}, r"encoder.prefix_mlp.0.bias: expected shape \(7,\), found \(10,\)"),
        ({"prefix_hidden_dim": 0, "prefix_seq_len": 5}, "has prefix length 10, not --prefix_seq_len 5"),
        ({"base": {"vocab_size": 500}}, "vocab_size: made for 440, this base has 500"),
    ],
)
def test_another_runs_encoder_must_fit(finished, tmp_path, changes, message):
    changes = dict(changes)
    if base := changes.pop("base", None):
        changes["pretrained_model_dir"] = str(make_base_folder(tmp_path / "base", **base))
    with pytest.raises(InputError, match=message):
        train(run_config(tmp_path, checkpoint_path=finished.run_dir, **changes))
    assert not (tmp_path / "run").exists()


def test_an_encoder_cannot_start_from_a_prefix_alone(finished, tmp_path):
    for path in (GOLDEN / "forward.weight", finished.run_dir / "prefix"):
        with pytest.raises(
            InputError, match="is a prefix, without its encoder; --prefix_hidden_dim 0 trains it directly"
        ):
            train(run_config(tmp_path, checkpoint_path=path))


def test_an_encoder_cannot_start_from_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"not a run, config.json is missing or damaged"):
        train(run_config(tmp_path, checkpoint_path=tmp_path))


def test_an_encoder_cannot_start_from_a_direct_prefix(tmp_path):
    direct = run_config(tmp_path, name="direct", prefix_hidden_dim=0, n_training_steps=1)
    train(direct)
    with pytest.raises(InputError, match=r"encoder.prefix_mlp.0.bias: expected shape \(10,\), found nothing"):
        train(run_config(tmp_path, checkpoint_path=direct.run_dir))


@pytest.mark.parametrize("damage", ["gone", "empty", "without numbers", "cut off"])
def test_a_best_prefix_that_is_gone_or_damaged_is_made_anew(finished, tmp_path, capsys, damage):
    prefix = shutil.copytree(finished.run_dir, tmp_path / "run") / "prefix"
    numbers = prefix / ADAPTER_WEIGHTS
    if damage == "cut off":
        os.truncate(numbers, 5000)
    elif damage == "without numbers":
        numbers.unlink()
    else:
        shutil.rmtree(prefix)
        if damage == "empty":
            prefix.mkdir()
    description = prefix.parent / "config.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"checkpoint_path": "moved"}))
    config = run_config(tmp_path, resume=True, n_epochs=3, checkpoint_path=tmp_path / "not read any more")
    assert train(config).best_dev_loss == losses_of(config.run_dir, "dev")[-1]
    [warning] = re.findall("WARNING: .*", capsys.readouterr().err)
    assert warning.startswith(f"WARNING: {prefix}")
    assert warning.endswith("; the best prefix from here on is kept")
    assert read_prefix(config.run_dir)[0].shape == (10, 384)
    assert json.loads(description.read_text())["checkpoint_path"] == "moved"
    assert "not read any more is not read again\n" in (config.run_dir / "log.txt").read_text()


def test_the_best_loss_is_that_of_the_prefix_whatever_was_logged(finished, tmp_path, capsys):
    """As when a run was killed between the two."""
    prefix = shutil.copytree(finished.run_dir, tmp_path / "run") / "prefix"
    for expected in (True, False):
        assert start.loss_of_prefix(prefix, expected) == min(losses_of(finished.run_dir, "dev"))
    assert start.loss_of_prefix(tmp_path / "run at its beginning" / "prefix", expected=False) is None
    assert capsys.readouterr().err == ""

    path = prefix / ADAPTER_WEIGHTS
    save_file(load_file(path), path, metadata={"dev_loss": "0.0"})
    assert start.loss_of_prefix(prefix, expected=True) == 0
    for told, warning in ((None, "is no number"), ("-inf", "is -inf"), ("nan", "is nan"), ("a", "is no number")):
        save_file(load_file(path), path, metadata=None if told is None else {"dev_loss": told})
        assert start.loss_of_prefix(prefix, expected=True) is None
        assert f"prefix: its dev_loss {warning}; the best prefix from here on is kept" in capsys.readouterr().err


def test_nothing_of_the_run_that_another_starts_from_is_moved_or_removed(finished, tmp_path):
    earlier = shutil.copytree(finished.run_dir, tmp_path / "earlier")
    (earlier / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    next((earlier / "checkpoints" / "8").rglob("progress.json")).unlink()
    before = sorted(earlier.rglob("*"))
    train(run_config(tmp_path, checkpoint_path=earlier, n_training_steps=1))
    assert sorted(earlier.rglob("*")) == before


@pytest.mark.parametrize("loss", [0.1, math.nan])
def test_what_the_best_loss_is_the_first_process_says(finished, monkeypatch, loss):
    monkeypatch.setattr(start, "is_first", lambda: False)
    monkeypatch.setattr(start, "loss_of_prefix", Mock(side_effect=AssertionError))
    monkeypatch.setattr(start, "broadcast_from_first", lambda bits: np.array([loss]).view(np.int32))
    config = dataclasses.replace(finished, n_epochs=3)
    base = load_model(GOLDEN_BASE)
    state = start.abstract_state(config, base)
    with Checkpoints(config.run_dir / "checkpoints", writing=False) as checkpoints:
        assert start.restore_state(config, checkpoints, state)[1].best_dev_loss == (0.1 if loss == 0.1 else None)


def test_a_run_can_start_from_a_torch_file(finished, tmp_path):
    state = converted(finished.run_dir, tmp_path / "state.pt")
    config = run_config(tmp_path, checkpoint_path=state, n_training_steps=1, max_lr=1e-9, min_lr=0.0)
    train(config)
    assert losses_of(config.run_dir, "dev") == pytest.approx(losses_of(finished.run_dir, "dev")[-1:], rel=LOSS)
