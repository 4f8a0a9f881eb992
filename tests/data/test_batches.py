import jax
import numpy as np
import pytest

from jaxprefix.data.batches import filled_batches, make_packed_batch, make_padded_batch
from jaxprefix.data.examples import Example
from jaxprefix.data.rows import IGNORED, row_lengths, rows_of
from jaxprefix.data.shapes import PackedShape, PaddedShape, padded_shape
from tests.examples import EXAMPLES, PROMPTED, pairs, scores


def test_batch_is_padded_right_and_below(tokenizer):
    batch = make_padded_batch([Example([], [10, 11])], tokenizer, PaddedShape(4, 5))
    pad = tokenizer.pad_id
    assert batch.tokens.tolist() == [[1, 10, 11, pad, pad], [10, 11, pad, pad, pad], [pad] * 5, [pad] * 5]
    assert (batch.labels == IGNORED).sum() == 20 - 5


def test_pad_tokens_of_a_text_are_learnt(tokenizer):
    """The original takes them for padding: docs/original.md tells of it."""
    example = Example([], [tokenizer.pad_id, 10])
    labels = make_padded_batch([example], tokenizer, padded_shape([example], 1, 1)).labels
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


def test_filled_batches_have_room_for_texts_that_their_rows_do_not_share_evenly(tokenizer):
    [batch] = filled_batches([Example([7], [7] * 9)] * 4, tokenizer, 4, 3)
    assert batch.n_labels == 4 * 10
    assert [columns.shape for columns in batch.packing.columns] == [(3, 2, 10)]


def test_documents_and_pairs_fill_batches_evenly(tokenizer):
    """A document's two texts are as long together as a pair's one."""
    examples = [Example([7] * n_prompt, [7] * n) for n in range(5, 40) for n_prompt in (0, n)]
    batches = list(filled_batches(examples, tokenizer, 4, 1))
    assert len(batches) == 5
    assert sum(batch.tokens.size for batch in batches) < 1.05 * row_lengths(examples).sum()


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
