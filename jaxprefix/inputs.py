"""What a training run reads, and checks, before it starts; and the batch of every update."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprefix.base_folder import BaseFolder, open_base
from jaxprefix.config import TrainConfig
from jaxprefix.data.batches import Batch, lay_out
from jaxprefix.data.examples import Chunking, Examples
from jaxprefix.data.plan import UpdatePlan, micro_batches_of, split_examples
from jaxprefix.data.rows import row_lengths, without_long_rows
from jaxprefix.data.shapes import Shape, fitting_shape, packed_shapes, padded_shape
from jaxprefix.data.token_cache import load_examples
from jaxprefix.hub import fetch_weights
from jaxprefix.models.attention import check_attention
from jaxprefix.models.config import ModelConfig
from jaxprefix.recipe import RECIPES
from jaxprefix.sharding import n_row_parts
from jaxprefix.tokenizer import Tokenizer


class Inputs(NamedTuple):
    """What a run reads, and checks, before it starts."""

    base: BaseFolder
    train_set: Examples
    dev_set: Examples
    n_unused: int
    """Examples of the file in neither set."""
    longest_row: int
    """Tokens."""
    plan: UpdatePlan


def read_inputs(config: TrainConfig) -> Inputs:
    """Read configuration, tokenizer and data, and check that they fit together before weights are downloaded."""
    base = open_base(config.pretrained_model_dir, config.revision, config.model_type)
    check_attention(config.compute.attention, base.config.head_dim)
    inputs = divided(config, base, load_data(config, base.config, base.tokenizer))
    fetch_weights(config.pretrained_model_dir, base.path)
    return inputs


def divided(config: TrainConfig, base: BaseFolder, examples: Examples) -> Inputs:
    """Divide a file's examples into a run's sets and updates.

    Raises InputError if there are too few, one has too long a row, or the updates cannot be made of them.
    """
    path, sizes = config.data_filepath, (config.train_data_size, config.dev_data_size)
    train_set, dev_set = split_examples(examples, *sizes, path)
    longest_row = check_rows(base.config, base.tokenizer, config.prefix_seq_len, path, train_set, dev_set)
    plan = UpdatePlan(config, len(train_set))
    return Inputs(base, train_set, dev_set, len(examples) - sum(sizes), longest_row, plan)


def load_data(config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer) -> Examples:
    """Return the examples of the run's data file."""
    recipe = RECIPES[config.recipe]
    chunking = Chunking(tokenizer, config.suffix, config.max_seq_len, recipe, config.skip_bad_lines)
    return usable_examples(config.data_filepath, chunking, model, config.prefix_seq_len)


def usable_examples(path: Path, chunking: Chunking, model: ModelConfig, prefix_len: int) -> Examples:
    """Return a file's examples; if bad lines are skipped, leave out those that do not fit behind the prefix."""
    examples = load_examples(path, chunking)
    if chunking.skip_bad_lines and prefix_len < model.max_positions:
        return without_long_rows(examples, model.max_positions - prefix_len, path)
    return examples


def check_rows(model: ModelConfig, tokenizer: Tokenizer, prefix_len: int, path: Path, *parts: Examples) -> int:
    """Check that the longest row of a file's examples fits behind the prefix, and return how many tokens it has.

    Raises an InputError that names that row's line, quotes how its text begins, and says how many do not fit.
    """
    model.check_vocabulary(tokenizer.vocab_size)
    measured = [(part, row_lengths(part).max(axis=1)) for part in parts]
    n_beyond = sum(int((lengths > model.max_positions - prefix_len).sum()) for _, lengths in measured)
    what = f"the longest of {n_beyond:,} examples that do not fit" if n_beyond > 1 else "the longest row"
    part, lengths = max(measured, key=lambda pair: pair[1].max())
    index, longest = int(lengths.argmax()), int(lengths.max())
    where, (prompt, target) = f"{path}, line {part.line_numbers[index]}: ", part[index]
    begins = tokenizer.decode([*prompt, *target][:40])
    model.check_fit(prefix_len, longest, what, begins, where)
    return longest


def batch_shapes(config: TrainConfig, inputs: Inputs, mesh: Mesh) -> Sequence[Shape]:
    """Return the shapes of a run's micro-batches, ascending; padded ones all have one shape."""
    train_set, plan = inputs.train_set, inputs.plan
    if config.packing:
        updates = map(micro_batches_of(config, train_set, plan), range(plan.n_updates))
        return packed_shapes(train_set, updates, n_row_parts(mesh))
    return [padded_shape(train_set, config.batch_size, n_row_parts(mesh))]


def update_batches(config: TrainConfig, inputs: Inputs, shapes: Sequence[Shape], first: int) -> Iterator[Batch]:
    """Yield the batches [micro-batches, rows, columns] of all updates from `first` on, each of one of these shapes."""
    plan, tokenizer = inputs.plan, inputs.base.tokenizer
    micro_batches = micro_batches_of(config, inputs.train_set, plan)
    for number in range(first, plan.n_updates):
        groups = [[inputs.train_set[i] for i in group] for group in micro_batches(number)]
        groups += [[]] * (config.n_accum_steps - len(groups))
        shape = fitting_shape(shapes, groups)
        parts = [lay_out(group, tokenizer, shape) for group in groups]
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
