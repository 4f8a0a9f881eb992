import dataclasses
import json
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
from jaxprefix.devices import compiling_for
from jaxprefix.models import abstract_model, load_model, path_name, weight_shapes, weight_table
from jaxprefix.sharding import base_sharding, decoded_rows, make_mesh, split_heads, with_gathered_embeddings
from jaxprefix.train import train
from tests.base_folders import make_base_folder
from tests.markers import needs_cuda_plugin
from tests.runs import ON_CPUS, OPTIMIZED, losses_of, printed_by, run_config
from tests.tolerances import LOSS, MODEL

NEOX_20B = model_config(SHAPES["20b"])


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


def test_rows_to_decode_are_split_over_data_alone():
    for sizes, n_parts in (({"data": 2, "fsdp": 4}, 2), ({"fsdp": 8}, 1)):
        place = base_sharding(abstract_mesh(**sizes), NEOX_20B.n_head)

        def placed(path, leaf, place=place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path_name(path), leaf.shape))

        base = jax.tree.map_with_path(placed, abstract_model(dataclasses.replace(NEOX_20B, n_layer=1)))
        rows, n_rows = decoded_rows(base)
        assert (rows.spec, n_rows) == (P("data"), n_parts)


def test_a_mesh_must_take_all_devices():
    with pytest.raises(InputError, match="--mesh data=2,tensor=3 is for 6 devices, there are 1"):
        make_mesh({"data": 2, "tensor": 3})


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX tells of a device of one of several hosts with GPUs."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def test_devices_of_several_hosts_make_a_mesh_in_which_those_of_a_host_are_neighbours():
    """`jax.make_mesh` takes hosts for slices of a TPU pod, and refuses several."""
    devices = [Device(2048 * host + n, host, host) for host in (0, 1) for n in range(4)]
    with compiling_for(devices[::-1]):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.devices.ravel().tolist() == devices
    assert [{device.slice_index for device in row.ravel()} for row in mesh.devices] == [{0}, {1}]


MESHES = [f"data={d},fsdp={f},tensor={8 // d // f}" for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
ON_EVERY_MESH = """
import json, sys
from pathlib import Path
import jax
from convert.weights import FiniteWeight
from jaxprefix.config import Compute
from jaxprefix.models import attention, blocked, load_model
from jaxprefix.sharding import base_sharding, make_mesh
from jaxprefix.train import train
from tests.runs import run_config

settings = json.loads(sys.argv[2])
usual = attention.LONG_ROW, blocked.BLOCK
for name, (mesh, base, scan_layers, in_blocks) in json.loads(sys.argv[3]).items():
    attention.LONG_ROW, blocked.BLOCK = (1, 8) if in_blocks else usual
    jax.clear_caches()
    own = {"name": name, "mesh": mesh, "pretrained_model_dir": base, "compute": Compute(scan_layers=scan_layers)}
    train(run_config(Path(sys.argv[1]), **settings | own))
read, n_read = FiniteWeight.read, []
FiniteWeight.read = lambda *given: n_read.append(1) or read(*given)
for sizes in ({"data": 2, "fsdp": 4}, {"fsdp": 8}):
    n_read.clear()
    base = load_model(settings["pretrained_model_dir"], sharding_of=base_sharding(make_mesh(sizes), 4))
    n_parts = [len({str(shard.index) for shard in leaf.addressable_shards}) for leaf in jax.tree.leaves(base)]
    assert len(n_read) == sum(n_parts) and max(n_parts) == sizes["fsdp"], "a part is read once"
print(sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(base)))
"""


@pytest.fixture(scope="module")
def on_every_mesh(tmp_path_factory):
    """Runs of four updates on eight devices: every mesh, and more; and what a device of fsdp=8 holds of the base.

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
    printed = printed_by(ON_EVERY_MESH, str(folder), json.dumps(settings), json.dumps(runs), **ON_CPUS)
    return folder, settings, runs, int(printed)


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
def test_a_device_of_fsdp_8_holds_an_eighth_of_the_base(on_every_mesh):
    _, settings, _, n_bytes = on_every_mesh
    weights = jax.tree.leaves(load_model(settings["pretrained_model_dir"]))
    whole = sum(leaf.nbytes for leaf in weights)
    vectors = sum(leaf.nbytes for leaf in weights if leaf.ndim == 1)  # norms and biases are on every device
    assert vectors < 0.03 * whole
    assert n_bytes == (whole - vectors) / 8 + vectors


ADDED_BY_A_LAYER = """
import dataclasses, sys
from pathlib import Path
from jaxprefix.check import compiled_update
from jaxprefix.config import Compute
from jaxprefix.shapes import PaddedShape
from tests.runs import run_config
from tests.test_sharding import NEOX_20B

sizes = {"n_embd": 128, "n_inner": 512, "n_head": 4, "vocab_size": 440}
for compute in Compute(), Compute(remat="block"), Compute(scan_layers=True), Compute(remat="block", scan_layers=True):
    config = run_config(Path(), mesh="fsdp=8", compute=compute)
    models = (dataclasses.replace(NEOX_20B, n_layer=n, **sizes) for n in (2, 4))
    fewer, more = (compiled_update(config, model, PaddedShape(8, 64)) for model in models)
    needed = (update.memory_analysis().temp_size_in_bytes for update in (more, fewer))
    gathers = (update.as_text().count(" all-gather(") for update in (more, fewer))
    print(*((of_4 - of_2) / 2 for of_4, of_2 in (needed, gathers)))
"""


def test_a_device_of_fsdp_8_gathers_weights_twice_keeps_none_and_computes_its_rows(cpu_compiler):
    """By the compiler's account for devices that save memory, rather than be quick."""
    flags = f"{os.environ['XLA_FLAGS']} {SAVING_ORDER}"
    printed = printed_by(ADDED_BY_A_LAYER, **ON_CPUS, **OPTIMIZED, XLA_FLAGS=flags)
    elementwise, block, *scanned = (tuple(map(float, line.split())) for line in printed.splitlines())
    gathered, n_gathers = 4 * 12 * 128**2, 2 * len(("qkv", "out", "up", "down"))
    for (needed, gathers), (scanned_needed, scanned_gathers) in zip((elementwise, block), scanned, strict=True):
        assert gathers == n_gathers
        assert scanned_gathers == 0, "a loop's gathers are there once"
        assert scanned_needed <= needed, "each device computes its rows, in the loop too"
    assert elementwise[0] < 0.75 * gathered
    assert block[0] < 0.25 * gathered


WAITING_WEIGHTS = """
import dataclasses, jax, jax.numpy as jnp
from benchmarks.shapes import SHAPES, model_config
from jaxprefix.models import abstract_model
from jaxprefix.sharding import make_mesh, with_split_rows

sizes = {"n_layer": 2, "n_embd": 128, "n_inner": 512, "n_head": 8, "vocab_size": 440}
for shape in ("110m", "gpt2"):
    base = abstract_model(dataclasses.replace(model_config(SHAPES[shape]), **sizes))
    for axis in ("fsdp", "tensor"):
        mesh = make_mesh({axis: 8})
        hidden = jax.jit(lambda base, tokens: with_split_rows(base, mesh).hidden(tokens)[0])
        lines = hidden.lower(base, jnp.zeros((8, 64), jnp.int32)).as_text().splitlines()
        waiting = [line for line in lines if "optimization_barrier" in line and "128x128xf32" in line]
        print(len(waiting) > 0 and all("8x64x128xf32" in line for line in waiting))
"""


def test_under_fsdp_attentions_output_weight_waits_for_its_layers_input():
    """A GPU's program gathers those of all layers at its start otherwise; a CPU's drops the barrier."""
    assert printed_by(WAITING_WEIGHTS, **ON_CPUS).split() == ["True", "False"] * 2


GATHERED_UNDER_TENSOR = """
import dataclasses, jax
from pathlib import Path
from benchmarks.shapes import SHAPES, model_config
from jaxprefix.check import compiled_update
from jaxprefix.shapes import PackedShape, PaddedShape
from jaxprefix.models import attention, blocked
from tests.runs import run_config

config = run_config(Path(), mesh="tensor=8")
sizes = {"n_layer": 2, "n_embd": 128, "n_inner": 512, "n_head": 8, "vocab_size": 440}
for shape in ("110m", "gpt2"):
    model = dataclasses.replace(model_config(SHAPES[shape]), **sizes)
    for rows in (PaddedShape(8, 64), PackedShape(2, 64, ((4, 32),)), PackedShape(2, 64, ((1, 32), (3, 16)), 24)):
        print(compiled_update(config, model, rows).as_text().count(" all-gather("))
attention.LONG_ROW, blocked.BLOCK = 64, 16
jax.clear_caches()
print(compiled_update(config, model, PaddedShape(8, 64)).as_text().count(" all-gather("))
"""


def test_devices_that_share_heads_gather_the_prefixs_gradient_alone():
    assert printed_by(GATHERED_UNDER_TENSOR, **ON_CPUS).split() == ["1"] * 7


PACKED_ON_A_MESH = """
import jax
import numpy as np
from jaxprefix import load_model, load_tokenizer
from jaxprefix.batches import make_packed_batch
from jaxprefix.shapes import PackedShape
from jaxprefix.hosts import spread
from jaxprefix.loss import batch_loss
from jaxprefix.sharding import base_sharding, make_mesh, split_rows, with_split_rows
from tests.arrays import random_prefix
from tests.base_folders import GOLDEN_BASE
from tests.examples import EXAMPLES

batch = make_packed_batch(EXAMPLES, load_tokenizer(GOLDEN_BASE), PackedShape(4, 24, ((1, 15), (2, 9))))

def loss(prefix, base, batch, mesh=None):
    return batch_loss(base if mesh is None else with_split_rows(base, mesh), prefix, batch)

computed = jax.jit(jax.value_and_grad(loss), static_argnums=3)
base = load_model(GOLDEN_BASE)
prefix = random_prefix(base.config)
right = computed(prefix, base, batch)
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
placed = load_model(GOLDEN_BASE, sharding_of=base_sharding(mesh, base.config.n_head))
ours = computed(prefix, placed, spread(batch, split_rows(mesh, axis=0)), mesh)
print(*(float(abs(np.asarray(a) - b).max() / abs(b).max()) for a, b in zip(ours, right)))
"""


def test_packed_texts_of_two_classes_have_the_loss_and_gradient_of_one_device_on_a_mesh():
    differences = [float(number) for number in printed_by(PACKED_ON_A_MESH, **ON_CPUS).split()]
    assert len(differences) == 2
    assert max(differences) < MODEL


ADDED_UP_BY_A_LAYER = """
import dataclasses, math, re
from pathlib import Path
from benchmarks.memory import h100s
from jaxprefix.check import compiled_update
from jaxprefix.shapes import PaddedShape
from tests.runs import run_config
from tests.test_sharding import NEOX_20B

sizes = {"n_embd": 1024, "n_inner": 4096, "n_head": 16, "vocab_size": 512}
config = run_config(Path(), mesh="tensor=8", dtype="bfloat16")
with h100s(8):
    models = (dataclasses.replace(NEOX_20B, n_layer=n, **sizes) for n in (2, 4))
    fewer, more = (compiled_update(config, model, PaddedShape(8, 512)).as_text() for model in models)
for dtype in ("bf16", "f32"):
    shapes = re.compile(rf"= [(]*{dtype}\\[([\\d,]+)\\].* all-reduce(?:-start)?\\(")
    found = (shapes.findall(update) for update in (more, fewer))
    of_4, of_2 = (sum(math.prod(map(int, shape.split(","))) for shape in of_one) for of_one in found)
    print((of_4 - of_2) / 2 / (8 * 512 * sizes["n_embd"]))
"""


@needs_cuda_plugin
def test_gpus_that_share_a_parallel_layers_weights_add_up_three_arrays_in_half_precision():
    """Forward one for attention and MLP together, backward one for each."""
    printed = printed_by(ADDED_UP_BY_A_LAYER, JAX_PLATFORMS="cpu", **OPTIMIZED, XLA_FLAGS="")
    assert printed.split() == ["3.0", "0.0"]


def test_heads_that_tensor_does_not_divide_stay_whole():
    for n_head, qkv, gpt2s, out in ((6, (288, 96), (3, 96, 96), (96, 96)), (8, (72, 96), (3, 24, 96), (96, 24))):
        place = base_sharding(abstract_mesh(tensor=4), n_head)
        assert place("layers.0.attention.qkv.weight", (288, 96)).shard_shape((288, 96)) == qkv
        assert place("layers.0.attention.qkv.weight", (3, 96, 96)).shard_shape((3, 96, 96)) == gpt2s
        assert place("layers.0.attention.out.weight", (96, 96)).shard_shape((96, 96)) == out
        assert place("layers.0.mlp.up.weight", (384, 96)).shard_shape((384, 96)) == (96, 96)
    with compiling_for([Device(n, 0, 0) for n in range(4)]):
        specs = [split_heads(make_mesh({"tensor": 4}), n_head).spec for n_head in (6, 8)]
    assert specs == [P(), P(None, None, None, "tensor", None)], "of a prefix"


WHAT_THE_MESH_DECIDES = """
import sys
from pathlib import Path
from jaxprefix import loss, metrics, update
from jaxprefix.train import train
from tests.runs import run_config

told, next_token_loss, with_split_rows = set(), loss.next_token_loss, update.with_split_rows
for module in (metrics, update):
    module.with_split_rows = lambda *given, name=module.__name__: told.add(name) or with_split_rows(*given)
loss.next_token_loss = lambda *given: told.add(f"{given[3]} devices") or next_token_loss(*given)
train(run_config(Path(sys.argv[1]), mesh="fsdp=8", n_training_steps=1, save_model=False, save_log=False))
print(*sorted(told), sep=", ")
"""


def test_the_dev_sets_rows_are_split_as_an_updates_are(tmp_path):
    printed = printed_by(WHAT_THE_MESH_DECIDES, str(tmp_path), **ON_CPUS)
    assert printed == "8 devices, jaxprefix.metrics, jaxprefix.update\n"
