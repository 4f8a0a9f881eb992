import jax
import numpy as np
import pytest

from jaxprefix.batches import (
    PackedShape,
    PaddedShape,
    filled_batches,
    fitting_shape,
    make_packed_batch,
    make_padded_batch,
    pack_rows,
    packed_shapes,
    padded_shape,
    text_classes,
)
from jaxprefix.data import IGNORED, label_counts, row_lengths, rows_of
from jaxprefix.examples import Example
from tests.examples import EXAMPLES, PROMPTED


def test_batch_is_padded_right_and_below(tokenizer):
    batch = make_padded_batch([Example([], [10, 11])], tokenizer, PaddedShape(4, 5))
    pad = tokenizer.pad_id
    assert batch.tokens.tolist() == [[1, 10, 11, pad, pad], [10, 11, pad, pad, pad], [pad] * 5, [pad] * 5]
    assert (batch.labels == IGNORED).sum() == 20 - 5


def test_pad_tokens_of_a_text_are_learnt(tokenizer):
    """The original takes them for padding: the README tells of it."""
    example = Example([], [tokenizer.pad_id, 10])
    labels = make_batch([example], tokenizer, *padded_shape([example], 1, 1)).labels
    assert labels.tolist() == [[tokenizer.pad_id, 10, tokenizer.eos_id], [10, tokenizer.eos_id, IGNORED]]


@pytest.mark.parametrize("classes", [((3, 15),), ((1, 15), (2, 9)), ((1, 15), (1, 9), (1, 6))], ids=str)
def test_packed_rows_hold_every_text_once_and_tell_where(tokenizer, classes):
    texts = [text for example in EXAMPLES for text in rows_of(example, tokenizer.bos_id, tokenizer.eos_id)]
    shape = PackedShape(n_rows=3, n_columns=32, classes=classes)
    tokens, labels, packing, _ = make_packed_batch(EXAMPLES, tokenizer, shape)
    assert tokens.shape == labels.shape == packing.places.shape == (3, 32)
    assert [columns.shape for columns in packing.columns] == [(3, *size) for size in classes]
    found, n_found = [], 0
    for row in range(3):
        place = 0
        for columns in (columns for of_class in packing.columns for columns in of_class[row]):
            own = columns[columns < 32]
            assert packing.places[row, own].tolist() == list(range(place, place + len(own)))
            found.append((tokens[row, own].tolist(), labels[row, own].tolist()))
            n_found += len(own)
            place += len(columns)
        assert packing.places[row].max() == place, "of padding"
    assert sorted(found) == sorted(texts)
    assert (packing.places < place).sum() == n_found == (tokens != tokenizer.pad_id).sum()


def test_where_the_labels_of_rows_lie(tokenizer):
    whole = make_padded_batch(PROMPTED, tokenizer, PaddedShape(4, 20))
    assert whole.labelled is None
    [(columns,), places] = make_padded_batch(PROMPTED, tokenizer, PaddedShape(4, 20, n_labels=9)).labelled
    assert (columns.shape, places.shape) == ((4, 1, 9), (4, 20))
    assert columns[:, 0].tolist()[:2] == [[*range(11, 17), 20, 20, 20], [0, 1, *[20] * 7]]
    assert places[0].tolist() == [9] * 11 + [*range(6)] + [9] * 3
    packed = make_packed_batch(PROMPTED, tokenizer, PackedShape(2, 40, ((2, 20),), n_labels=16))
    for row, (own, labels) in enumerate(zip(packed.labelled.columns[0][:, 0], packed.labels, strict=True)):
        assert own[own < 40].tolist() == np.flatnonzero(labels != IGNORED).tolist()
        assert packed.labelled.places[row, own[own < 40]].tolist() == list(range((own < 40).sum()))


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
            monkeypatch.setattr("jaxprefix.batches.SAMPLED_UPDATES", n_sampled)
            shapes = packed_shapes(prompted, iter(updates), n_rows)
            for groups in ([[prompted[i] for i in batch] for batch in batches] for batches in updates):
                shape = fitting_shape(shapes, groups)
                n_labels = [make_packed_batch(group, tokenizer, shape).n_labels for group in groups]
                assert n_labels == [sum(len(example.target) + 1 for example in group) for group in groups]
                assert shape.n_labels < 0.6 * shape.n_columns


@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("prompt", [[], [7] * 30])
def test_filled_batches_hold_all_examples_once_in_one_shape(tokenizer, n_parts, prompt):
    """Of 3 to 63 tokens: padded, they would be twice as many."""
    examples = [Example(prompt, [10 + i] * int(n)) for i, n in enumerate(np.random.default_rng(0).integers(3, 64, 101))]
    batches = list(filled_batches(examples, tokenizer, 4, n_parts))
    assert len({tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}) == 1
    labels = np.concatenate([batch.labels for batch in batches])
    ids, n_found = np.unique(labels[labels >= 10], return_counts=True)
    n_rows = 1 if prompt else 2
    assert ids.tolist() == list(range(10, 111))
    assert n_found.tolist() == [n_rows * len(example.target) - n_rows + 1 for example in examples]
    n_columns = sum(batch.tokens.size for batch in batches)
    assert n_columns < 1.2 * row_lengths(examples).sum()
    assert batches[0].tokens.size < 1.1 * np.prod(padded_shape(examples, 4, n_parts)[:2])
    assert (batches[0].labelled is None) == (not prompt)


def test_filled_batches_hold_at_most_four_times_the_padded_ones_texts(tokenizer):
    """Each of which has the prefix in front of it."""
    examples = [Example([], [7] * n) for n in [90, *[1] * 99]]
    [batch, *others] = filled_batches(examples, tokenizer, 2, 1)
    assert len(others) == 12
    assert [columns.shape for columns in batch.packing.columns] == [(1, 2, 91), (1, 14, 2)]


def scores(shape):
    """The pairs of slots that attention looks at, and how many there would be if all texts had the longest's slots."""
    return sum(n * slots**2 for n, slots in shape.classes), len(shape.slots) * shape.slots[0] ** 2


def pairs(n, seed=0):
    """Prompts with completions: median 60 tokens, longest 500."""
    lengths = np.random.default_rng(seed).lognormal(np.log(60), 0.8, n).clip(10, 500).astype(int)
    return [Example([7] * (n_tokens // 2), [10 + i] * (n_tokens - n_tokens // 2)) for i, n_tokens in enumerate(lengths)]


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
    monkeypatch.setattr("jaxprefix.batches.SAMPLED_UPDATES", 20)
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
        assert shape.holds([Example([7], [7] * (n - 1)) for n in lengths]) == fits


def test_a_class_must_save_a_tenth_of_the_work():
    assert text_classes([65] * 8, 456) == ((8, 65),)
    assert text_classes([65, 60, 50, 40, 30, 20, 10, 5], 280) == ((8, 65),), "of short texts attention is little"
    assert text_classes([337, 270, 149, 90, 60, 40, 20, 10], 976) == ((2, 337), (6, 149))
    assert text_classes([400] * 2 + [200] * 4 + [50] * 40, 3600) == ((2, 400), (4, 200), (40, 50))


def test_unevenly_long_examples_have_dev_batches_of_one_shape_and_few_scores(tokenizer):
    examples = pairs(320)
    batches = list(filled_batches(examples, tokenizer, 4, 1))
    assert len({tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}) == 1
    classes = [columns.shape[1:] for columns in batches[0].packing.columns]
    few, whole = scores(PackedShape(1, 0, tuple(classes)))
    assert few < whole / 5
    ids, n_found = np.unique(
        np.concatenate([batch.labels[batch.labels >= 10] for batch in batches]), return_counts=True
    )
    assert dict(zip(ids.tolist(), n_found.tolist(), strict=True)) == {
        10 + i: len(example.target) for i, example in enumerate(examples)
    }


def test_updates_of_more_texts_than_the_sampled_ones_have_room(monkeypatch, tokenizer):
    """An example with a prompt makes one text, one without makes two."""
    examples = [*pairs(20), *[Example([], [7] * 30)] * 20]
    updates = [[list(range(first, first + 8))] for first in (0, 8, 20)]
    monkeypatch.setattr("jaxprefix.batches.SAMPLED_UPDATES", 1)
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
    monkeypatch.setattr("jaxprefix.batches.SAMPLED_UPDATES", 1)
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
    monkeypatch.setattr("jaxprefix.batches.SAMPLED_UPDATES", 1)
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
