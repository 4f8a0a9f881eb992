"""The tolerances of all comparisons, in one place; none is loosened for a single test."""

FUNCTION = 1e-5
"""A single function in float32, absolute."""
MODEL = 1e-4
"""A whole model in float32: logits absolute, gradients relative to the largest entry."""
LOSS = 1e-5
"""A loss in float32, relative."""
