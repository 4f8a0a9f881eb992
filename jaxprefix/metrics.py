"""How well the base model predicts data, with a prefix or without: loss and ppl."""

import functools
import math
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from jaxprefix.config import TrainConfig
from jaxprefix.data.batches import Batch, filled_batches, make_padded_batch
from jaxprefix.data.examples import Example
from jaxprefix.data.shapes import padded_shape
from jaxprefix.inputs import Inputs
from jaxprefix.loss import batch_loss
from jaxprefix.machine.hosts import spread
from jaxprefix.models import BaseModel
from jaxprefix.prefix import Prefix
from jaxprefix.recipe import RECIPES, Recipe
from jaxprefix.sharding import n_row_parts, split_rows, with_split_rows
from jaxprefix.tokenizer import Tokenizer


class LossSums(NamedTuple):
    """Sums over batches."""

    n_batches: int = 0
    n_labels: int = 0
    loss: float = 0.0
    """Of all labels."""
    mean_loss: float = 0.0
    """Of the batches' means."""
    mean_ppl: float = 0.0
    """Of the batches' ppl."""
    seconds: float = 0.0


class LossMeter:
    """Averages losses over all labels or, as the original does, over the batches' means (`average_batch_means`)."""

    def __init__(self, recipe: Recipe, window: Sequence[Any] = ()):
        """Begin with the `LossSums` of a checkpoint, if there are any."""
        self._average_batch_means = recipe.average_batch_means
        self.sums = LossSums(*window)

    def add(self, loss: float, n_labels: int, seconds: float = 0.0) -> None:
        """Take in a batch's mean loss, its number of labels and how long it took."""
        batch = LossSums(1, n_labels, loss * n_labels, loss, _perplexity(loss), seconds)
        self.sums = LossSums(*map(operator.add, self.sums, batch))

    def means(self) -> dict[str, float]:
        """Return loss (nats per label) and ppl; NaN if there was no batch."""
        sums = self.sums
        if not sums.n_batches:
            return {"loss": math.nan, "ppl": math.nan}
        if self._average_batch_means:
            return {"loss": sums.mean_loss / sums.n_batches, "ppl": sums.mean_ppl / sums.n_batches}
        return {"loss": sums.loss / sums.n_labels, "ppl": _perplexity(sums.loss / sums.n_labels)}

    @property
    def tokens_per_s(self) -> float:
        """Labels per second over the batches."""
        return self.sums.n_labels / max(self.sums.seconds, 1e-9)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def evaluation_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    batch_size: int,
    mesh: Mesh | AbstractMesh,
    packing: bool = False,
) -> Iterator[Batch]:
    """Yield the examples in batches of one shape, whose rows can be split over the mesh.

    Padded batches hold batch_size examples, in order; packed ones, about as many tokens as those do with padding.
    """
    if packing:
        yield from filled_batches(examples, tokenizer, batch_size, n_row_parts(mesh))
        return
    shape = padded_shape(examples, batch_size, n_row_parts(mesh))
    for first in range(0, len(examples), batch_size):
        yield make_padded_batch(examples[first : first + batch_size], tokenizer, shape)


def dev_batches(config: TrainConfig, inputs: Inputs, mesh: Mesh) -> Iterator[Batch]:
    """Yield a run's dev set in batches of one shape."""
    packing = config.packing and RECIPES[config.recipe].packs_dev
    return evaluation_batches(inputs.dev_set, inputs.base.tokenizer, config.batch_size, mesh, packing)


def loss_and_ppl(
    base: BaseModel, prefix: Prefix | None, batches: Iterable[Batch], mesh: Mesh, recipe: Recipe = Recipe()
) -> dict[str, float]:
    """Return {"loss": nats per token, "ppl": perplexity}, averaged over the batches as the recipe says.

    `mesh` is that of the base.
    """
    meter, in_flight = LossMeter(recipe), deque[tuple[Array, int]]()

    def settle(n_left: int) -> None:
        while len(in_flight) > n_left:
            total, n_labels = in_flight.popleft()
            meter.add(float(total) / n_labels, n_labels)

    for batch in batches:
        in_flight.append((loss_on_mesh(base, prefix, spread(batch, split_rows(mesh, axis=0)), mesh), batch.n_labels))
        settle(n_left=1)
    settle(n_left=0)
    return meter.means()


@functools.partial(jax.jit, static_argnames="mesh")
def loss_on_mesh(base: BaseModel, prefix: Prefix | None, batch: Any, mesh: Mesh) -> Float[Array, ""]:
    """Return the cross entropy in nats of a `Batch` of JAX arrays, summed over all labels."""
    return batch_loss(with_split_rows(base, mesh), prefix, batch, mesh.size)
