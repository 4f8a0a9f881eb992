"""What training starts from: an encoder fitted to the base model, or another run's. Legend: `models/attention.py`."""

from collections.abc import Mapping

import jax
import numpy as np
import optax

from convert.errors import InputError
from convert.training_state import read_training_state
from jaxprefix.checkpoint import Checkpoints, from_names
from jaxprefix.config import TrainConfig
from jaxprefix.hosts import agree
from jaxprefix.loss import LossScale
from jaxprefix.models import BaseModel
from jaxprefix.prefix import DirectPrefix, Encoder, load_prefix, new_encoder
from jaxprefix.run_folder import CHECKPOINTS, check_base
from jaxprefix.tokenizer import Tokenizer
from jaxprefix.update import TrainState


def earlier_arrays(config: TrainConfig, base: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Return the arrays of the run that this one starts from, by name; None if it starts from no run.

    Raises InputError for a folder that is no run, or one of another base model. All processes read together, so all
    must have found it first.
    """
    path = config.checkpoint_path
    if path is None or config.prefix_hidden_dim == 0:
        return None

    def find() -> Checkpoints | None:
        if path.is_file():
            return None
        check_base(path, base)
        return Checkpoints(path / CHECKPOINTS, writing=False)

    checkpoints = agree("find the earlier run", find)
    if checkpoints is None:
        return None
    with checkpoints:
        return checkpoints.read()[0]


def start_state(
    config: TrainConfig,
    base: BaseModel,
    tokenizer: Tokenizer,
    optimizer: optax.GradientTransformation,
    resuming: bool,
    earlier: Mapping[str, np.ndarray] | None = None,
) -> TrainState:
    """Make the state that training starts from; only its shapes when a checkpoint is to replace it.

    `earlier` are the arrays of another run, whose encoder is taken.
    """
    scale = LossScale.start() if config.dtype == "float16" else None
    if resuming:
        encoder = jax.eval_shape(lambda: new_encoder(base, *config.encoder_sizes, config.seed))
        return TrainState(encoder, jax.eval_shape(optimizer.init, encoder), scale)
    encoder = start_encoder(config, base, tokenizer, earlier)
    return TrainState(encoder, jax.jit(optimizer.init)(encoder), scale)


def start_encoder(
    config: TrainConfig, base: BaseModel, tokenizer: Tokenizer, earlier: Mapping[str, np.ndarray] | None
) -> Encoder:
    """Make the encoder that training starts from: fitted to the base model, or another run's."""
    if config.checkpoint_path is None:
        return new_encoder(base, *config.encoder_sizes, config.seed)
    if config.prefix_hidden_dim == 0:
        prefix = load_prefix(config.checkpoint_path, base.config, tokenizer)
        if prefix.shape[2] != config.prefix_seq_len:
            raise InputError(
                f"{config.checkpoint_path}: has prefix length {prefix.shape[2]}, not --prefix_seq_len "
                f"{config.prefix_seq_len}"
            )
        return DirectPrefix(prefix)
    like = {"encoder": jax.eval_shape(lambda: new_encoder(base, *config.encoder_sizes, config.seed))}
    if earlier is None:  # the original's: a torch file with the encoder's state
        earlier = read_training_state(config.checkpoint_path)
    return from_names(like, earlier, config.checkpoint_path)["encoder"]
