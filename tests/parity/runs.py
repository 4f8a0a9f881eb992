"""Runs of the PyTorch reference that see jaxprefix's encoder and its order of examples."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

from jaxprefix import load_model
from jaxprefix.config import TrainConfig
from jaxprefix.data.plan import epoch_order
from jaxprefix.prefix import Encoder, new_encoder
from tests.base_folders import GOLDEN, GOLDEN_BASE
from torch_ref import train as reference
from torch_ref.config import train_parser
from torch_ref.data import Example


def reference_run(
    folder: Path, encoder: Path, *extra: Any, examples: Sequence[Example] | None = None, **changes: Any
) -> reference.Record:
    """The reference's record of a run on the golden documents, started from a torch file of the encoder's state."""
    flags = {"pretrained_model_dir": GOLDEN_BASE, "data_filepath": GOLDEN / "documents.jsonl", "save_name": "reference"}
    flags |= {"train_data_size": 10, "dev_data_size": 4, "n_epochs": 20, "n_training_steps": 60, "max_lr": 1e-2}
    flags |= {"checkpoint_path": encoder} | changes
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    parsed = train_parser().parse_args([*arguments, *map(str, extra)])
    with contextlib.chdir(folder):
        return reference.train(parsed, order=jax_order, examples=examples)


def jax_order(n_examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which jaxprefix sees the examples of an epoch."""
    return epoch_order(n_examples, seed, epoch).tolist()


def named(encoder: Encoder) -> dict[str, np.ndarray]:
    """The leaves of an encoder, or of a gradient towards one, under the original's names."""
    return {".".join(path): np.array(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(encoder))}


def encoder_state(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The state dict of the original's encoder."""
    return {name: torch.from_numpy(array) for name, array in named(encoder).items()}


def started_encoder(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The state dict of the encoder that a run of jaxprefix starts from."""
    return encoder_state(new_encoder(load_model(config.pretrained_model_dir), *config.encoder_sizes, config.seed))
