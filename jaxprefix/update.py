"""One update of the prefix encoder: loss, gradient with respect to the prefix, AdamW. Legend: `models/attention.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxprefix.config import AdamW, TrainConfig
from jaxprefix.data.batches import Batch
from jaxprefix.data.rows import IGNORED
from jaxprefix.loss import batch_loss
from jaxprefix.machine.devices import on_a_cpu
from jaxprefix.models import BaseModel
from jaxprefix.prefix import Encoder, Prefix, decays
from jaxprefix.recipe import RECIPES, Recipe
from jaxprefix.sharding import replicated, split_heads, split_rows, with_split_rows


class LossScale(NamedTuple):
    """A factor on the loss that keeps float16 gradients from vanishing, adapted as training goes on.

    Starts at 2^10; halves when a gradient overflows (that update is skipped), doubles after 1000 in a row that did not.
    """

    value: Float[Array, ""]
    """Called `loss_scale` in checkpoints, see `models.path_name`."""
    n_good: Int[Array, ""]

    @classmethod
    def start(cls) -> "LossScale":
        """Return the scale of the first update."""
        return cls(jnp.float32(2**10), jnp.int32(0))

    def adjusted(self, finite: Bool[Array, ""]) -> "LossScale":
        """Return the scale for the next update, given whether this one's gradients were finite."""
        grow = finite & (self.n_good + 1 >= 1000)
        value = jnp.where(finite, jnp.where(grow, self.value * 2, self.value), jnp.maximum(self.value / 2, 1))
        return LossScale(value, jnp.where(finite & ~grow, self.n_good + 1, 0))


class TrainState(NamedTuple):
    """All arrays that an update changes."""

    encoder: Encoder
    moments: optax.OptState
    loss_scale: LossScale | None


class Outcome(NamedTuple):
    """What an update reports."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    """Of the gradient with respect to the encoder, before clipping."""


class LearningRate(NamedTuple):
    """Linear warmup, linear decay. Its numbers are inputs of the compiled update: others need no recompilation."""

    highest: Float[Array, ""]
    floor: Float[Array, ""]
    n_warmup: Float[Array, ""]
    n_steps: Float[Array, ""]
    """From the first step to the end of the decay, warmup included."""
    steps_per_update: Float[Array, ""]

    @jax.jit  # for a log line: one program, instead of one for each operation
    def __call__(self, n_done: Int[Array, ""] | int) -> Float[Array, ""]:
        """Return the rate after n_done updates."""
        step = n_done * self.steps_per_update
        warmup = step / jnp.maximum(self.n_warmup, 1)
        decay = (self.n_steps - step) / jnp.maximum(self.n_steps - self.n_warmup, 1)
        multiplier = jnp.where(step < self.n_warmup, warmup, jnp.maximum(decay, 0.0))
        return jnp.maximum(self.highest * multiplier, self.floor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """A base model, flattened once.

    Flattening a Flax module at each call takes 0.3 ms for 12 layers and over 1 ms for 44, as long as a small update on
    a GPU.
    """

    arrays: list[Any]
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, base: BaseModel) -> "FrozenBase":
        """Flatten a model."""
        return cls(*jax.tree.flatten(base))

    @property
    def model(self) -> BaseModel:
        """The model again, not flattened."""
        return jax.tree.unflatten(self.structure, self.arrays)


Update = Callable[[TrainState, LearningRate, FrozenBase, Batch], tuple[TrainState, Outcome]]


def learning_rate(config: TrainConfig, n_updates: int) -> LearningRate:
    """Return the learning rate of a run of n_updates updates."""
    recipe = RECIPES[config.recipe]
    n_steps = config.n_training_steps if recipe.decay_over_requested_steps else n_updates
    floor = 0.0 if recipe.decay_over_requested_steps else config.min_lr
    counts = (config.n_warmup_steps, n_steps, recipe.schedule_steps_per_update)
    numbers = np.array([config.max_lr, floor, *counts], np.float32)
    return LearningRate(*map(jax.device_put, numbers))


def make_optimizer(adamw: AdamW, rate: optax.Schedule) -> optax.GradientTransformation:
    """Make the optimizer: clipping by the global norm, then AdamW with decoupled weight decay on all but biases."""
    beta1, beta2, eps, weight_decay, grad_clip = adamw
    steps = optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decays)
    return optax.chain(clipping(grad_clip), steps)  # always a chain, so that names in checkpoints stay the same


def clipping(grad_clip: float) -> optax.GradientTransformation:
    """Make the clipping by the global norm; with --grad_clip 0, nothing is clipped."""
    return optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()


def first_state(config: TrainConfig, encoder: Encoder) -> TrainState:
    """Return the state before the first update of an encoder."""
    optimizer = make_optimizer(config.adamw, optax.constant_schedule(0))  # the first state does not depend on the rate
    scale = LossScale.start() if config.dtype == "float16" else None
    return TrainState(encoder, jax.jit(optimizer.init)(encoder), scale)


def loss_and_gradient(
    encoder: Encoder,
    base: BaseModel,
    batch: Batch,
    recipe: Recipe,
    mesh: Mesh,
    scale: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, ""], Encoder]:
    """Return the mean loss of a batch [micro-batches, rows, columns] and its gradient with respect to the encoder.

    The encoder runs once; the gradient with respect to the prefix is summed over the micro-batches and then pulled back
    through the encoder. The base is an argument that nothing differentiates: no other freezing is needed.
    Inside, the loss is multiplied by `scale`, so that float16 gradients do not vanish.
    """
    prefix, pull_back = jax.vjp(lambda encoder: encoder(), encoder)
    prefix = jax.lax.with_sharding_constraint(prefix, split_heads(mesh, base.config.n_head))
    counts = (batch.labels != IGNORED).sum(axis=(1, 2))
    totals = counts * (counts > 0).sum() if recipe.average_batch_means else counts.sum()
    per_label = jnp.broadcast_to(jnp.float32(1) / jnp.maximum(totals, 1), counts.shape)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        batch, weight = micro_batch
        # XLA's CPU compiler would transpose bfloat16 weights before the loop, and keep a second copy of all of them.
        here, weight = jax.lax.optimization_barrier((base, weight)) if on_a_cpu() else (base, weight)

        def scaled_loss(prefix: Prefix) -> Float[Array, ""]:
            return batch_loss(here, prefix, batch, mesh.size) * weight * scale

        return jax.tree.map(jnp.add, total, jax.value_and_grad(scaled_loss)(prefix)), None

    zero = (jnp.float32(0), jnp.zeros_like(prefix))
    (loss, gradient), _ = jax.lax.scan(add, zero, (batch, per_label))
    return loss / scale, pull_back(gradient / scale)[0]


def make_update(adamw: AdamW, recipe: Recipe, mesh: Mesh) -> Update:
    """Return one update, jitted: (state, rate, frozen base, batch [micro-batches, rows, columns]) → (state, outcome).

    An update whose loss or gradient is not finite changes nothing in the state but the loss scale. The base keeps its
    placement on the mesh.
    """

    def update(state: TrainState, rate: LearningRate, base: FrozenBase, batch: Batch) -> tuple[TrainState, Outcome]:
        optimizer = make_optimizer(adamw, rate)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.value
        model = with_split_rows(base.model, mesh)
        loss, gradient = loss_and_gradient(state.encoder, model, batch, recipe, mesh, scale)
        updates, moments = optimizer.update(gradient, state.moments, state.encoder)
        outcome = Outcome(loss, optax.tree.norm(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(outcome.gradient_norm)
        moved = optax.apply_updates(state.encoder, updates), moments
        encoder, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state[:2])
        scale_then = None if state.loss_scale is None else state.loss_scale.adjusted(finite)
        return TrainState(encoder, moments, scale_then), outcome

    everywhere = replicated(mesh)
    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(everywhere, everywhere, None, split_rows(mesh)),
        out_shardings=everywhere,
    )


def n_applied(state: TrainState) -> int:
    """Return how many updates have changed the encoder; float16 skips some."""
    return int(optax.tree.get_all_with_path(state.moments, "count")[0][1])
