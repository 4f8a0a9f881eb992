"""The whole training state on disk, through Orbax: encoder, optimizer, and how far the run has come.

Arrays are stored under their path in the state (`encoder.prefix_mlp.2.weight`), so that a checkpoint can be read
without this package's classes. A JSON object beside them holds `step` (the checkpoint's number), `progress` (how far
the run has come) and `sha256` (the checksums of each array and of `progress`). A checkpoint is valid only if all of it
can be read and matches its number and its checksums.
"""

import contextlib
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from convert.errors import InputError
from jaxprefix.machine.hosts import (
    anywhere,
    barrier_unless_failed,
    broadcast_from_first,
    is_first,
    wait_for_all,
    wait_until_visible,
)
from jaxprefix.machine.screen import warn
from jaxprefix.models import path_name
from jaxprefix.run.orbax_errors import SaveError, orbax_kept_short, short_reason

CHECKPOINTS = "checkpoints"
"""Their folder in that of a run."""
KEPT = 2
MOST_CHECKPOINTS = 8
"""Most checkpoints considered; more than KEPT exist only if removing one failed, or the run was killed first."""
STATE, PROGRESS, PROGRESS_FILE = "state", "progress", "progress.json"


def newest_checkpoint(folder: Path) -> int | None:
    """Return the number of the newest complete checkpoint; Orbax names unfinished ones differently."""
    return max(_numbers(folder), default=None)


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of complete checkpoints: counts of updates, which are 32-bit integers."""
    named = [child for child in folder.glob("*") if re.fullmatch("0|[1-9][0-9]{0,9}", child.name) and child.is_dir()]
    return [number for child in named if (number := int(child.name)) <= np.iinfo(np.int32).max]


class Checkpoints:
    """The checkpoints of one run, of which the newest two are kept. Saves run in the background; leaving `with` waits.

    With `writing`, the run is the caller's own: checkpoints that a killed run left unfinished, and those older than the
    newest two, are removed, and damaged ones are put aside. Without it, nothing on the disk changes.
    """

    def __init__(self, folder: Path, writing: bool = True):
        self.folder = folder.absolute()
        self._writing = writing
        if not writing and not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of checkpoints")

    def __enter__(self) -> "Checkpoints":
        self._closing = contextlib.ExitStack()
        if self._writing:
            self._closing.enter_context(orbax_kept_short())
        self._closing.push(self._close)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    def _close(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.finish()
        finally:
            if self._in_use:
                try:
                    self._manager.close()
                except Exception:
                    if not isinstance(error, SaveError):  # this one follows from a SaveError
                        raise

    @functools.cached_property
    def _manager(self) -> Any:
        """Orbax's manager, made when first needed, so that a run's first update does not wait for Orbax's import."""
        import orbax.checkpoint as ocp

        handlers = {STATE: ocp.PyTreeCheckpointHandler(), PROGRESS: ocp.JsonCheckpointHandler(PROGRESS_FILE)}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            cleanup_tmp_directories=self._writing,
            lightweight_initialize=True,
            # If folders were made in the background, threads would wait for minutes for one that cannot be made.
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=barrier_unless_failed, create_directories_asynchronously=False
            ),
        )
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    @property
    def _in_use(self) -> bool:
        return "_manager" in vars(self)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Save a pytree of arrays, and `progress` beside it, as checkpoint number `step`.

        Raises SaveError when this cannot be done, or when the previous save failed in the background.
        """
        from orbax.checkpoint import args

        self.finish()  # while another save is under way, the manager would skip this one
        arrays = named(state)
        sums = {name: _sha256(np.asarray(array)) for name, array in arrays.items()}
        record = {"step": step, "progress": progress, "sha256": {**sums, "progress": _sha256(progress)}}
        items = {STATE: args.PyTreeSave(arrays), PROGRESS: args.JsonSave(record)}
        try:
            self._manager.save(step, args=args.Composite(**items), force=True)
        except Exception as error:
            raise self._unsaved(f"checkpoint {step}", error) from error

    def finish(self) -> None:
        """Wait for the save in progress. Raises SaveError if it failed."""
        if not self._in_use:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved("the checkpoint in progress", error) from error

    def _unsaved(self, which: str, error: Exception) -> SaveError:
        newest = newest_checkpoint(self.folder)
        left = "there is no earlier one" if newest is None else f"the last good one is {newest}"
        return SaveError(f"{self.folder}: {which} cannot be saved ({short_reason(error)}); {left}")

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the newest undamaged checkpoint: arrays by name, and `progress`. A writer puts damaged ones aside.

        Raises InputError when there is none.
        """
        damaged: dict[int, str] = {}
        steps = self._steps()
        for index, step in enumerate(steps):
            try:
                found = self._read(step)
            except _DamagedError as error:
                damaged[step] = str(error)
            if not anywhere(step in damaged):
                for number, problem in reversed(damaged.items()):
                    self._put_aside(number, f"{problem}; going on from {step}")
                if self._writing:
                    for older in steps[index + KEPT :]:
                        self._manager.delete(older)
                return found
            damaged.setdefault(step, "another process cannot read it")
        if not damaged:
            raise InputError(f"{self.folder}: holds no checkpoint to go on from")
        problems = [f"{step}: {problem}" for step, problem in damaged.items()]
        raise InputError.all(
            f"{self.folder}: every checkpoint is damaged; train --overwrite starts that run again:", problems
        )

    def _steps(self) -> list[int]:
        """Wait until this process sees the checkpoints that the first one sees; return their numbers, newest first."""
        steps = sorted(_numbers(self.folder), reverse=True)[:MOST_CHECKPOINTS]
        padded = np.array(steps + [-1] * (MOST_CHECKPOINTS - len(steps)), np.int32)
        steps = [step for step in broadcast_from_first(padded).tolist() if step >= 0]
        for step in steps:
            with contextlib.suppress(InputError):  # reading it then fails, and says why
                wait_until_visible(self.folder / str(step))
        if self._writing:
            self._manager.reload()  # the manager may have listed them too early
        return steps

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Read a checkpoint without Orbax, whose reader leaves threads behind that complain about damaged files."""
        folder = self.folder / str(step)
        try:
            record = json.loads((folder / PROGRESS / PROGRESS_FILE).read_bytes())
            progress, sums, number = record["progress"], record["sha256"], record["step"]
            arrays = {name: _stored_array(folder / STATE, name) for name in sums if name != "progress"}
            found = {name: _sha256(value) for name, value in [*arrays.items(), ("progress", progress)]}
        except Exception as error:  # whatever damaged bytes make the readers raise
            where = f": {name}" if (name := getattr(error, "filename", None)) else ""
            raise _DamagedError(short_reason(error) + where) from error
        if number != step:
            raise _DamagedError(f"it holds checkpoint {number} instead")
        if differing := [name for name in found if found[name] != sums.get(name)]:
            raise _DamagedError(f"{differing[0]} does not match its checksum")
        return arrays, progress

    def _put_aside(self, step: int, problem: str) -> None:
        """Warn about a damaged checkpoint. A writer moves it to NUMBER.damaged, to inspect; only the last is kept."""
        if is_first():
            warn(f"{self.folder / str(step)}: damaged, {problem}")
            if self._writing:
                for earlier in self.folder.glob("*.damaged"):
                    shutil.rmtree(earlier)
                # Not a plain rename: a container's file system cannot rename folders of its lower layers.
                shutil.move(self.folder / str(step), self.folder / f"{step}.damaged")
        wait_for_all(f"put checkpoint {step} aside")
        if self._writing:
            self._manager.reload()


class _DamagedError(Exception):
    """A checkpoint does not hold what was saved."""


def from_names(like: Any, arrays: Mapping[str, np.ndarray], where: Path) -> Any:
    """Build a pytree with the structure of `like` from arrays by name. Raises InputError as `check_arrays` does."""
    expected = named(like)
    check_arrays(expected, arrays, where)
    return jax.tree.unflatten(jax.tree.structure(like), [jax.device_put(arrays[name]) for name in expected])


def check_arrays(expected: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: Path) -> None:
    """Raise an InputError that lists every expected array that `arrays` lacks or has in another shape."""
    problems = [
        f"{name}: expected shape {leaf.shape}, found {arrays[name].shape if name in arrays else 'nothing'}"
        for name, leaf in expected.items()
        if name not in arrays or arrays[name].shape != leaf.shape
    ]
    if problems:
        raise InputError.all(f"{where}: does not fit this run:", problems)


def named(state: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by their paths, joined by dots."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _stored_array(folder: Path, name: str) -> np.ndarray:
    """Read one array of an Orbax checkpoint: zarr in an OCDBT store."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result().read().result()


def _sha256(value: np.ndarray | dict[str, Any]) -> str:
    """Return the checksum of an array or of a JSON object."""
    content = np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()
