"""The whole training state on disk, through Orbax: encoder, optimizer, and where the run is.

Arrays are stored under their path in the state (`encoder.prefix_mlp.2.weight`), so that a checkpoint can be
read without this package's classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from convert.errors import InputError


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a complete checkpoint; Orbax gives those under way another name."""
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


class Checkpoints:
    """The checkpoints of one run, newest two kept. Saving goes on in the background; leaving `with` waits for it."""

    def __init__(self, folder: Path, create: bool = True):
        self.folder = folder.absolute()
        if not create and not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of checkpoints")
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def newest_step(self) -> int:
        """Return the number of the newest checkpoint. Raises InputError when there is none."""
        step = self._manager.latest_step()
        if step is None:
            raise InputError(f"{self.folder}: holds no checkpoint to go on from")
        return step

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the newest checkpoint as arrays by name, and its JSON object."""
        stored = self._stored(self.newest_step())
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
        arrays, progress = self.restore(like, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        return {name: np.asarray(array) for name, array in arrays.items()}, progress

    def _stored(self, step: int) -> dict[str, Any]:
        return self._manager.item_metadata(step)["state"].tree

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a pytree of arrays, and a JSON object beside it, as checkpoint number `step`."""
        arrays = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
        items = {"state": ocp.args.PyTreeSave(arrays), "progress": ocp.args.JsonSave(progress)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[Any, dict[str, Any]]:
        """Return the newest checkpoint's pytree, placed by `sharding`, and its JSON object.

        `like` gives the structure, shapes and types, of all that was saved or of a part. Raises InputError
        when there is no checkpoint, or its arrays are not those of `like`.
        """
        step = self.newest_step()
        expected = dict(zip(_names(like), jax.tree.leaves(like), strict=True))
        check_shapes(expected, self._stored(step), self.folder / str(step))
        abstract = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for n, leaf in expected.items()}
        placement = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(abstract, restore_args=placement, partial_restore=True)
        items = {"state": state, "progress": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = [restored["state"][name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["progress"]


def from_names(like: Any, arrays: Mapping[str, np.ndarray], where: Path) -> Any:
    """Build a pytree of the structure of `like` from arrays by name. Raises InputError if they do not fit."""
    expected = dict(zip(_names(like), jax.tree.leaves(like), strict=True))
    check_shapes(expected, arrays, where)
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected])


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], where: Path) -> None:
    """Compare what a run needs with what is stored. Raises InputError that lists every difference."""
    problems = [
        f"{name}: expected shape {leaf.shape}, found {found[name].shape if name in found else 'nothing'}"
        for name, leaf in expected.items()
        if name not in found or found[name].shape != leaf.shape
    ]
    if problems:
        raise InputError.all(f"{where}: does not fit this run:", problems)


def _names(state: Any) -> list[str]:
    """Return each leaf's path in the pytree, joined by dots."""
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in paths]
