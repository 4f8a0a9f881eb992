import numpy as np
import pytest

from jaxprefix.data.batches import make_packed_batch
from jaxprefix.data.examples import Example
from jaxprefix.data.rows import label_counts, row_lengths
from jaxprefix.data.shapes import (
    Needs,
    PackedShape,
    fitting_shape,
    pack_rows,
    packed_shapes,
    padded_shape,
    round_up,
    text_classes,
)
from tests.examples import pairs, scores


def test_shapes_have_room_for_labels_where_those_are_few(monkeypatch, tokenizer):
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 64, (300, 2)).tolist()
    updates = [generator.choice(300, (2, 4), replace=False).tolist() for _ in range(400)]
    documents = [Example([], [7] * n) for n, _ in sizes]
    prompted = [Example([7] * n, [7] * (m // 4 + 1)) for n, m in sizes]
    assert padded_shape(documents, 4, 3) == (9, 64, None)
    assert padded_shape(prompted, 4, 3)[::2] == (6, 24)
    for n_rows in (1, 3):
        assert {shape.n_labels for shape in packed_shapes(documents, iter(updates), n_rows)} == {None}
        for n_sampled in (1, 2000):
            monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", n_sampled)
            shapes = packed_shapes(prompted, iter(updates), n_rows)
            for groups in ([[prompted[i] for i in batch] for batch in batches] for batches in updates):
                shape = fitting_shape(shapes, groups)
                n_labels = [make_packed_batch(group, tokenizer, shape).n_labels for group in groups]
                assert n_labels == [sum(len(example.target) + 1 for example in group) for group in groups]
                assert shape.n_labels < 0.6 * shape.n_columns


def batches_of(n_examples, batch_size, n_updates, seed=0):
    """An update's examples: micro-batches of different ones."""
    generator = np.random.default_rng(seed)
    return [[generator.choice(n_examples, batch_size, replace=False).tolist()] for _ in range(n_updates)]


@pytest.mark.parametrize(("n_rows", "n_classes"), [(1, 3), (4, 2)])
def test_texts_of_skewed_lengths_fall_into_few_classes_that_hold_them(monkeypatch, tokenizer, n_rows, n_classes):
    examples, updates = pairs(400), batches_of(400, 16, 300)
    sampled = packed_shapes(examples, iter(updates), n_rows)
    assert max(len(shape.classes) for shape in sampled) == n_classes
    for shape in sampled:
        few, whole = scores(shape)
        assert few < whole / (1.5 if n_rows > 1 else 2.5)
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 20)
    for shapes in (sampled, packed_shapes(examples, iter(updates), n_rows)):
        for [batch] in updates:
            group = [examples[i] for i in batch]
            made = make_packed_batch(group, tokenizer, fitting_shape(shapes, [group]))
            assert made.n_labels == sum(len(example.target) + 1 for example in group)
            n_found = sum(int((columns < made.tokens.shape[1]).sum()) for columns in made.packing.columns)
            assert n_found == row_lengths(group).sum()


def test_a_shape_does_not_hold_a_text_that_is_too_long_for_its_place():
    shape = PackedShape(1, 400, ((1, 100), (2, 40)))
    for lengths, fits in (([100, 40, 40], True), ([40, 1], True), ([100, 41], False), ([101], False)):
        needs = Needs.of(np.array(lengths), np.array(lengths), n_rows=1, n_texts=3)
        assert shape.holds(needs) == fits


def test_a_class_must_save_a_tenth_of_the_work():
    assert text_classes([65] * 8, 456) == ((8, 65),)
    assert text_classes([65, 60, 50, 40, 30, 20, 10, 5], 280) == ((8, 65),), "of short texts attention is little"
    assert text_classes([337, 270, 149, 90, 60, 40, 20, 10], 976) == ((2, 337), (6, 149))
    assert text_classes([400] * 2 + [200] * 4 + [50] * 40, 3600) == ((2, 400), (4, 200), (40, 50))


def test_updates_of_more_texts_than_the_sampled_ones_have_room(monkeypatch, tokenizer):
    """An example with a prompt makes one text, one without makes two."""
    examples = [*pairs(20), *[Example([], [7] * 30)] * 20]
    updates = [[list(range(first, first + 8))] for first in (0, 8, 20)]
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 1)
    for n_rows in (1, 3):
        shapes = packed_shapes(examples, iter(updates), n_rows)
        assert all(n_slots > 0 for shape in shapes for _, n_slots in shape.classes)
        for [batch] in updates:
            group = [examples[i] for i in batch]
            made = make_packed_batch(group, tokenizer, fitting_shape(shapes, [group]))
            assert made.n_labels == label_counts(group).sum()


def test_packed_rows_are_even_and_hold_no_more_texts_than_they_may():
    assert [len(row) for row in pack_rows([9, 1, 1, 1, 1, 1], 2, 3)] == [3, 3]
    lengths = [6, 5, 10, 9, 15, 14, 8, 7, 5]
    assert max(sum(lengths[text] for text in row) for row in pack_rows(lengths, 3, 4)) < 30, "79 tokens in three"


def test_packed_shapes_are_few_and_hold_every_batch(monkeypatch):
    generator = np.random.default_rng(0)
    examples = [Example([], [7] * int(n)) for n in generator.integers(3, 64, 300)]
    updates = [generator.choice(300, (2, 4), replace=False).tolist() for _ in range(400)]
    for n_rows in (1, 8):
        shapes = packed_shapes(examples, iter(updates), n_rows)
        assert len(shapes) <= 4
        for batches in updates:
            groups = [[examples[i] for i in batch] for batch in batches]
            assert fitting_shape(shapes, groups).n_rows == n_rows
    most = max(row_lengths([examples[i] for i in batch]).sum() for batches in updates for batch in batches)
    assert packed_shapes(examples, iter(updates), 1)[-1].n_columns < most + 8, "no room for what the run does not make"
    worst = [examples[i] for i in sorted(range(300), key=lambda i: -len(examples[i].target))[:4]]
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 1)
    few = packed_shapes(examples, iter(updates), 1)
    assert fitting_shape(few, [worst]) == few[-1]


def test_shapes_that_hardly_differ_are_one():
    """Four of 4032 to 4080 columns would each be compiled, to save a hundredth."""
    generator = np.random.default_rng(0)
    examples = [Example([], [7] * int(n)) for n in generator.integers(2005, 2040, 10)]
    assert len(packed_shapes(examples, iter([[[n]] for n in range(10)]), 1)) == 1


@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_the_last_packed_shape_holds_what_was_not_sampled(monkeypatch, n_rows):
    generator = np.random.default_rng(0)
    examples = [Example([], [7] * int(n)) for n in generator.integers(3, 64, 300)]
    updates = [generator.choice(300, (2, 4), replace=False).tolist() for _ in range(9)]
    worst = sorted(examples, key=lambda example: -len(example.target))[:4]
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 1)
    shapes = packed_shapes(examples, iter(updates), n_rows)
    assert fitting_shape(shapes, [worst]) == shapes[-1]


def test_all_micro_batches_of_an_update_fit_its_shape(tokenizer):
    generator = np.random.default_rng(0)
    examples = [Example([], [7] * int(n)) for n in generator.integers(3, 64, 300)]
    updates = [generator.choice(300, (2, 4), replace=False).tolist() for _ in range(100)]
    shapes = packed_shapes(examples, iter(updates), 1)
    for batches in updates:
        groups = [[examples[i] for i in batch] for batch in batches]
        for group in groups:
            made = make_packed_batch(group, tokenizer, fitting_shape(shapes, groups))
            assert made.n_labels == sum(2 * len(example.target) + 1 for example in group)


def test_shapes_that_each_save_padding_are_as_many_as_may_be():
    """The second of five widths is rarest: it takes the third. The fourth could be spared, but not both."""
    n_columns = [160] * 9 + [184] * 2 + [208] * 9 + [232] * 3 + [256] * 9
    examples = [Example([7] * 4, [7] * (n - 4)) for n in n_columns]
    shapes = packed_shapes(examples, iter([[[n]] for n in range(len(examples))]), 1)
    assert [shape.n_columns for shape in shapes] == [160, 208, 232, 256]


def test_a_wider_shape_has_the_labels_that_a_narrower_one_has():
    examples = [Example([7] * n, [7] * m) for n, m in ((9, 50), (110, 10), (360, 10)) for _ in range(9)]
    shapes = packed_shapes(examples, iter([[[n]] for n in range(27)]), 1)
    assert [(shape.n_columns, shape.n_labels) for shape in shapes] == [(64, 56), (120, 56), (376, 56)]


def test_the_last_packed_shape_is_no_wider_than_its_examples_can_make_it(monkeypatch):
    """In one row the longest ones' texts together, in as many rows as texts the longest text."""
    examples = [Example([], [7] * n) for n in (500, 300, *[20] * 30)]
    updates = [[list(range(first, first + 4))] for first in (8, 12)]
    assert packed_shapes(examples, iter(updates), 1)[-1].n_columns == 4 * 41 + 4
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 2)
    assert packed_shapes(examples, iter(updates), 1)[-1].n_columns == 4 * 41 + 4, "all were sampled"
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 1)
    assert packed_shapes(examples, iter(updates), 1)[-1].n_columns == round_up(1001 + 601 + 2 * 41)
    assert packed_shapes(examples, iter(updates), 8)[-1].n_columns == round_up(501)


def test_a_row_that_has_room_for_more_texts_than_there_are_has_slots_for_each(monkeypatch):
    monkeypatch.setattr("jaxprefix.data.shapes.SAMPLED_UPDATES", 1)
    examples = [Example([], [7] * 30), *[Example([7] * 5, [7] * 5)] * 7]
    shapes = packed_shapes(examples, iter([[[0, 1, 2, 3, 4, 5]], [[2, 3, 4, 5, 6, 7]]]), 1)
    assert shapes[-1].classes == ((2, 31), (10, 10)), "nine texts of twelve"


def test_labels_that_round_up_to_nearly_all_columns_are_not_set_aside():
    assert padded_shape([Example([7, 7], [7] * 6)], 1, 1).n_labels is None
