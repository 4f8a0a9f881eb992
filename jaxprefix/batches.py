"""Rows → the arrays of a batch, padded or packed, and of what shapes. No jax in here."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprefix.data import IGNORED, max_rows_per_example, row_labels, row_lengths, rows_of
from jaxprefix.examples import Example
from jaxprefix.tokenizer import Tokenizer

SAMPLED_UPDATES = 2000
"""Updates whose batches are looked at to choose the shapes of packed ones."""
SHAPES = 4
"""Most shapes of a run's packed batches."""
WORTH_IT = 1.01
"""Up to so many times the least columns are better than another shape, which takes time to compile, and memory."""
COLUMN_STEPS = 20
"""Quantiles of the batches' column counts that are tried as widths of the shapes."""
COLUMN_MULTIPLE = 8
FEW_LABELS = 0.9
"""Where at most this share of the columns has labels, as behind prompts, the loss is computed for those alone."""


class Packing(NamedTuple):
    """Where the texts of packed rows lie: two int32 index arrays, each the inverse of the other.

    An index one past the end means that nothing is there.
    """

    columns: np.ndarray
    """[rows, texts, slots]: the column of each token; n_columns after the text's last one."""
    places: np.ndarray
    """[rows, columns]: each token's index into texts × slots, flattened; texts × slots for padding."""


class Batch(NamedTuple):
    """int32 arrays of shape [rows, columns], or [micro-batches, rows, columns]; JAX's inside compiled functions."""

    tokens: np.ndarray
    labels: np.ndarray
    packing: Packing | None = None
    """For packed rows, the texts in them."""
    labelled: Packing | None = None
    """For rows of few labels, the columns that have one, as if they were a text; the loss is computed for no others."""

    @property
    def n_labels(self) -> int:
        """Positions that have a part in the loss."""
        return int((self.labels != IGNORED).sum())


class PaddedShape(NamedTuple):
    """The shape of a batch whose rows are texts."""

    n_rows: int
    n_columns: int
    n_labels: int | None = None
    """Most labels of a row, if the loss is computed for labelled columns alone."""


def padded_shape(examples: Sequence[Example], batch_size: int, n_parts: int) -> PaddedShape:
    """Return the shape that holds any batch of these examples, whose rows can be split into n_parts."""
    lengths, n_labels = row_lengths(examples), int(row_labels(examples).max())
    n_rows, n_columns = max_rows_per_example(lengths) * batch_size, int(lengths.max())
    return PaddedShape(round_up(n_rows, n_parts), n_columns, _if_few(n_labels, n_columns))


def make_batch(
    examples: Sequence[Example], tokenizer: Tokenizer, n_rows: int, n_columns: int, n_labels: int | None = None
) -> Batch:
    """Lay the examples' rows into arrays of a `PaddedShape`, padded on the right and at the bottom."""
    tokens = np.full((n_rows, n_columns), tokenizer.pad_id, np.int32)
    labels = np.full((n_rows, n_columns), IGNORED, np.int32)
    rows = itertools.chain.from_iterable(rows_of(example, tokenizer.bos_id, tokenizer.eos_id) for example in examples)
    for index, (inputs, targets) in enumerate(rows):
        tokens[index, : len(inputs)] = inputs
        labels[index, : len(targets)] = targets
    return Batch(tokens, labels, labelled=_labelled(labels, n_labels))


def _labelled(labels: np.ndarray, n_labels: int | None) -> Packing | None:
    """Return where the labels of rows lie, in room for n_labels of each."""
    if n_labels is None:
        return None
    n_rows, n_columns = labels.shape
    columns = np.full((n_rows, 1, n_labels), n_columns, np.int32)
    places = np.full((n_rows, n_columns), n_labels, np.int32)
    for row, own in enumerate(map(np.flatnonzero, labels != IGNORED)):
        columns[row, 0, : len(own)] = own
        places[row, own] = np.arange(len(own))
    return Packing(columns, places)


def _if_few(n_labels: int, n_columns: int) -> int | None:
    """Return the room that labels take, or None if they take nearly all columns."""
    room = round_up(n_labels)
    return room if room <= FEW_LABELS * n_columns else None


def pack_rows(lengths: Sequence[int], n_rows: int, n_texts: int) -> list[list[int]]:
    """Spread texts over packed rows of n_texts at most, longest first into the emptiest; return each row's numbers."""
    loads = [(0, row) for row in range(n_rows)]
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        load, row = heapq.heappop(loads)
        rows[row].append(text)
        if len(rows[row]) < n_texts:
            heapq.heappush(loads, (load + lengths[text], row))
    return rows


class PackedShape(NamedTuple):
    """The shape of a packed batch."""

    n_rows: int
    n_columns: int
    n_texts: int
    """Texts of a row."""
    n_slots: int
    """Tokens of a text."""
    n_labels: int | None = None
    """Most labels of a row, if the loss is computed for labelled columns alone."""

    def holds(self, examples: Sequence[Example]) -> bool:
        """Tell whether examples have room."""
        columns, slots, labels = _needs(row_lengths(examples), row_labels(examples), self.n_rows, self.n_texts)
        fit = columns <= self.n_columns and slots <= self.n_slots
        return fit and (self.n_labels is None or labels <= self.n_labels)


Shape = PackedShape | PaddedShape


def _needs(lengths: np.ndarray, labels: np.ndarray, n_rows: int, n_texts: int) -> tuple[int, int, int]:
    """Return the columns, slots and labels that the rows of examples, [examples, 2], need when they are packed."""
    texts = lengths > 0
    lengths_of_texts = lengths[texts].tolist()
    rows = pack_rows(lengths_of_texts, n_rows, n_texts)
    return max(_loads(lengths_of_texts, rows)), max(lengths_of_texts), max(_loads(labels[texts].tolist(), rows))


def _loads(lengths: Sequence[int], rows: list[list[int]]) -> list[int]:
    return [sum(lengths[text] for text in row) for row in rows]


def make_packed_batch(examples: Sequence[Example], tokenizer: Tokenizer, shape: PackedShape) -> Batch:
    """Lay the examples' rows end to end, padded on the right."""
    n_rows, n_columns, n_texts, n_slots, n_labels = shape
    tokens = np.full((n_rows, n_columns), tokenizer.pad_id, np.int32)
    labels = np.full((n_rows, n_columns), IGNORED, np.int32)
    columns = np.full((n_rows, n_texts, n_slots), n_columns, np.int32)
    places = np.full((n_rows, n_columns), n_texts * n_slots, np.int32)
    texts = [row for example in examples for row in rows_of(example, tokenizer.bos_id, tokenizer.eos_id)]
    for row, members in enumerate(pack_rows([len(inputs) for inputs, _ in texts], n_rows, n_texts)):
        start = 0
        for place, (inputs, targets) in enumerate(texts[text] for text in members):
            end = start + len(inputs)
            tokens[row, start:end], labels[row, start:end] = inputs, targets
            columns[row, place, : len(inputs)] = np.arange(start, end)
            places[row, start:end] = place * n_slots + np.arange(len(inputs))
            start = end
    return Batch(tokens, labels, Packing(columns, places), _labelled(labels, n_labels))


def packed_shapes(examples: Sequence[Example], updates: Iterable[list[list[int]]], n_rows: int) -> list[PackedShape]:
    """Choose the few shapes of a run's packed batches, each compiled once, from the batches of its first updates.

    Shapes ascend. Their widths leave next to the least padding over the sampled updates; n_slots is the longest text
    of the updates that use a shape, n_labels their most labels. The last shape holds every update or, if there are
    more updates than are sampled, any batch that these examples can make.
    """
    sample = list(itertools.islice(updates, SAMPLED_UPDATES + 1))
    n_examples = max(len(batch) for batches in sample for batch in batches)
    lengths, labels = row_lengths(examples), row_labels(examples)
    n_texts = -(-n_examples * max_rows_per_example(lengths) // n_rows)
    needs = np.array(
        [
            np.max([_needs(lengths[batch], labels[batch], n_rows, n_texts) for batch in batches], axis=0)
            for batches in sample
        ]
    )

    def at_most_in_a_row(of_texts: np.ndarray) -> int:
        return min(n_texts * int(of_texts.max()), int(np.sort(of_texts.sum(axis=1))[-n_examples:].sum()))

    if len(sample) > SAMPLED_UPDATES:
        last = [at_most_in_a_row(lengths), int(lengths.max()), at_most_in_a_row(labels)]
    else:
        last = needs.max(axis=0).tolist()

    def taken(columns: Sequence[int]) -> np.ndarray:
        return np.searchsorted(columns, needs[:, 0])

    steps = sorted({round_up(columns) for columns in np.quantile(needs[:, 0], np.linspace(0, 1, COLUMN_STEPS + 1)[1:])})
    choices = [chosen for n in range(SHAPES) for chosen in itertools.combinations(steps, n)]
    totals = [int(np.take([*chosen, last[0]], taken(chosen)).sum()) for chosen in choices]
    close = [(len(c), total, c) for c, total in zip(choices, totals, strict=True) if total <= WORTH_IT * min(totals)]
    best = min(close)[2]
    used = [(n, *needs[taken(best) <= i, 1:].max(axis=0).tolist()) for i, n in enumerate(best)]
    return [
        PackedShape(n_rows, n_columns, n_texts, n_slots, _if_few(n_labels, n_columns))
        for n_columns, n_slots, n_labels in sorted({*used, (round_up(last[0]), *last[1:])})
    ]


def round_up(number: float | int, multiple: int = COLUMN_MULTIPLE) -> int:
    """Return the least multiple that is not below a number."""
    return math.ceil(number / multiple) * multiple


def lay_out(examples: Sequence[Example], tokenizer: Tokenizer, shape: Shape) -> Batch:
    """Lay the examples' rows out in a shape, padded or packed."""
    if isinstance(shape, PackedShape):
        return make_packed_batch(examples, tokenizer, shape)
    return make_batch(examples, tokenizer, *shape)


def filled_batches(examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int, n_parts: int) -> Iterator[Batch]:
    """Yield all examples in packed batches of one shape, equally full.

    A batch has about the columns that batch_size examples take when they are padded, and at most twice their texts.
    """
    lengths, labels = row_lengths(examples), row_labels(examples)
    padded = padded_shape(examples, batch_size, n_parts)
    n_batches = math.ceil(max(lengths.sum() / (padded.n_rows * padded.n_columns), len(examples) / (2 * batch_size)))
    groups = pack_rows(lengths.sum(axis=1).tolist(), n_batches, 2 * batch_size)
    n_texts = -(-max(map(len, groups)) * max_rows_per_example(lengths) // n_parts)
    needs = [_needs(lengths[group], labels[group], n_parts, n_texts) for group in groups]
    n_columns, n_slots, n_labels = np.max(needs, axis=0).tolist()
    shape = PackedShape(n_parts, round_up(n_columns), n_texts, n_slots, _if_few(n_labels, n_columns))
    for group in groups:
        yield make_packed_batch([examples[number] for number in group], tokenizer, shape)


def fitting_shape(shapes: Sequence[Shape], groups: Sequence[Sequence[Example]]) -> Shape:
    """Return the first shape that holds all micro-batches of an update."""
    return next(s for s in shapes if not isinstance(s, PackedShape) or all(map(s.holds, filter(len, groups))))
