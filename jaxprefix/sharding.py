"""The device mesh and how arrays lie on it. Models hold no sharding code.

Today's mesh has one axis, `data`: the rows of a batch are split over it, everything else is on every device.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """Make a mesh over all devices, with the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The second to last axis, rows of [.., rows, columns], split over `data`; the micro-batch axis comes first."""
    return NamedSharding(mesh, PartitionSpec(None, "data", None))


def rows_on(mesh: Mesh, n_rows: int) -> int:
    """Round a number of rows up to a multiple of the data axis."""
    n_devices = mesh.shape["data"]
    return -(-n_rows // n_devices) * n_devices
