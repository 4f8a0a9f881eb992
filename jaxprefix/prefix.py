"""The prefix: what is trained, how it starts, and its files. Legend: `models/attention.py`.

Training changes an encoder, a module that returns the prefix [L, 2, P, N, H] when called:
    PrefixEncoder   embedding → tanh MLP → keys and values (Li & Liang, arXiv:2101.00190), the original's
    DirectPrefix    the keys and values themselves
Prefix files hold only its result, folded to [P, L·2·N·H].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from convert.errors import InputError
from convert.prefix import PREFIX_FOLDER, read_prefix, to_folded, to_layers, write_adapter
from jaxprefix.base_folder import base_identity, differing_fields
from jaxprefix.models import BaseModel, path_name
from jaxprefix.models.attention import Prefix, heads_first
from jaxprefix.models.config import ModelConfig
from jaxprefix.models.layers import Embedding, Linear
from jaxprefix.run.description import is_run_folder
from jaxprefix.settings import expanded
from jaxprefix.tokenizer import Tokenizer

DEV_LOSS = "dev_loss"
"""The field of a prefix file's header that holds its loss on the run's dev set."""


class PrefixEncoder(nnx.Module):
    """Embedding → linear → tanh → linear; parameter names, shapes and initialisation are the original's."""

    def __init__(self, config: ModelConfig, prefix_seq_len: int, input_dim: int, hidden_dim: int, seed: int):
        rng = np.random.default_rng(seed)  # NumPy's: JAX's would have to be compiled
        self.prefix_wte = Embedding(prefix_seq_len, input_dim, rng)
        self.prefix_mlp = nnx.Dict(
            {"0": Linear(input_dim, hidden_dim, rng), "2": Linear(hidden_dim, config.folded_width, rng)}
        )
        self.layers_heads_dim = (config.n_layer, config.n_head, config.head_dim)

    def __call__(self) -> Prefix:
        hidden = jnp.tanh(self.prefix_mlp["0"](self.prefix_wte.weight[...]))
        return to_layers(self.prefix_mlp["2"](hidden), *self.layers_heads_dim)


class DirectPrefix(nnx.Module):
    """The keys and values themselves as the parameters."""

    def __init__(self, prefix: Prefix):
        self.folded = nnx.Param(to_folded(prefix))  # [P, L·2·N·H]
        self.layers_heads_dim = (prefix.shape[0], prefix.shape[3], prefix.shape[4])

    def __call__(self) -> Prefix:
        return to_layers(self.folded[...], *self.layers_heads_dim)


Encoder = PrefixEncoder | DirectPrefix


def new_encoder(base: BaseModel, prefix_seq_len: int, input_dim: int, hidden_dim: int, seed: int) -> Encoder:
    """Make an encoder whose prefix starts close to the base model's own keys and values.

    With hidden_dim 0 the keys and values are trained directly and start there exactly. Raises InputError for
    more positions than the base model has token ids.
    """
    if prefix_seq_len > (n_tokens := base.config.vocab_size):
        raise InputError(f"--prefix_seq_len {prefix_seq_len} is more than the base model's {n_tokens} token ids")
    target = base_keys_values(base, prefix_seq_len)
    if hidden_dim == 0:
        return DirectPrefix(target)
    return fit(PrefixEncoder(base.config, prefix_seq_len, input_dim, hidden_dim, seed), target)


@jax.jit
def prefix_of(encoder: Encoder) -> Prefix:
    """Return an encoder's prefix; jitted, so that it is one program instead of one for each operation."""
    return encoder()


@jax.jit(static_argnums=1)
def base_keys_values(base: BaseModel, prefix_seq_len: int) -> Prefix:
    """Return the keys (after rotary) and values of the base model on token ids 0 … P−1, in float32."""
    _, keys_values = base.hidden(jnp.arange(prefix_seq_len)[None])
    return heads_first(jnp.stack([jnp.concatenate(layer) for layer in keys_values])).astype(jnp.float32)


@jax.jit(static_argnames="n_steps")
def fit(encoder: PrefixEncoder, target: Prefix, n_steps: int = 200) -> PrefixEncoder:
    """Fit the encoder to a prefix by mean squared error over all layers at once, in one compiled loop.

    AdamW at a constant 1e-4, betas (.9, .999), weight decay .01 except on biases, as the original does.
    PyTorch rounds p·(1 − lr·decay) to float32 before it subtracts Adam's step; over 200 steps that rounding
    adds up to 3e-5. The decayed copy is a loop variable because a fused multiply-add would skip that.
    """
    rate, decay = 1e-4, 0.01
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    gradient = jax.grad(lambda encoder: jnp.mean(jnp.square(encoder() - target)))

    def decayed(encoder: PrefixEncoder) -> PrefixEncoder:
        return jax.tree.map(lambda p, marked: p * (1 - rate * decay) if marked else p, encoder, decays(encoder))

    def step(_: Any, state: Any) -> Any:
        encoder, shrunk, moments = state
        direction, moments = adam.update(gradient(encoder), moments)
        encoder = jax.tree.map(lambda p, d: p - rate * d, shrunk, direction)
        return encoder, decayed(encoder), moments

    return jax.lax.fori_loop(0, n_steps, step, (encoder, decayed(encoder), adam.init(encoder)))[0]


def decays(encoder: Encoder) -> Encoder:
    """Return True for each parameter that weight decay applies to, False for biases."""
    return jax.tree.map_with_path(lambda path, _: "bias" not in path_name(path), encoder)


def load_prefix(path: str | Path, config: ModelConfig, tokenizer: Tokenizer | None = None) -> Prefix:
    """Load a prefix [L, 2, P, N, H] from a run folder, adapter folder or file, for a model's `config`.

    Files: .weight, .checkpoint, .safetensors, .npy. Raises InputError that names each field in which the file's base
    model differs from this one; `tokenizer`, if given, is compared, too.
    """
    path = expanded(path)
    folded, header = read_prefix(path)
    check_prefix(path, folded, header, config, tokenizer)
    return jax.device_put(to_layers(folded, config.n_layer, config.n_head, config.head_dim))


def check_prefix(
    path: str | Path,
    folded: np.ndarray,
    header: Mapping[str, str],
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Check that a prefix file's content was made for a base model. Raises InputError."""
    if differing := differing_fields(header, base_identity(config, tokenizer)):
        raise InputError.all(f"{path}: the prefix was made for another base model:", differing)
    check_sizes(path, folded.shape[0], folded.shape[1], config)


def check_sizes(path: str | Path, length: int, width: int, config: ModelConfig) -> None:
    """Check a file's folded prefix [length, width], or what its encoder makes, against a base. Raises InputError."""
    if width != config.folded_width:
        raise InputError(
            f"{path}: the prefix was made for another base model: it has {width} numbers per position, this model "
            f"{config.folded_width} = 2 · {config.n_layer} layers · {config.n_head} heads · {config.head_dim}"
        )
    if length >= config.max_positions:
        raise InputError(f"{path}: prefix length {length} leaves no room in {config.max_positions} positions")


def check_length(path: Path, prefix: Prefix, prefix_seq_len: int) -> None:
    """Raise InputError unless the prefix has the expected length."""
    if prefix.shape[2] != prefix_seq_len:
        raise InputError(f"{path}: has prefix length {prefix.shape[2]}, not --prefix_seq_len {prefix_seq_len}")


def save_prefix(
    folder: str | Path, prefix: Prefix, config: ModelConfig, tokenizer: Tokenizer, dev_loss: float | None = None
) -> None:
    """Write a prefix [L, 2, P, N, H] as a PEFT adapter folder whose header names the base model, and the dev loss.

    Raises InputError for a prefix that could not be loaded again, or for a run's folder (its prefix is in a subfolder),
    and OSError; an earlier prefix is then kept.
    """
    folder = expanded(folder)
    if is_run_folder(folder):
        raise InputError(f"{folder}: is a run's folder, whose prefix is in {PREFIX_FOLDER}/; name that one, or another")
    length, array = config.prefix_length(prefix), np.asarray(prefix, np.float32)
    if not 0 < length < config.max_positions:
        raise InputError(
            f"{folder}: a prefix must have 1 to {config.max_positions - 1} positions, this one has {length}"
        )
    if not np.isfinite(array).all():
        raise InputError(f"{folder}: the prefix holds numbers that are not finite; it is not written")
    folded = to_folded(array)  # by NumPy: only one of many processes writes, and must not run a program on all devices
    header = base_identity(config, tokenizer) | ({} if dev_loss is None else {DEV_LOSS: repr(float(dev_loss))})
    write_adapter(folder, folded, config.n_layer, config.n_head, header)
