"""Which examples are trained on: the training set, and what each update sees of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.errors import InputError
from jaxprefix.config import TrainConfig
from jaxprefix.data.examples import Example, Examples
from jaxprefix.data.rows import row_lengths
from jaxprefix.data.shapes import pack_rows
from jaxprefix.recipe import RECIPES


def split_examples(examples: Examples, n_train: int, n_dev: int, path: Path) -> tuple[Examples, Examples]:
    """Return the first n_train and the last n_dev examples. Raises InputError if there are fewer than the sum."""
    if len(examples) < n_train + n_dev:
        sizes = f"--train_data_size {n_train} + --dev_data_size {n_dev}"
        report = examples.tally.in_error(path)
        raise InputError(f"{path}: makes {len(examples)} examples, fewer than {sizes}; lower one, or both{report}")
    return examples[:n_train], examples[-n_dev:]


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """Which examples each update sees: a function of the update's number alone, so a run can resume at any update.

    Raises InputError if the recipe accumulates across epochs and an update needs more batches than an epoch has.
    """

    config: TrainConfig
    n_examples: int

    def __post_init__(self) -> None:
        if self._carries and self.config.n_accum_steps > self.batches_per_epoch:
            raise InputError(
                f"--n_accum_steps {self.config.n_accum_steps} is more than the {self.batches_per_epoch} batches of an "
                f"epoch, which --recipe {self.config.recipe} does not allow"
            )

    @property
    def _carries(self) -> bool:
        return RECIPES[self.config.recipe].carry_accumulation

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch; the last one may be smaller."""
        return -(-self.n_examples // self.config.batch_size)

    @property
    def n_updates(self) -> int:
        """Updates of the whole run."""
        return min(self.config.n_training_steps, self._updates_before_epoch(self.config.n_epochs))

    def micro_batches(self, update: int) -> list[list[int]]:
        """Return the example numbers of each micro-batch of an update (counted from 0)."""
        if self._carries:
            first = update * self.config.n_accum_steps
            places = [divmod(first + i, self.batches_per_epoch) for i in range(self.config.n_accum_steps)]
        else:
            epoch, group = divmod(update, self._updates_before_epoch(1))
            first = group * self.config.n_accum_steps
            places = [(epoch, i) for i in range(first, min(first + self.config.n_accum_steps, self.batches_per_epoch))]
        return [self._batch(epoch, index) for epoch, index in places]

    def epoch_of(self, update: int) -> int:
        """Return the epoch in which an update is made: that of its last micro-batch."""
        if self._carries:
            return ((update + 1) * self.config.n_accum_steps - 1) // self.batches_per_epoch
        return update // self._updates_before_epoch(1)

    def ends_epoch(self, n_done: int) -> bool:
        """Tell whether the n_done-th update is the last of its epoch, or of the run."""
        return n_done in (self._updates_before_epoch(self.epoch_of(n_done - 1) + 1), self.n_updates)

    def _updates_before_epoch(self, epoch: int) -> int:
        if self._carries:
            return epoch * self.batches_per_epoch // self.config.n_accum_steps
        return epoch * -(-self.batches_per_epoch // self.config.n_accum_steps)

    def _batch(self, epoch: int, index: int) -> list[int]:
        order = epoch_order(self.n_examples, self.config.seed, epoch)
        return order[index * self.config.batch_size : (index + 1) * self.config.batch_size].tolist()


def micro_batches_of(
    config: TrainConfig, train_set: Sequence[Example], plan: UpdatePlan
) -> Callable[[int], list[list[int]]]:
    """Return a function from an update's number to the example numbers of each of its micro-batches.

    An update's packed micro-batches have one shape, so its examples are dealt out anew, to about equally long ones. If
    the recipe averages the means of micro-batches, they are not, since it then matters which examples each one holds.
    """
    if config.n_accum_steps == 1 or not config.packing or RECIPES[config.recipe].average_batch_means:
        return plan.micro_batches
    lengths = row_lengths(train_set).sum(axis=1)

    def about_equal(update: int) -> list[list[int]]:
        groups = plan.micro_batches(update)
        numbers = np.concatenate(groups)
        dealt = pack_rows(lengths[numbers].tolist(), len(groups), config.batch_size)
        return [numbers[group].tolist() for group in dealt]

    return about_equal


@functools.lru_cache(maxsize=2)
def epoch_order(n_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the examples in an epoch: a fresh permutation for every (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n_examples)
