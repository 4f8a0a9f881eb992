"""Examples for tests."""

from jaxprefix.examples import Example

EXAMPLES = [Example([], list(range(10, 10 + n))) for n in (5, 9, 14, 7)] + [Example([20, 21], [30, 31, 32])]
"""Four without a prompt, of different lengths, and one with."""
PROMPTED = [Example(list(range(10, 10 + n)), list(range(40, 40 + m))) for n, m in ((12, 5), (1, 1), (9, 7), (4, 2))]
"""Four with prompts: 26 tokens of those, 19 labels."""
