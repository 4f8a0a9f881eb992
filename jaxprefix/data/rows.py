"""Examples → rows of tokens and labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxprefix.data.examples import Example, Examples, not_empty

IGNORED = -100
"""The label of a position that has no part in the loss."""


def without_long_rows(examples: Examples, n_most: int, path: Path) -> Examples:
    """Leave out the examples that have a row of more than n_most tokens, and count them in the tally.

    Raises InputError if none is left.
    """
    fits = row_lengths(examples).max(axis=1) <= n_most
    if fits.all():
        return examples
    kept = examples[fits]
    first = int(examples.line_numbers[fits.argmin()])
    kept.tally = kept.tally._replace(n_too_long=int((~fits).sum()), first_too_long=first)
    return not_empty(kept, path)


def rows_of(example: Example, bos_id: int, eos_id: int) -> list[tuple[list[int], list[int]]]:
    """Return the (inputs, labels) rows of an example: one if it has a prompt, else two.

    Without a prompt, one row starts at bos and one at the target's first token, so that the prefix learns
    to work at the beginning of a text and in its middle.
    """
    prompt, target = example
    if prompt:
        return [(prompt + target, [IGNORED] * (len(prompt) - 1) + target + [eos_id])]
    return [([bos_id, *target], [*target, eos_id]), (target, [*target[1:], eos_id])]


def label_counts(examples: Sequence[Example]) -> np.ndarray:
    """Return how many labels each example's two rows have: [examples, 2]; with a prompt, there is no second: 0."""
    prompts, targets = _lengths(examples)
    return np.stack([targets + 1, np.where(prompts > 0, 0, targets)], axis=1)


def row_lengths(examples: Sequence[Example]) -> np.ndarray:
    """Return how many tokens each example's two rows have: [examples, 2]; with a prompt, there is no second: 0."""
    prompts, targets = _lengths(examples)
    return np.stack([np.where(prompts > 0, prompts + targets, targets + 1), np.where(prompts > 0, 0, targets)], axis=1)


def max_rows_per_example(lengths: np.ndarray) -> int:
    """Return the most rows that an example makes, given the `row_lengths` of all: one if all have prompts, else two."""
    return 2 if lengths[:, 1].any() else 1


def _lengths(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens each example's prompt and its target have."""
    if isinstance(examples, Examples):
        return examples.prompt_lengths, examples.target_lengths
    prompts, targets = zip(*((len(prompt), len(target)) for prompt, target in examples), strict=True)
    return np.array(prompts), np.array(targets)
