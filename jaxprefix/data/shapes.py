"""The shapes of batches, padded or packed: few, because each is compiled."""

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxprefix.data.examples import Example
from jaxprefix.data.rows import label_counts, max_rows_per_example, row_lengths

SAMPLED_UPDATES = 2000
"""How many updates are sampled to choose the shapes of packed batches."""
SHAPES = 4
"""The most shapes that a run's packed batches have."""
WORTH_IT = 1.01
"""Fewer shapes, which save time and memory in compiling, may take up to this many times the least columns."""
COLUMN_STEPS = 20
"""How many quantiles of the batches' column counts are tried as widths of the shapes."""
COLUMN_MULTIPLE = 8
CLASSES = 3
"""The most classes of lengths that the texts of a packed row fall into: attention is compiled once for each."""
CLASSES_WORTH_IT = 1.1
"""Fewer classes may take up to this many times the least work."""
CLASS_STEP = 1.1
"""A class may begin only where the slots fall below a power of this from one text to the next: fewer to try."""
SLOT_WORK, COLUMN_WORK = 64, 1000
"""Work of a slot besides its attention scores, and of a column outside attention, in units of a score (110m, CPU)."""
FEW_LABELS = 0.9
"""If at most this share of the columns has labels, because of prompts, the loss is computed for those only."""


class PaddedShape(NamedTuple):
    """The shape of a batch whose rows are texts."""

    n_rows: int
    n_columns: int
    n_labels: int | None = None
    """The most labels of a row, if the loss is computed for labelled columns only."""


class Needs(NamedTuple):
    """What a row of a packed batch must have room for."""

    n_columns: int
    n_labels: int
    slots: tuple[int, ...]
    """Tokens of its longest text, of the second longest, and so on; 1 where it has no text."""

    @classmethod
    def of(cls, lengths: np.ndarray, n_labels: np.ndarray, n_rows: int, n_texts: int) -> "Needs":
        """Return what examples need in rows of n_texts, given their texts' lengths and label counts [examples, 2]."""
        lengths, n_labels = lengths[lengths > 0], n_labels[lengths > 0]
        rows = pack_rows(lengths.tolist(), n_rows, n_texts)
        return cls.most(cls.of_row(lengths[row], n_labels[row], n_texts) for row in rows)

    @classmethod
    def of_row(cls, lengths: np.ndarray, n_labels: np.ndarray, n_texts: int) -> "Needs":
        """Return what a row of n_texts needs, given its texts' lengths, the longest first, and their label counts."""
        slots = [*lengths.tolist(), *[1] * (n_texts - len(lengths))]
        return cls(int(lengths.sum()), int(n_labels.sum()), tuple(slots))

    @classmethod
    def most(cls, needs: Iterable["Needs"]) -> "Needs":
        """Return the needs that cover all of these."""
        n_columns, n_labels, slots = zip(*needs, strict=True)
        return cls(max(n_columns), max(n_labels), tuple(map(max, zip(*slots, strict=True))))


class PackedShape(NamedTuple):
    """The shape of a packed batch."""

    n_rows: int
    n_columns: int
    classes: tuple[tuple[int, int], ...]
    """(texts in a row, slots for the tokens of each) for each class of lengths, the longest first."""
    n_labels: int | None = None
    """The most labels of a row, if the loss is computed for labelled columns only."""

    def holds(self, needs: Needs) -> bool:
        """Tell whether its rows have room for these needs."""
        n_labels = self.n_columns if self.n_labels is None else self.n_labels
        enough = needs.n_columns <= self.n_columns and needs.n_labels <= n_labels
        return enough and all(map(operator.le, needs.slots, self.slots))

    @property
    def slots(self) -> list[int]:
        """The slots of each text of a row, the longest first."""
        return [n_slots for n_texts, n_slots in self.classes for _ in range(n_texts)]


Shape = PackedShape | PaddedShape
Choice = TypeVar("Choice", bound=tuple)


def padded_shape(examples: Sequence[Example], batch_size: int, n_parts: int) -> PaddedShape:
    """Return the shape that holds any batch of these examples, and whose rows can be split into n_parts."""
    lengths, n_labels = row_lengths(examples), int(label_counts(examples).max())
    n_rows, n_columns = max_rows_per_example(lengths) * batch_size, int(lengths.max())
    return PaddedShape(round_up(n_rows, n_parts), n_columns, _if_few(n_labels, n_columns))


def packed_shapes(examples: Sequence[Example], updates: Iterable[list[list[int]]], n_rows: int) -> list[PackedShape]:
    """Choose the few shapes of a run's packed batches, each compiled once, from the batches of its first updates.

    Shapes ascend. Each has the slots and labels that every sampled update of at most its width needs. The last one
    holds every update or, if not all were sampled, any batch that these examples can make.
    """
    sample = list(itertools.islice(updates, SAMPLED_UPDATES + 1))
    n_examples = max(len(batch) for batches in sample for batch in batches)
    lengths, n_labels = row_lengths(examples), label_counts(examples)
    n_texts = -(-n_examples * max_rows_per_example(lengths) // n_rows)

    def of_update(batches: list[list[int]]) -> Needs:
        return Needs.most(Needs.of(lengths[batch], n_labels[batch], n_rows, n_texts) for batch in batches)

    needs = list(map(of_update, sample))
    sampled_all = len(sample) <= SAMPLED_UPDATES
    last = Needs.most(needs) if sampled_all else _needs_of_any(lengths, n_labels, n_examples, n_texts)
    columns = np.array([each.n_columns for each in needs])
    widths = _widths(columns, last.n_columns)
    used = np.searchsorted(widths, columns)
    shapes = [Needs.most(itertools.compress(needs, used <= i))._replace(n_columns=n) for i, n in enumerate(widths)]
    return [_shape_for(n_rows, each) for each in [*shapes, last]]


def _needs_of_any(lengths: np.ndarray, n_labels: np.ndarray, n_examples: int, n_texts: int) -> Needs:
    """Return what any n_examples need, in one row of n_texts or spread over several."""

    def at_most(of_rows: np.ndarray) -> int:
        return min(n_texts * int(of_rows.max()), int(np.sort(of_rows.sum(axis=1))[-n_examples:].sum()))

    longest = np.sort(lengths.clip(1), axis=None)[::-1][:n_texts]
    return Needs(at_most(lengths), at_most(n_labels), tuple(longest.tolist()))


def _widths(columns: np.ndarray, widest: int) -> tuple[int, ...]:
    """Return the widths of all shapes but the last, for updates that need these numbers of columns.

    They are the fewest whose columns, summed over the updates, are close to the least possible.
    """
    quantiles = np.quantile(columns, np.linspace(0, 1, COLUMN_STEPS + 1)[1:])
    steps = sorted({round_up(quantile) for quantile in quantiles})
    choices = [chosen for n in range(SHAPES) for chosen in itertools.combinations(steps, n)]
    totals = [int(np.take([*chosen, widest], np.searchsorted(chosen, columns)).sum()) for chosen in choices]
    return _fewest(choices, totals, WORTH_IT)


def filled_shape(lengths: np.ndarray, n_labels: np.ndarray, groups: Sequence[list[int]], n_rows: int) -> PackedShape:
    """Return the shape with n_rows rows that holds each group of examples, given texts' lengths and label counts."""
    n_texts = -(-max(map(len, groups)) * max_rows_per_example(lengths) // n_rows)
    needs = (Needs.of(lengths[group], n_labels[group], n_rows, n_texts) for group in groups)
    return _shape_for(n_rows, Needs.most(needs))


def fitting_shape(shapes: Sequence[Shape], groups: Sequence[Sequence[Example]]) -> Shape:
    """Return the first shape that holds all micro-batches of an update.

    Packed shapes must be those of one run, which have equally many rows, and texts in a row.
    """
    packed = [shape for shape in shapes if isinstance(shape, PackedShape)]
    if not packed:
        return shapes[0]
    n_rows, n_texts = packed[0].n_rows, len(packed[0].slots)
    needs = Needs.most(Needs.of(row_lengths(group), label_counts(group), n_rows, n_texts) for group in groups if group)
    return next(shape for shape in packed if shape.holds(needs))


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


def _shape_for(n_rows: int, needs: Needs) -> PackedShape:
    """Return the shape with n_rows rows that have room for these needs."""
    n_columns = round_up(needs.n_columns)
    return PackedShape(n_rows, n_columns, text_classes(needs.slots, n_columns), _if_few(needs.n_labels, n_columns))


def text_classes(slots: Sequence[int], n_columns: int) -> tuple[tuple[int, int], ...]:
    """Group texts with these slots, the longest first, into the classes (texts, slots) of a `PackedShape`.

    Returns the fewest classes whose work is close to the least possible.
    """

    def classes(starts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        return tuple((end - start, slots[start]) for start, end in itertools.pairwise([*starts, len(slots)]))

    def work(classes: tuple[tuple[int, int], ...]) -> int:
        return n_columns * COLUMN_WORK + sum(n * slots * (slots + SLOT_WORK) for n, slots in classes)

    falls = 1 + np.flatnonzero(np.diff(np.log(slots) // np.log(CLASS_STEP)))
    choices = [classes((0, *cuts)) for n in range(CLASSES) for cuts in itertools.combinations(falls.tolist(), n)]
    return _fewest(choices, [work(choice) for choice in choices], CLASSES_WORTH_IT)


def _fewest(choices: Sequence[Choice], totals: Sequence[int], worth_it: float) -> Choice:
    """Return the shortest choice whose total is at most `worth_it` times the least; of equally short ones, the best."""
    close = [(len(c), total, c) for c, total in zip(choices, totals, strict=True) if total <= worth_it * min(totals)]
    return min(close)[2]


def _if_few(n_labels: int, n_columns: int) -> int | None:
    """Return the columns to set aside for labels, or None if that is nearly all of them."""
    room = round_up(n_labels)
    return room if room <= FEW_LABELS * n_columns else None


def round_up(number: float | int, multiple: int = COLUMN_MULTIPLE) -> int:
    """Round up to the next multiple."""
    return math.ceil(number / multiple) * multiple
