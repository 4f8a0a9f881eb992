"""Sixty updates here and in the PyTorch reference, from the same encoder and in the same order."""

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx

from convert.prefix import read_prefix
from jaxprefix import load_model
from jaxprefix.config import RECIPES
from jaxprefix.data import epoch_order
from jaxprefix.prefix import new_encoder
from jaxprefix.train import train
from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.runs import losses_of, metrics_of, run_config
from tests.tolerances import LOSS, MODEL
from torch_ref import train as reference
from torch_ref.config import train_parser

CASES = {"plain": {}, "warmup": {"n_warmup_steps": 5}, "decay": {"weight_decay": 0.5}, "clip": {"grad_clip": 0.05}}


def run_reference(folder, monkeypatch, changes, *extra):
    """The reference's record of a run that starts from jaxprefix's encoder and sees its order of examples."""
    encoder = new_encoder(load_model(GOLDEN_BASE), 10, 10, 10, seed=42)
    leaves = nnx.to_flat_state(nnx.state(encoder))
    torch.save({".".join(path): torch.from_numpy(np.array(leaf[...])) for path, leaf in leaves}, folder / "encoder.pt")
    flags = {"pretrained_model_dir": GOLDEN_BASE, "data_filepath": GOLDEN / "documents.jsonl", "save_name": "reference"}
    flags |= {"train_data_size": 10, "dev_data_size": 4, "n_epochs": 20, "n_training_steps": 60, "max_lr": 1e-2}
    flags |= {"checkpoint_path": folder / "encoder.pt"} | changes
    monkeypatch.chdir(folder)
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    parsed = train_parser().parse_args([*arguments, *extra])
    return reference.train(parsed, order=lambda n, epoch, seed: epoch_order(n, seed, epoch).tolist())


def run_ours(folder, **changes):
    settings = {"recipe": "rinna", "train_data_size": 10, "n_epochs": 20, "n_training_steps": 60}
    config = run_config(folder, **settings | changes)
    train(config)
    return config


@pytest.mark.parametrize("case", CASES)
def test_sixty_updates(tmp_path, monkeypatch, case):
    record = run_reference(tmp_path, monkeypatch, CASES[case])
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
