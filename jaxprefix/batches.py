"""Rows → the arrays of a batch, padded or packed, and the choice of their shapes. No jax in here."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxprefix.data import IGNORED, label_counts, max_rows_per_example, row_lengths, rows_of
from jaxprefix.examples import Example
from jaxprefix.tokenizer import Tokenizer

SAMPLED_UPDATES = 2000
"""Updates from whose batches the shapes of packed ones are chosen."""
SHAPES = 4
"""Most shapes of a run's packed batches."""
WORTH_IT = 1.01
"""Fewer shapes, each of which takes time and memory to compile, may take up to so many times the least columns."""
COLUMN_STEPS = 20
"""Quantiles of the batches' column counts that are tried as widths of the shapes."""
COLUMN_MULTIPLE = 8
CLASSES = 3
"""Most classes of lengths that the texts of a packed row fall into: attention is compiled once for each."""
CLASSES_WORTH_IT = 1.1
"""Fewer classes may take up to so many times the least work."""
CLASS_STEP = 1.1
"""A class may begin only at a text whose slots have fallen below the next power of this."""
SLOT_WORK, COLUMN_WORK = 64, 1000
"""Work of a slot besides its attention scores, and of a column outside of attention, counted in scores (110m, CPU)."""
FEW_LABELS = 0.9
"""Where at most this share of the columns has labels, because of prompts, the loss is computed for those alone."""


class Packing(NamedTuple):
    """Where the texts of packed rows lie: int32 index arrays, `places` the inverse of all `columns`.

    An index one past the end means that nothing is there.
    """

    columns: tuple[np.ndarray, ...]
    """[rows, texts, slots] for each class of lengths: the column of each token; n_columns after the text's last one."""
    places: np.ndarray
    """[rows, columns]: each token's index into all classes' texts × slots, one behind the other, flattened."""


class Batch(NamedTuple):
    """int32 arrays of shape [rows, columns], or [micro-batches, rows, columns]; JAX's inside compiled functions."""

    tokens: np.ndarray
    labels: np.ndarray
    packing: Packing | None = None
    """For packed rows, the texts in them."""
    labelled: Packing | None = None
    """For rows with few labels, the columns that have one, packed as if they were a text: only they enter the loss."""

    @property
    def n_labels(self) -> int:
        """Positions that enter the loss."""
        return int((self.labels != IGNORED).sum())


class PaddedShape(NamedTuple):
    """The shape of a batch whose rows are texts."""

    n_rows: int
    n_columns: int
    n_labels: int | None = None
    """Most labels of a row, if the loss is computed for labelled columns alone."""


def padded_shape(examples: Sequence[Example], batch_size: int, n_parts: int) -> PaddedShape:
    """Return the shape that holds any batch of these examples, whose rows can be split into n_parts."""
    lengths, n_labels = row_lengths(examples), int(label_counts(examples).max())
    n_rows, n_columns = max_rows_per_example(lengths) * batch_size, int(lengths.max())
    return PaddedShape(round_up(n_rows, n_parts), n_columns, _if_few(n_labels, n_columns))


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


def _labelled(labels: np.ndarray, n_labels: int | None) -> Packing | None:
    """Return where the labels of each row lie, with room for n_labels in each."""
    if n_labels is None:
        return None
    n_rows, n_columns = labels.shape
    columns = np.full((n_rows, 1, n_labels), n_columns, np.int32)
    places = np.full((n_rows, n_columns), n_labels, np.int32)
    for row, own in enumerate(map(np.flatnonzero, labels != IGNORED)):
        columns[row, 0, : len(own)] = own
        places[row, own] = np.arange(len(own))
    return Packing((columns,), places)


def _if_few(n_labels: int, n_columns: int) -> int | None:
    """Return the columns to set aside for labels, or None if that is nearly all of them."""
    room = round_up(n_labels)
    return room if room <= FEW_LABELS * n_columns else None


def pack_rows(lengths: Sequence[int], n_rows: int, n_texts: int) -> list[list[int]]:
    """Spread texts over packed rows of at most n_texts each: the longest first, each into the emptiest row.

    Returns the indices of each row's texts, the longest one's first.
    """
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
    classes: tuple[tuple[int, int], ...]
    """(texts in a row, slots for the tokens of each) for each class of lengths, the longest first."""
    n_labels: int | None = None
    """Most labels of a row, if the loss is computed for labelled columns alone."""

    def holds(self, examples: Sequence[Example]) -> bool:
        """Tell whether there is room for these examples."""
        slots = self.slots
        needs = _needs(row_lengths(examples), label_counts(examples), self.n_rows, len(slots))
        n_labels = self.n_columns if self.n_labels is None else self.n_labels
        return bool((needs <= [self.n_columns, n_labels, *slots]).all())

    @property
    def slots(self) -> list[int]:
        """The slots of each text of a row, the longest first."""
        return [n_slots for n_texts, n_slots in self.classes for _ in range(n_texts)]


Shape = PackedShape | PaddedShape
Choice = TypeVar("Choice", bound=tuple)


def _needs(lengths: np.ndarray, n_labels: np.ndarray, n_rows: int, n_texts: int) -> np.ndarray:
    """Return what examples need when they are packed, by the lengths and labels [examples, 2] of their rows.

    That is [2 + n_texts] numbers: columns, labels, and the slots (at least 1) of a row's longest text, its second, ….
    """
    lengths, n_labels = lengths[lengths > 0], n_labels[lengths > 0]
    rows, needs = pack_rows(lengths.tolist(), n_rows, n_texts), np.ones((n_rows, 2 + n_texts), int)
    for row, members in zip(needs, rows, strict=True):
        row[:2] = lengths[members].sum(), n_labels[members].sum()
        row[2 : 2 + len(members)] = lengths[members]
    return needs.max(axis=0)


def text_classes(slots: Sequence[int], n_columns: int) -> tuple[tuple[int, int], ...]:
    """Group texts of so many slots, the longest first, into the classes (texts, slots) of a `PackedShape`.

    Returns the fewest classes whose work is close to the least possible.
    """

    def classes(starts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        return tuple((end - start, slots[start]) for start, end in itertools.pairwise([*starts, len(slots)]))

    def work(classes: tuple[tuple[int, int], ...]) -> int:
        return n_columns * COLUMN_WORK + sum(n * slots * (slots + SLOT_WORK) for n, slots in classes)

    falls = 1 + np.flatnonzero(np.diff(np.log(slots) // np.log(CLASS_STEP)))
    choices = [classes((0, *cuts)) for n in range(CLASSES) for cuts in itertools.combinations(falls.tolist(), n)]
    return _fewest(choices, [work(choice) for choice in choices], CLASSES_WORTH_IT)


def make_packed_batch(examples: Sequence[Example], tokenizer: Tokenizer, shape: PackedShape) -> Batch:
    """Lay the examples' rows end to end, padded on the right."""
    n_rows, n_columns, classes, n_labels = shape
    *starts, n_places = [0, *itertools.accumulate(shape.slots)]  # of each text's places
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


def packed_shapes(examples: Sequence[Example], updates: Iterable[list[list[int]]], n_rows: int) -> list[PackedShape]:
    """Choose the few shapes of a run's packed batches, each compiled once, from the batches of its first updates.

    Shapes ascend. Their widths are the fewest whose padding over the sampled updates is close to the least possible.
    Each has the slots and labels that the updates which use it need at most. The last one holds every update or, if not
    all were sampled, any batch that these examples can make.
    """
    sample = list(itertools.islice(updates, SAMPLED_UPDATES + 1))
    n_examples = max(len(batch) for batches in sample for batch in batches)
    lengths, n_labels = row_lengths(examples), label_counts(examples)
    n_texts = -(-n_examples * max_rows_per_example(lengths) // n_rows)
    needs = np.array(
        [
            np.max([_needs(lengths[batch], n_labels[batch], n_rows, n_texts) for batch in batches], axis=0)
            for batches in sample
        ]
    )

    def at_most_in_a_row(of_texts: np.ndarray) -> int:
        return min(n_texts * int(of_texts.max()), int(np.sort(of_texts.sum(axis=1))[-n_examples:].sum()))

    if len(sample) > SAMPLED_UPDATES:
        longest = np.sort(lengths.clip(1), axis=None)[::-1][:n_texts]
        last = [at_most_in_a_row(lengths), at_most_in_a_row(n_labels), *longest.tolist()]
    else:
        last = needs.max(axis=0).tolist()

    def taken(columns: Sequence[int]) -> np.ndarray:
        return np.searchsorted(columns, needs[:, 0])

    steps = sorted({round_up(columns) for columns in np.quantile(needs[:, 0], np.linspace(0, 1, COLUMN_STEPS + 1)[1:])})
    choices = [chosen for n in range(SHAPES) for chosen in itertools.combinations(steps, n)]
    totals = [int(np.take([*chosen, last[0]], taken(chosen)).sum()) for chosen in choices]
    best = _fewest(choices, totals, WORTH_IT)
    used = [[n, *needs[taken(best) <= i, 1:].max(axis=0).tolist()] for i, n in enumerate(best)]
    return [_shape_for(n_rows, each) for each in [*used, last]]


def _fewest(choices: Sequence[Choice], totals: Sequence[int], worth_it: float) -> Choice:
    """Return the shortest choice whose total is at most `worth_it` times the least; of equally short ones, the best."""
    close = [(len(c), total, c) for c, total in zip(choices, totals, strict=True) if total <= worth_it * min(totals)]
    return min(close)[2]


def _shape_for(n_rows: int, needs: Sequence[int]) -> PackedShape:
    """Return the shape with n_rows rows and room for `_needs`."""
    n_columns, n_labels, *slots = needs
    n_columns = round_up(n_columns)
    return PackedShape(n_rows, n_columns, text_classes(slots, n_columns), _if_few(n_labels, n_columns))


def round_up(number: float | int, multiple: int = COLUMN_MULTIPLE) -> int:
    """Round up to the next multiple."""
    return math.ceil(number / multiple) * multiple


def lay_out(examples: Sequence[Example], tokenizer: Tokenizer, shape: Shape) -> Batch:
    """Lay the examples' rows out in a shape, padded or packed."""
    if isinstance(shape, PackedShape):
        return make_packed_batch(examples, tokenizer, shape)
    return make_padded_batch(examples, tokenizer, shape)


def filled_batches(examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int, n_parts: int) -> Iterator[Batch]:
    """Yield all examples in packed batches of one shape, about equally full.

    A batch has about as many columns as batch_size padded examples take, and at most four times as many examples.
    """
    lengths, n_labels = row_lengths(examples), label_counts(examples)
    padded = padded_shape(examples, batch_size, n_parts)
    n_batches = math.ceil(max(lengths.sum() / (padded.n_rows * padded.n_columns), len(examples) / (4 * batch_size)))
    groups = pack_rows(lengths.sum(axis=1).tolist(), n_batches, 4 * batch_size)
    n_texts = -(-max(map(len, groups)) * max_rows_per_example(lengths) // n_parts)
    needs = [_needs(lengths[group], n_labels[group], n_parts, n_texts) for group in groups]
    shape = _shape_for(n_parts, np.max(needs, axis=0).tolist())
    for group in groups:
        yield make_packed_batch([examples[number] for number in group], tokenizer, shape)


def fitting_shape(shapes: Sequence[Shape], groups: Sequence[Sequence[Example]]) -> Shape:
    """Return the first shape that holds all micro-batches of an update."""
    return next(s for s in shapes if not isinstance(s, PackedShape) or all(map(s.holds, filter(len, groups))))
