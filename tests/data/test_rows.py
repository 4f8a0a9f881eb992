import pytest

from jaxprefix.data.examples import Example
from jaxprefix.data.rows import IGNORED, label_counts, max_rows_per_example, row_lengths, rows_of


def test_rows_of_an_example_without_prompt():
    assert rows_of(Example([], [10, 11, 12]), 1, 2) == [
        ([1, 10, 11, 12], [10, 11, 12, 2]),
        ([10, 11, 12], [11, 12, 2]),
    ]


def test_loss_of_a_prompt_is_on_the_completion_only():
    ((inputs, labels),) = rows_of(Example([7, 8, 9], [10, 11]), 1, 2)
    assert inputs == [7, 8, 9, 10, 11]
    assert labels == [IGNORED, IGNORED, 10, 11, 2]


@pytest.mark.parametrize("example", [Example([], [10, 11]), Example([7, 8], [10, 11, 12])])
def test_counts_agree_with_the_rows(example):
    rows = rows_of(example, 1, 2)
    assert label_counts([example]).sum() == sum(label != IGNORED for _, labels in rows for label in labels)
    lengths = [len(inputs) for inputs, _ in rows]
    assert row_lengths([example]).tolist() == [lengths if len(rows) == 2 else [*lengths, 0]]
    assert row_lengths([example]).max() == max(lengths)
    assert max_rows_per_example(row_lengths([example])) == len(rows)
