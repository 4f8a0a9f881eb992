"""Examples for tests: four without a prompt, of different lengths, and one with."""

from jaxprefix.examples import Example

EXAMPLES = [Example([], list(range(10, 10 + n))) for n in (5, 9, 14, 7)] + [Example([20, 21], [30, 31, 32])]
