"""The tolerances of comparisons with other programs, in one place; none is loosened for a single test."""

FUNCTION = 1e-5
"""A single function in float32, absolute; relative to the largest entry where that is stated."""
FOLDED = 1e-6
"""A folded prefix, absolute: two small linear layers of one encoder."""
PROBABILITY = 1e-6
"""A token's probability, absolute."""
MODEL = 1e-4
"""A whole model in float32: logits absolute, gradients relative to the largest entry."""
LOSS = 1e-5
"""A loss in float32, relative."""
RATE = 1e-6
"""A learning rate, relative to the largest: one is computed in float32, the other in float64."""
BFLOAT16 = 1.5
"""How far bfloat16 may stray from the float32 reference, as a multiple of how far the reference's bfloat16 does."""
HALF_GRADIENT = 0.5
"""A gradient in bfloat16 or float16, as a norm relative to the exact one's, in epsilons of the type."""
HALF_CACHE = 4
"""Attention to keys and values rounded to bfloat16 or float16 once more, absolute, in epsilons of the type."""
BFLOAT16_ROUNDOFF = 2**-9
"""The largest relative error of rounding to bfloat16's 8 significant bits."""
