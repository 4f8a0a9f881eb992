"""Generating and measuring with a base model that several devices share."""

import json

import pytest

from tests.on_devices import (
    ON_CPUS,
    decoded_under_tensor,
    devices_that_evaluate,
    generated_on_a_mesh_of_ones_own,
    in_a_process,
    used_on_meshes,
)
from tests.tolerances import LOSS


def test_devices_that_share_the_base_generate_and_measure_what_one_does():
    (*of_one, measured), *of_several = in_a_process(used_on_meshes, **ON_CPUS)
    assert len(of_several) == 2
    for *generated, found in of_several:
        assert generated == of_one
        for way, values in json.loads(found).items():
            assert values == pytest.approx(json.loads(measured)[way], rel=LOSS)


def test_from_python_too_one_device_measures_unless_a_mesh_is_given():
    assert in_a_process(devices_that_evaluate, **ON_CPUS) == [1, 1, 8, 2], "the base's devices, and parts of the rows"


def test_a_model_on_a_mesh_of_ones_own_generates():
    assert in_a_process(generated_on_a_mesh_of_ones_own, **ON_CPUS) == [True, True]


def test_devices_that_share_heads_add_up_twice_in_a_layer_for_a_token_and_gather_nothing_of_it():
    """A layer's part of the prompt, and of each token: sums behind attention and MLP, no weights, keys or values."""
    of_1, of_3 = in_a_process(decoded_under_tensor, 1, 3, **ON_CPUS)
    (sums_of_1, gathers_of_1), (sums_of_3, gathers_of_3) = of_1, of_3
    assert (sums_of_3 - sums_of_1) / 2 == 2 * 2
    assert gathers_of_3 == gathers_of_1
