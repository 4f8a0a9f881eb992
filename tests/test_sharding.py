import math

import pytest
from jax.sharding import AbstractMesh, AxisType

from convert.errors import InputError
from convert.table import expand, path_of
from jaxprefix.models import weight_shapes, weight_table
from jaxprefix.models.config import ModelConfig
from jaxprefix.sharding import base_sharding, make_mesh

NEOX_20B = ModelConfig(
    name="EleutherAI/gpt-neox-20b",
    model_type="gpt_neox",
    n_layer=44,
    n_head=64,
    n_embd=6144,
    n_inner=24576,
    vocab_size=50432,
    n_positions=2048,
    activation="gelu_fast",
    tied_head=False,
    layer_norm_eps=1e-5,
    rotary_fraction=0.25,
    rotary_base=10000.0,
    parallel_residual=True,
)


def abstract_mesh(**sizes):
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}])
def test_the_20b_configuration_has_a_rule_a_shape_and_a_place_for_every_tensor(sizes):
    shapes = weight_shapes(NEOX_20B)
    rules = [path_of(rule) for rule in expand(weight_table(NEOX_20B), NEOX_20B.n_layer).values() if rule]
    assert sorted(rules) == sorted(shapes)
    place = base_sharding(abstract_mesh(**sizes))
    per_device = sum(math.prod(place(path, shape).shard_shape(shape)) for path, shape in shapes.items())
    total = sum(map(math.prod, shapes.values()))
    assert total == 20_554_567_680
    assert per_device < 1.002 * total / 8


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    place = base_sharding(abstract_mesh(fsdp=8, tensor=3))
    assert place("embed.weight", (50432, 64)).shard_shape((50432, 64)) == (50432, 8)
    with pytest.raises(KeyError, match=r"no sharding rule for embed.bias"):
        place("embed.bias", (5,))


def test_a_mesh_must_take_all_devices():
    with pytest.raises(InputError, match="--mesh data=2,tensor=3 is for 6 devices, there are 1"):
        make_mesh({"data": 2, "tensor": 3})
