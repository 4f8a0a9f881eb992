import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.memory import SAVING_ORDER
from benchmarks.shapes import SHAPES, model_config
from convert.errors import InputError
from convert.table import expand, path_of
from jaxprefix.config import Compute
from jaxprefix.machine.devices import compiling_for
from jaxprefix.models import abstract_model, is_stacked, load_model, path_name, weight_shapes, weight_table
from jaxprefix.sharding import (
    base_sharding,
    decoded_rows,
    make_mesh,
    split_heads,
    with_gathered_embeddings,
    with_split_rows,
)
from jaxprefix.train import train
from tests.base_folders import make_base_folder
from tests.markers import needs_cuda_plugin
from tests.on_devices import (
    NEOX_20B,
    ON_CPUS,
    OPTIMIZED,
    SMALL,
    added_by_a_layer,
    arrays_added_up_by_a_layer,
    gathers_under_tensor,
    in_a_process,
    packed_on_a_mesh,
    runs_on_meshes,
    told_of_the_mesh,
    weights_that_wait,
)
from tests.runs import losses_of, run_config
from tests.tolerances import LOSS, MODEL


def abstract_mesh(**sizes):
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}])
def test_the_20b_configuration_has_a_rule_a_shape_and_a_place_for_every_tensor(sizes):
    shapes = weight_shapes(NEOX_20B)
    rules = [path_of(rule) for rule in expand(weight_table(NEOX_20B), NEOX_20B.n_layer).values() if rule]
    assert sorted(rules) == sorted(shapes)
    place = base_sharding(abstract_mesh(**sizes), NEOX_20B.n_head)
    per_device = sum(math.prod(place(path, shape).shard_shape(shape)) for path, shape in shapes.items())
    total = sum(map(math.prod, shapes.values()))
    assert total == 20_554_567_680
    assert per_device < 1.002 * total / 8


QKV_IN_PARTS = {"110m": {"qkv.weight": (2, 4), "qkv.bias": (2,)}, "gpt2": {"qkv.weight": (1, 2, 4), "qkv.bias": (1, 2)}}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("shape", QKV_IN_PARTS)
def test_fsdp_splits_the_models_width_and_tensor_what_is_computed_of_it(shape, scan_layers):
    """Vectors of the model's width are whole on all devices, and so are the layers of a loop."""
    in_parts = {"embed.weight": (2, 4), "head.weight": (2, 4), "embed_positions.weight": (1, 4)} | QKV_IN_PARTS[shape]
    in_parts |= {"out.weight": (4, 2), "up.weight": (2, 4), "up.bias": (2,), "down.weight": (4, 2)}
    place = base_sharding(abstract_mesh(fsdp=4, tensor=2), SMALL["n_head"])
    model = dataclasses.replace(model_config(SHAPES[shape]), n_layer=4, **SMALL)
    for path, leaf in jax.tree.leaves_with_path(abstract_model(model, Compute(scan_layers=scan_layers))):
        name, size = path_name(path), leaf.shape
        own = in_parts.get(".".join(name.split(".")[-2:]), (1,))
        parts = tuple(np.divide(size, place(name, size).shard_shape(size)))
        assert parts == ((1, *own) if is_stacked(name) else own), name


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    place = base_sharding(abstract_mesh(fsdp=8, tensor=3), 12)
    assert place("embed.weight", (50432, 64)).shard_shape((50432, 64)) == (50432, 8)
    with pytest.raises(KeyError, match=r"no sharding rule for embed.bias"):
        place("embed.bias", (5,))


def test_an_embedding_stays_split_over_tensor_as_far_as_it_is_a_head():
    weights = {name: {"weight": jnp.zeros((8, 4))} for name in ("embed", "embed_positions", "head")}
    for sizes, spec in (({"fsdp": 2, "tensor": 2}, P("tensor", None)), ({"fsdp": 2, "tensor": 3}, P(None, None))):
        constraints = jax.make_jaxpr(with_gathered_embeddings, static_argnums=1)(weights, abstract_mesh(**sizes)).eqns
        assert [constraint.params["sharding"].spec for constraint in constraints] == [spec, P(None, None)]


def test_in_a_loop_over_layers_rows_are_split_over_data_and_fsdp():
    mesh, compute = abstract_mesh(data=2, fsdp=2), Compute(scan_layers=True)
    base = abstract_model(dataclasses.replace(NEOX_20B, n_layer=2, **SMALL), compute)
    hidden = jax.make_jaxpr(lambda base, tokens: with_split_rows(base, mesh).hidden(tokens)[0])
    program = str(hidden(base, jax.ShapeDtypeStruct((8, 16), jnp.int32)))
    assert str(P(("data", "fsdp"))) in program


def test_rows_to_decode_are_split_over_data_alone():
    for sizes, n_parts in (({"data": 2, "fsdp": 4}, 2), ({"fsdp": 8}, 1)):
        place = base_sharding(abstract_mesh(**sizes), NEOX_20B.n_head)

        def placed(path, leaf, place=place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path_name(path), leaf.shape))

        base = jax.tree.map_with_path(placed, abstract_model(dataclasses.replace(NEOX_20B, n_layer=1)))
        rows, n_rows = decoded_rows(base)
        assert (rows.spec, n_rows) == (P("data"), n_parts)


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX tells of a device of one of several hosts with GPUs."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def test_a_mesh_must_take_all_devices():
    with pytest.raises(InputError, match="--mesh data=2,tensor=3 is for 6 devices, there are 1"):
        make_mesh({"data": 2, "tensor": 3})
    eight = compiling_for([Device(n, 0, 0) for n in range(8)])
    with eight, pytest.raises(InputError, match="--mesh data=2 is for 2 devices, there are 8"):
        make_mesh({"data": 2})


def test_without_sizes_a_mesh_is_along_data():
    with compiling_for([Device(n, 0, 0) for n in range(8)]):
        assert make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}


def test_devices_of_several_hosts_make_a_mesh_in_which_those_of_a_host_are_neighbours():
    """`jax.make_mesh` takes hosts for slices of a TPU pod, and refuses several."""
    devices = [Device(2048 * host + n, host, host) for host in (0, 1) for n in range(4)]
    with compiling_for(devices[::-1]):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.devices.ravel().tolist() == devices
    assert [{device.slice_index for device in row.ravel()} for row in mesh.devices] == [{0}, {1}]


MESHES = [f"data={d},fsdp={f},tensor={8 // d // f}" for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


@pytest.fixture(scope="module")
def on_every_mesh(tmp_path_factory):
    """Runs of four updates on eight devices: every mesh, and more; and how their base is loaded under fsdp.

    By name: mesh, base, whether layers are scanned, and whether attention takes rows in blocks.
    """
    folder = tmp_path_factory.mktemp("meshes")
    base = str(make_base_folder(folder / "base", num_attention_heads=8, hidden_size=128, num_hidden_layers=2))
    gpt2 = str(make_base_folder(folder / "gpt2", model_type="gpt2", n_head=8, n_embd=128))
    runs = {mesh: (mesh, base, False, False) for mesh in MESHES}
    runs |= {f"scanned,{mesh}": (mesh, base, True, False) for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2")}
    runs |= {f"gpt2,{mesh}": (mesh, gpt2, False, False) for mesh in ("tensor=8", "data=2,fsdp=2,tensor=2")}
    runs |= {f"in blocks,{mesh}": (mesh, base, False, True) for mesh in ("tensor=8", "data=2,fsdp=2,tensor=2")}
    settings = {"pretrained_model_dir": base, "n_training_steps": 4, "save_model": False}
    return folder, settings, runs, in_a_process(runs_on_meshes, str(folder), settings, runs, **ON_CPUS)


@pytest.mark.slow
def test_every_mesh_of_eight_devices_gives_the_losses_of_one(on_every_mesh, tmp_path):
    folder, settings, runs, _ = on_every_mesh
    assert len(MESHES) == 10
    alone = {}
    for base in {base for _, base, *_ in runs.values()}:
        alone[base] = run_config(tmp_path, Path(base).name, **settings | {"pretrained_model_dir": base})
        train(alone[base])
    for name, (_, base, *_) in runs.items():
        for split, n_points in (("train", 4), ("dev", 1)):
            losses = losses_of(folder / name, split)
            assert len(losses) == n_points
            np.testing.assert_allclose(losses, losses_of(alone[base].run_dir, split), rtol=LOSS, err_msg=name)


@pytest.mark.slow
def test_a_part_of_a_weight_is_read_once(on_every_mesh):
    *_, loaded = on_every_mesh
    for (n_read, n_parts, _), n_devices in zip(loaded, (4, 8), strict=True):
        assert n_read == sum(n_parts)
        assert max(n_parts) == n_devices


@pytest.mark.slow
def test_a_device_of_fsdp_8_holds_an_eighth_of_the_base(on_every_mesh):
    _, settings, _, (_, (_, _, n_bytes)) = on_every_mesh
    weights = jax.tree.leaves(load_model(settings["pretrained_model_dir"]))
    whole = sum(leaf.nbytes for leaf in weights)
    vectors = sum(leaf.nbytes for leaf in weights if leaf.ndim == 1)  # norms and biases are on every device
    assert vectors < 0.03 * whole
    assert n_bytes == (whole - vectors) / 8 + vectors


def test_a_device_of_fsdp_8_gathers_weights_twice_keeps_none_and_computes_its_rows(user_options):
    """By the compiler's account for devices that save memory, rather than be quick."""
    flags = f"{os.environ['XLA_FLAGS']} {SAVING_ORDER}"
    elementwise, block, *scanned = in_a_process(added_by_a_layer, **ON_CPUS, **OPTIMIZED, XLA_FLAGS=flags)
    gathered, n_gathers = 4 * 12 * 128**2, 2 * len(("qkv", "out", "up", "down"))
    for (needed, gathers), (scanned_needed, scanned_gathers) in zip((elementwise, block), scanned, strict=True):
        assert gathers == n_gathers
        assert scanned_gathers == 0, "a loop's gathers are there once"
        assert scanned_needed <= needed, "each device computes its rows, in the loop too"
    assert elementwise[0] < 0.75 * gathered
    assert block[0] < 0.25 * gathered


def test_under_fsdp_attentions_output_weight_waits_for_its_layers_input():
    """A GPU's program gathers those of all layers at its start otherwise; a CPU's drops the barrier."""
    assert in_a_process(weights_that_wait, **ON_CPUS) == [True, False] * 2


def test_devices_that_share_heads_gather_the_prefixs_gradient_alone():
    assert in_a_process(gathers_under_tensor, **ON_CPUS) == [1] * 7


def test_packed_texts_of_two_classes_have_the_loss_and_gradient_of_one_device_on_a_mesh():
    differences = in_a_process(packed_on_a_mesh, **ON_CPUS)
    assert len(differences) == 2
    assert max(differences) < MODEL


@needs_cuda_plugin
def test_gpus_that_share_a_parallel_layers_weights_add_up_three_arrays_in_half_precision():
    """Forward one for attention and MLP together, backward one for each."""
    added_up = in_a_process(arrays_added_up_by_a_layer, JAX_PLATFORMS="cpu", **OPTIMIZED, XLA_FLAGS="")
    assert added_up == [3, 0]


def test_heads_that_tensor_does_not_divide_stay_whole():
    for n_head, qkv, gpt2s, out in ((6, (288, 48), (3, 96, 48), (48, 96)), (8, (72, 48), (3, 24, 48), (48, 24))):
        place = base_sharding(abstract_mesh(fsdp=2, tensor=4), n_head)
        assert place("layers.0.attention.qkv.weight", (288, 96)).shard_shape((288, 96)) == qkv
        assert place("layers.0.attention.qkv.weight", (3, 96, 96)).shard_shape((3, 96, 96)) == gpt2s
        assert place("layers.0.attention.out.weight", (96, 96)).shard_shape((96, 96)) == out
        assert place("layers.0.mlp.up.weight", (384, 96)).shard_shape((384, 96)) == (96, 48)
    with compiling_for([Device(n, 0, 0) for n in range(4)]):
        specs = [split_heads(make_mesh({"tensor": 4}), n_head).spec for n_head in (6, 8)]
    assert specs == [P(), P(None, None, None, "tensor", None)], "of a prefix"


def test_the_dev_sets_rows_are_split_as_an_updates_are(tmp_path):
    told = in_a_process(told_of_the_mesh, str(tmp_path), **ON_CPUS)
    assert told == ["8 devices", "8 parts", "jaxprefix.metrics", "jaxprefix.update"]
