"""Examples for tests, and files of them."""

import json

import numpy as np

from jaxprefix.data.examples import Example, Examples

EXAMPLES = [Example([], list(range(10, 10 + n))) for n in (5, 9, 14, 7)] + [Example([20, 21], [30, 31, 32])]
"""Four without a prompt, of different lengths, and one with."""
PROMPTED = [Example(list(range(10, 10 + n)), list(range(40, 40 + m))) for n, m in ((12, 5), (1, 1), (9, 7), (4, 2))]
"""Four with prompts: 26 tokens of those, 19 labels."""


def laid_out(examples):
    """Examples as if each were a line of a file."""
    return Examples.of_lines(enumerate(examples, start=1))


def data_file(folder, content):
    path = folder / "data.jsonl"
    path.write_text(content)
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def pairs(n, seed=0):
    """Prompts with completions: median 60 tokens, longest 500."""
    lengths = np.random.default_rng(seed).lognormal(np.log(60), 0.8, n).clip(10, 500).astype(int)
    return [Example([7] * (n_tokens // 2), [10 + i] * (n_tokens - n_tokens // 2)) for i, n_tokens in enumerate(lengths)]


def scores(shape):
    """The pairs of slots that attention looks at, and how many there would be if all texts had the longest's slots."""
    return sum(n * slots**2 for n, slots in shape.classes), len(shape.slots) * shape.slots[0] ** 2
