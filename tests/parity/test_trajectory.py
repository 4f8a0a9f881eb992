"""Sixty updates here and in the PyTorch reference, from the same encoder and in the same order."""

import dataclasses

import numpy as np
import pytest
import torch

from convert.prefix import read_prefix
from jaxprefix.config import RECIPES
from jaxprefix.train import train
from tests.parity.runs import reference_run, started_encoder
from tests.runs import losses_of, metrics_of, run_config
from tests.tolerances import LOSS, MODEL

CASES = {"plain": {}, "warmup": {"n_warmup_steps": 5}, "decay": {"weight_decay": 0.5}, "clip": {"grad_clip": 0.05}}


def run_ours(folder, **changes):
    settings = {"recipe": "rinna", "train_data_size": 10, "n_epochs": 20, "n_training_steps": 60}
    config = run_config(folder, **settings | changes)
    train(config)
    return config


@pytest.mark.parametrize("case", CASES)
def test_sixty_updates(tmp_path, monkeypatch, case):
    torch.save(started_encoder(run_config(tmp_path)), tmp_path / "encoder.pt")
    record = reference_run(tmp_path, tmp_path / "encoder.pt", **CASES[case])
    once = dataclasses.replace(RECIPES["rinna"], schedule_steps_per_update=1)  # twice is DeepSpeed's
    monkeypatch.setitem(RECIPES, "rinna", once)
    config = run_ours(tmp_path, **CASES[case])
    np.testing.assert_allclose(losses_of(config.run_dir), record["losses"], rtol=LOSS)
    np.testing.assert_allclose([point["lr"] for point in metrics_of(config.run_dir)], record["rates"], rtol=1e-6)
    monitors, ppls = zip(*record["dev"], strict=True)
    np.testing.assert_allclose(losses_of(config.run_dir, "dev"), monitors, rtol=LOSS)
    np.testing.assert_allclose([point["ppl"] for point in metrics_of(config.run_dir, "dev")], ppls, rtol=MODEL)
    assert min(monitors) == monitors[-1], "this test needs a run whose last epoch is its best"
    folded = record["encoder"].folded().detach()
    np.testing.assert_allclose(read_prefix(config.run_dir)[0], folded, rtol=0, atol=MODEL)
