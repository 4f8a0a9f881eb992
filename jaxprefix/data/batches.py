"""Rows → the arrays of a batch, padded or packed."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprefix.data.examples import Example
from jaxprefix.data.rows import IGNORED, label_counts, row_lengths, rows_of
from jaxprefix.data.shapes import PackedShape, PaddedShape, Shape, filled_shape, pack_rows, padded_shape
from jaxprefix.tokenizer import Tokenizer


class Packing(NamedTuple):
    """Where the texts of packed rows lie: int32 index arrays. `places` is the inverse of all `columns` together.

    An index one past the end means that nothing is there.
    """

    columns: tuple[np.ndarray, ...]
    """[rows, texts, slots] for each class of lengths: each token's column; n_columns in slots after a text's end."""
    places: np.ndarray
    """[rows, columns]: each token's index into the texts × slots of all classes, flattened, one class after another."""


class Batch(NamedTuple):
    """int32 arrays of shape [rows, columns], or [micro-batches, rows, columns]; JAX arrays inside compiled code."""

    tokens: np.ndarray
    labels: np.ndarray
    packing: Packing | None = None
    """For packed rows, where their texts lie."""
    labelled: Packing | None = None
    """For rows with few labels, the columns with a label, packed as if they were a text: only these enter the loss."""

    @property
    def n_labels(self) -> int:
        """Positions that enter the loss."""
        return int((self.labels != IGNORED).sum())


def lay_out(examples: Sequence[Example], tokenizer: Tokenizer, shape: Shape) -> Batch:
    """Lay the examples' rows out in a shape, padded or packed."""
    if isinstance(shape, PackedShape):
        return make_packed_batch(examples, tokenizer, shape)
    return make_padded_batch(examples, tokenizer, shape)


def make_padded_batch(examples: Sequence[Example], tokenizer: Tokenizer, shape: PaddedShape) -> Batch:
    """Lay the examples' rows into arrays, padded on the right and at the bottom."""
    n_rows, n_columns, n_labels = shape
    tokens = np.full((n_rows, n_columns), tokenizer.pad_id, np.int32)
    labels = np.full((n_rows, n_columns), IGNORED, np.int32)
    rows = itertools.chain.from_iterable(rows_of(example, tokenizer.bos_id, tokenizer.eos_id) for example in examples)
    for index, (inputs, targets) in enumerate(rows):
        tokens[index, : len(inputs)] = inputs
        labels[index, : len(targets)] = targets
    return Batch(tokens, labels, labelled=_labelled(labels, n_labels))


def make_packed_batch(examples: Sequence[Example], tokenizer: Tokenizer, shape: PackedShape) -> Batch:
    """Lay the examples' rows end to end, padded on the right."""
    n_rows, n_columns, classes, n_labels = shape
    *starts, n_places = [0, *itertools.accumulate(shape.slots)]  # each text's first place; places of a row
    tokens = np.full((n_rows, n_columns), tokenizer.pad_id, np.int32)
    labels = np.full((n_rows, n_columns), IGNORED, np.int32)
    columns = np.full((n_rows, n_places), n_columns, np.int32)
    places = np.full((n_rows, n_columns), n_places, np.int32)
    texts = [row for example in examples for row in rows_of(example, tokenizer.bos_id, tokenizer.eos_id)]
    for row, members in enumerate(pack_rows([len(inputs) for inputs, _ in texts], n_rows, len(starts))):
        start = 0
        for place, (inputs, targets) in zip(starts, (texts[text] for text in members), strict=False):
            end = start + len(inputs)
            tokens[row, start:end], labels[row, start:end] = inputs, targets
            columns[row, place : place + len(inputs)] = np.arange(start, end)
            places[row, start:end] = place + np.arange(len(inputs))
            start = end
    ends = itertools.accumulate(n_texts * n_slots for n_texts, n_slots in classes)
    of_classes = np.split(columns, list(ends)[:-1], axis=1)
    by_text = (part.reshape(n_rows, *size) for part, size in zip(of_classes, classes, strict=True))
    return Batch(tokens, labels, Packing(tuple(by_text), places), _labelled(labels, n_labels))


def _labelled(labels: np.ndarray, n_labels: int | None) -> Packing | None:
    """Return where each row's labels lie, with room for n_labels per row; None if n_labels is None."""
    if n_labels is None:
        return None
    n_rows, n_columns = labels.shape
    columns = np.full((n_rows, 1, n_labels), n_columns, np.int32)
    places = np.full((n_rows, n_columns), n_labels, np.int32)
    for row, own in enumerate(map(np.flatnonzero, labels != IGNORED)):
        columns[row, 0, : len(own)] = own
        places[row, own] = np.arange(len(own))
    return Packing((columns,), places)


def filled_batches(examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int, n_parts: int) -> Iterator[Batch]:
    """Yield all examples in packed batches that share one shape and are about equally full.

    A batch has about as many columns as batch_size padded examples take, and at most four times as many examples.
    """
    lengths = row_lengths(examples)
    padded = padded_shape(examples, batch_size, n_parts)
    n_batches = math.ceil(max(lengths.sum() / (padded.n_rows * padded.n_columns), len(examples) / (4 * batch_size)))
    groups = pack_rows(lengths.sum(axis=1).tolist(), n_batches, 4 * batch_size)
    shape = filled_shape(lengths, label_counts(examples), groups, n_parts)
    for group in groups:
        yield make_packed_batch([examples[number] for number in group], tokenizer, shape)
