"""What training starts from: an encoder fitted to the base model, another run's encoder, or a checkpoint."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from convert.errors import InputError
from convert.prefix import PREFIX_FOLDER, is_bare_prefix, read_prefix
from convert.training_state import read_training_state
from jaxprefix.config import TrainConfig
from jaxprefix.machine.hosts import agree, broadcast_from_first, check_same, is_first
from jaxprefix.machine.screen import warn
from jaxprefix.models import BaseModel
from jaxprefix.prefix import DEV_LOSS, DirectPrefix, Encoder, check_length, load_prefix, new_encoder
from jaxprefix.run.checkpoint import CHECKPOINTS, Checkpoints, from_names, named
from jaxprefix.run.description import check_base
from jaxprefix.run.progress import Progress
from jaxprefix.tokenizer import Tokenizer
from jaxprefix.update import LossScale, TrainState, first_state


def earlier_arrays(config: TrainConfig, identity: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Return the arrays of the run that this one starts from, by name; None if it starts from no run.

    `identity` is that of the base model. Raises InputError for a folder that is no run, or a run of another base. All
    processes read together, so none begins before all have found the run.
    """
    path = config.checkpoint_path
    if path is None or config.prefix_hidden_dim == 0:
        return None

    def find() -> Checkpoints | None:
        if is_bare_prefix(path):
            raise InputError(f"{path}: is a prefix, without its encoder; --prefix_hidden_dim 0 trains it directly")
        if path.is_file():
            return None
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        check_base(path, identity)
        return Checkpoints(path / CHECKPOINTS, writing=False)

    checkpoints = agree("find the earlier run", find)
    if checkpoints is None:
        return None
    with checkpoints:
        return checkpoints.read()[0]


def starting_state(
    config: TrainConfig, base: BaseModel, tokenizer: Tokenizer, identity: dict[str, str], resuming: bool
) -> TrainState:
    """Return the state before the first update, the same on all processes; for a run to resume, only its shapes.

    `identity` is that of the base model. Raises InputError as `earlier_arrays` and `start_encoder` do.
    """
    if resuming:
        return agree("start the prefix", lambda: abstract_state(config, base))
    earlier = earlier_arrays(config, identity)
    state = agree("start the prefix", lambda: first_state(config, start_encoder(config, base, tokenizer, earlier)))
    agree("start from process 0's encoder", lambda: check_same_start(state.encoder))
    return state


def abstract_state(config: TrainConfig, base: BaseModel) -> TrainState:
    """Return the state that training starts from, with shapes in place of arrays."""
    sizes = config.encoder_sizes
    return jax.eval_shape(lambda base: first_state(config, new_encoder(base, *sizes, config.seed)), base)


def start_encoder(
    config: TrainConfig, base: BaseModel, tokenizer: Tokenizer, earlier: Mapping[str, np.ndarray] | None
) -> Encoder:
    """Make the encoder that training starts from: fitted to the base model, or that of another run's arrays."""
    if config.checkpoint_path is None:
        return new_encoder(base, *config.encoder_sizes, config.seed)
    if config.prefix_hidden_dim == 0:
        prefix = load_prefix(config.checkpoint_path, base.config, tokenizer)
        check_length(config.checkpoint_path, prefix, config.prefix_seq_len)
        return DirectPrefix(prefix)
    like = {"encoder": abstract_state(config, base).encoder}
    if earlier is None:  # the original's: a torch file with the encoder's state
        earlier = read_training_state(config.checkpoint_path)
    return from_names(like, earlier, config.checkpoint_path)["encoder"]


def check_same_start(encoder: Encoder) -> None:
    """Check that all processes start from the same encoder; all call it together. Raises InputError."""
    if jax.process_count() > 1:  # a single one need not wait for JAX to make it
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(encoder)))
        check_same({"the encoder to start from": digest.hexdigest()[:16]})


def restore_state(config: TrainConfig, checkpoints: Checkpoints, like: TrainState) -> tuple[TrainState, Progress]:
    """Return the state and progress in the newest checkpoint; `like` gives the structure and shapes to expect."""
    arrays, saved = checkpoints.read()
    if like.loss_scale is not None:  # a training state from PyTorch has none
        arrays = named({"loss_scale": jax.tree.map(np.asarray, LossScale.start())}) | arrays
    progress = Progress(**saved)
    loss = loss_of_prefix(config.run_dir / PREFIX_FOLDER, progress.has_prefix) if is_first() else None
    bits = np.array([math.nan if loss is None else loss]).view(np.int32)  # integers, which no device rounds
    [best] = broadcast_from_first(bits).view(np.float64).tolist()
    progress.best_dev_loss = None if math.isnan(best) else best
    return from_names(like, arrays, checkpoints.folder), progress


def loss_of_prefix(folder: Path, expected: bool) -> float | None:
    """Return the dev loss of a run's prefix. None if it is missing or damaged, with a warning if it is `expected`."""
    if not expected and not folder.exists():
        return None
    try:
        told = read_prefix(folder)[1].get(DEV_LOSS, "missing")
        if 0 <= float(told) < math.inf:
            return float(told)
        problem = f"{folder}: its {DEV_LOSS} is {told}"
    except InputError as error:
        problem = str(error)
    except ValueError:
        problem = f"{folder}: its {DEV_LOSS} is no number"
    warn(f"{problem}; the best prefix from here on is kept")
    return None
