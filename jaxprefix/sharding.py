"""The device mesh and how arrays lie on it. Models hold no sharding code.

Axes of the mesh:
    data    splits the rows of a batch; weights are whole on each part
    fsdp    splits rows, too, and every large weight; XLA gathers a weight where it is used
    tensor  splits heads and the inner width of the MLP

The prefix encoder is whole on every device; the prefix it makes is split on heads over `tensor`.
"""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from convert.errors import InputError
from jaxprefix.config import MESH_AXES
from jaxprefix.machine.devices import devices
from jaxprefix.models import BaseModel, is_stacked, path_name

ROWS = ("data", "fsdp")
Weights = TypeVar("Weights")

# Path of a base model's weight → how its axes are split. The first rule that matches, with a spec that is empty or has
# as many axes as the weight, applies. Weights are [out, in], see `layers.Linear`. Layer numbers are left out of paths.
BASE_RULES: tuple[tuple[str, P], ...] = (
    (r"embed\.weight", P("tensor", "fsdp")),  # [V, D]
    (r"head\.weight", P("tensor", "fsdp")),  # [V, D]
    (r"embed_positions\.weight", P(None, "fsdp")),  # [positions, D]
    (r"layers\.attention\.qkv\.weight", P("tensor", "fsdp")),  # GPT-NeoX: [N·3·H, D]
    (r"layers\.attention\.qkv\.bias", P("tensor")),
    (r"layers\.attention\.qkv\.weight", P(None, "tensor", "fsdp")),  # GPT-2: [3, N·H, D]
    (r"layers\.attention\.qkv\.bias", P(None, "tensor")),
    (r"layers\.attention\.out\.weight", P("fsdp", "tensor")),  # [D, N·H]
    (r"layers\.mlp\.up\.weight", P("tensor", "fsdp")),  # [F, D]
    (r"layers\.mlp\.up\.bias", P("tensor")),
    (r"layers\.mlp\.down\.weight", P("fsdp", "tensor")),  # [D, F]
    (r"layers\.(attention\.out|mlp\.down)\.bias", P()),
    (r"(layers\.attention|layers\.mlp|final)_norm\.(weight|bias)", P()),
)


def make_mesh(sizes: dict[str, int] | None = None) -> Mesh:
    """Make a mesh of the given sizes over all devices of all processes; without sizes, all devices are `data`.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    sizes = sizes or {"data": len(devices())}
    if math.prod(sizes.values()) != len(devices()):
        given = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(f"--mesh {given} is for {math.prod(sizes.values())} devices, there are {len(devices())}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    # jax.make_mesh refuses several hosts with GPUs, which it takes for slices of a TPU pod.
    arranged = mesh_utils.create_device_mesh(shape, devices(), allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def base_sharding(mesh: Mesh | AbstractMesh, n_head: int) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return a function from a base weight's path and shape to its sharding; it raises KeyError if no rule matches.

    An axis whose length the mesh does not divide stays whole, and so do all heads if `tensor` does not divide their
    number.
    """
    whole_heads = n_head % mesh.shape["tensor"] != 0

    def fits(path: str, axis: str | None, size: int) -> bool:
        splits_heads = axis == "tensor" and "attention" in path
        return axis is not None and size % mesh.shape[axis] == 0 and not (splits_heads and whole_heads)

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        front, own = ((None,), shape[1:]) if is_stacked(path) else ((), shape)  # all devices have all layers
        matches = (spec for rule, spec in BASE_RULES if re.fullmatch(rule, re.sub(r"\.\d+\.", ".", path)))
        spec = next((spec for spec in matches if len(spec) in (0, len(own))), None)
        if spec is None:
            raise KeyError(f"no sharding rule for {path}")
        axes = (axis if fits(path, axis, size) else None for axis, size in zip(spec, own, strict=False))
        return NamedSharding(mesh, P(*front, *axes))

    return place


def with_split_rows(base: BaseModel, mesh: Mesh | AbstractMesh) -> BaseModel:
    """Constrain a base model, inside jit, so that each device computes only its own rows.

    With weights split over `fsdp`, the partitioner would split the activations' width instead, and compute all rows on
    every device: after the embedding, because its weight is split that way, and in the loop over scanned layers,
    because theirs are. Unrolled layers are `gathered_in_time`.
    """
    if mesh.shape["fsdp"] == 1:
        return base
    base = with_gathered_embeddings(base, mesh)
    rows = NamedSharding(mesh, P(ROWS))

    def with_rows(layer: Callable[..., Any], x: Array, *others: Any) -> Any:
        return layer(jax.lax.with_sharding_constraint(x, rows), *others)

    layers: Any
    if base.compute.scan_layers:
        layers = nnx.data(jax.tree_util.Partial(with_rows, base.layers))
    else:
        layers = nnx.List([nnx.data(jax.tree_util.Partial(gathered_in_time, layer)) for layer in base.layers])
    base.layers = layers
    return base


def gathered_in_time(layer: Any, x: Array, *others: Any) -> Any:
    """Run a layer whose attention output weight is gathered only once x is computed.

    XLA would gather those of all layers at the start of the program and keep them: 2.5 GiB for NeoX-20B.
    """
    weight, x = jax.lax.optimization_barrier((layer.attention.out.weight[...], x))

    def ordered(path: Any, leaf: Array) -> Array:
        return weight if path_name(path) == "attention.out.weight" else leaf

    return jax.tree.map_with_path(ordered, layer)(x, *others)


def with_gathered_embeddings(base: Weights, mesh: Mesh | AbstractMesh) -> Weights:
    """Gather the embeddings along their width, inside jit."""

    def gather(path: Any, weight: Array) -> Array:
        name = path_name(path)
        if "embed" not in name:
            return weight
        splits = "embed_positions" not in name and len(weight) % mesh.shape["tensor"] == 0  # a tied head stays split
        return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P("tensor" if splits else None, None)))

    return jax.tree.map_with_path(gather, base)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def split_rows(mesh: Mesh, axis: int = 1) -> NamedSharding:
    """Return the sharding that splits rows over `data` and `fsdp`; `axis` 1 is for [micro-batches, rows, columns]."""
    return NamedSharding(mesh, P(*[None] * axis, ROWS))


def decoded_rows(base: BaseModel) -> tuple[Sharding, int]:
    """Return the sharding of rows to decode, split only over `data`, and the number they must be a multiple of.

    Under `fsdp`, computing the few rows on every device costs less than gathering weights for each token.
    """
    sharding = base.embed.weight.get_value().sharding
    if not isinstance(sharding, NamedSharding):
        return sharding, 1
    if "data" not in sharding.mesh.shape:  # the user's own mesh
        return NamedSharding(sharding.mesh, P()), 1
    return NamedSharding(sharding.mesh, P("data")), sharding.mesh.shape["data"]


def split_heads(mesh: Mesh, n_head: int) -> NamedSharding:
    """Return the sharding that splits the heads of a prefix [L, 2, P, N, H] over `tensor`, if it divides them."""
    return NamedSharding(mesh, P(None, None, None, "tensor", None) if n_head % mesh.shape["tensor"] == 0 else P())


def n_row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Return how many parts rows are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)
