import json
import math

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxprefix.data.examples import Example
from jaxprefix.metrics import LossMeter, evaluation_batches, loss_and_ppl
from jaxprefix.recipe import RECIPES, Recipe
from jaxprefix.sharding import make_mesh
from tests.examples import EXAMPLES, PROMPTED
from tests.tolerances import LOSS


def test_means_weigh_by_tokens_or_plainly():
    sound, plain = LossMeter(Recipe()), LossMeter(RECIPES["rinna"])
    for meter in (sound, plain):
        meter.add(1.0, 30, 2.0)
        meter.add(2.0, 10, 2.0)
    assert sound.means() == {"loss": 1.25, "ppl": np.exp(1.25)}
    assert plain.means() == pytest.approx({"loss": 1.5, "ppl": (np.exp(1) + np.exp(2)) / 2})
    assert sound.tokens_per_s == 10
    assert LossMeter(Recipe(), json.loads(json.dumps(sound.sums))).sums == sound.sums


def test_without_a_batch_there_is_no_mean():
    """As where float16 has skipped all updates since the last log point."""
    assert all(map(math.isnan, LossMeter(Recipe()).means().values()))


def test_ppl_of_a_huge_loss_is_infinite():
    meter = LossMeter(Recipe())
    meter.add(800.0, 1)
    assert meter.means() == {"loss": 800.0, "ppl": np.inf}


def test_rows_of_dev_batches_can_be_split_evenly(tokenizer):
    """An example with a prompt makes one row; a mesh that splits rows in four takes four at a time."""
    mesh = AbstractMesh((2, 2, 3), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    [batch] = evaluation_batches([Example([5], [6])], tokenizer, 1, mesh)
    assert batch.tokens.shape == (4, 2)


def test_packed_dev_batches_have_the_loss_of_padded_ones(golden_model, tokenizer):
    examples, mesh = [*EXAMPLES, *PROMPTED], make_mesh()
    packed, padded = (list(evaluation_batches(examples, tokenizer, 2, mesh, packing)) for packing in (True, False))
    assert len(packed) < len(padded)
    expected = loss_and_ppl(golden_model, None, padded, mesh)
    assert loss_and_ppl(golden_model, None, packed, mesh) == pytest.approx(expected, rel=LOSS)


def test_a_dev_loss_is_averaged_as_its_recipe_says(golden_model, tokenizer):
    mesh = make_mesh()
    batches = list(evaluation_batches(EXAMPLES, tokenizer, 2, mesh))
    losses = [loss_and_ppl(golden_model, None, [batch], mesh)["loss"] for batch in batches]
    n_labels = [batch.n_labels for batch in batches]
    for recipe, weights in (Recipe(), n_labels), (RECIPES["rinna"], None):
        expected = np.average(losses, weights=weights)
        assert loss_and_ppl(golden_model, None, batches, mesh, recipe)["loss"] == pytest.approx(expected, rel=LOSS)
    assert np.mean(losses) != pytest.approx(np.average(losses, weights=n_labels), rel=LOSS)
