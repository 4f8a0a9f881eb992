"""The whole training state on disk, through Orbax: encoder, optimizer, and where the run is.

Arrays are stored under their path in the state (`encoder.prefix_mlp.2.weight`), so that a checkpoint can be
read without this package's classes. Beside them stands a JSON object: `progress`, where the run is, and `sha256`, the
checksum of each array and of `progress`. A checkpoint counts only if all of it can be read and fits these sums.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from convert.errors import InputError, RunError
from jaxprefix.hosts import anywhere, is_first, wait_for_all

Found = TypeVar("Found")


def newest_checkpoint(folder: Path) -> int | None:
    """Return the number of the newest complete checkpoint; Orbax gives those under way another name."""
    return max((int(child.name) for child in folder.glob("*") if child.name.isdigit()), default=None)


class Checkpoints:
    """The checkpoints of one run, newest two kept. Saving goes on in the background; leaving `with` waits for it.

    With `create` the run is the caller's: what a killed run left unfinished is removed, and a damaged checkpoint is put
    aside. Without, nothing is written.
    """

    def __init__(self, folder: Path, create: bool = True):
        self.folder = folder.absolute()
        self._writing = create
        if not create and not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of checkpoints")
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=create)
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.finish()
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a pytree of arrays, and a JSON object beside it, as checkpoint number `step`.

        Raises RunError when this cannot be done, or when the save before it has failed in the background.
        """
        self.finish()  # the manager would leave this one out while another is being written
        arrays = dict(zip(_names(state), jax.tree.leaves(state), strict=True))
        sums = {name: _sha256(np.asarray(array)) for name, array in arrays.items()}
        record = {"progress": progress, "sha256": {**sums, "progress": _sha256(progress)}}
        items = {"state": ocp.args.PyTreeSave(arrays), "progress": ocp.args.JsonSave(record)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._unsaved(step, error) from error

    def finish(self) -> None:
        """Wait for what is being saved. Raises RunError when that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved("being written", error) from error

    def _unsaved(self, which: int | str, error: Exception) -> RunError:
        newest = newest_checkpoint(self.folder)
        left = "there is none before it" if newest is None else f"the last good one is {newest}"
        return RunError(f"{self.folder}: the checkpoint {which} cannot be saved ({_first_line(error)}); {left}")

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the newest undamaged checkpoint as arrays by name, and its JSON object."""

        def read_step(step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self._stored(step).items()}
            arrays, progress = self._restore(step, like, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
            return {name: np.asarray(array) for name, array in arrays.items()}, progress

        return self._newest_undamaged(read_step)

    def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[Any, dict[str, Any]]:
        """Return the newest undamaged checkpoint's pytree, placed by `sharding`, and its JSON object.

        `like` gives the structure, shapes and types, of all that was saved or of a part. Raises InputError
        when there is no undamaged checkpoint, or its arrays are not those of `like`.
        """
        return self._newest_undamaged(lambda step: self._restore(step, like, sharding))

    def _newest_undamaged(self, attempt: Callable[[int], Found]) -> Found:
        """Return what `attempt` makes of the newest checkpoint that it can be made of; put aside those after it."""
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = attempt(step)
            except _DamagedError as error:
                damaged[step] = str(error)
            if not anywhere(step in damaged):
                for number, problem in damaged.items():
                    self._put_aside(number, f"{problem}; going on from {step}")
                return found
            damaged.setdefault(step, "another process cannot read it")
        if not damaged:
            raise InputError(f"{self.folder}: holds no checkpoint to go on from")
        problems = [f"{step}: {problem}" for step, problem in damaged.items()]
        raise InputError.all(f"{self.folder}: every checkpoint is damaged; --overwrite starts the run anew:", problems)

    def _put_aside(self, step: int, problem: str) -> None:
        """Say that a checkpoint is damaged, and free its number; only the last one so found is kept for inspection."""
        if is_first():
            print(f"WARNING: {self.folder / str(step)}: damaged, {problem}", file=sys.stderr, flush=True)
            if self._writing:
                for earlier in self.folder.glob("*.damaged"):
                    shutil.rmtree(earlier)
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        wait_for_all(f"put checkpoint {step} aside")
        self._manager.reload()

    def _stored(self, step: int) -> dict[str, Any]:
        try:
            return dict(self._manager.item_metadata(step)["state"].tree)
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise _DamagedError(_first_line(error)) from error

    def _restore(self, step: int, like: Any, sharding: jax.sharding.Sharding) -> tuple[Any, dict[str, Any]]:
        expected = dict(zip(_names(like), jax.tree.leaves(like), strict=True))
        check_shapes(expected, self._stored(step), self.folder / str(step))
        abstract = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for n, leaf in expected.items()}
        placement = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = ocp.args.PyTreeRestore(abstract, restore_args=placement, partial_restore=True)
        items = {"state": state, "progress": ocp.args.JsonRestore()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            progress, sums = restored["progress"]["progress"], restored["progress"]["sha256"]
            found = {name: restored["state"][name] for name in expected}
            differing = [name for name, array in found.items() if _sha256(np.asarray(array)) != sums[name]]
            differing += ["progress"] if _sha256(progress) != sums["progress"] else []
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise _DamagedError(_first_line(error)) from error
        if differing:
            raise _DamagedError(f"what it holds of {differing[0]} is not what was saved")
        return jax.tree.unflatten(jax.tree.structure(like), list(found.values())), progress


class _DamagedError(Exception):
    """A checkpoint does not hold what was saved."""


def _sha256(value: np.ndarray | dict[str, Any]) -> str:
    """Return the checksum of an array or of a JSON object."""
    content = np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
