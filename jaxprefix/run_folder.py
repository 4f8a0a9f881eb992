"""The folder of a run: who may write to it, and config.json, which holds enough to rebuild the run."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from convert.errors import InputError
from convert.files import replacing
from convert.untrusted import member, read_object
from jaxprefix.checkpoint import newest_checkpoint
from jaxprefix.config import TrainConfig
from jaxprefix.hosts import agree, agree_first, check_shared, wait_until_visible
from jaxprefix.lines import sha256_of
from jaxprefix.prefix import differing_fields

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
PLACES = {"hosts", "output_dir", "pretrained_model_dir", "revision", "base_model", "data_filepath", "checkpoint_path"}
"""Settings that say where things lie; they may differ between processes, since weights and data have checksums."""
MAY_CHANGE_ON_RESUME = {
    *PLACES,
    *("resume", "overwrite", "save_name", "filename_note"),
    *("save_log", "log_every_n_steps", "checkpoint_every_n_steps", "checkpoint_every_minutes"),
    *("compute", "mesh", "versions"),
    *("bf16", "fp16"),  # dtype, which they set, may not
}
MAY_GROW_ON_RESUME = {"n_epochs", "n_training_steps"}
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock beside a run's folder, `.NAME.lock`, which the system releases however this process ends.

    Raises InputError that names the process which holds it, or when it cannot be made. On a file system without locks,
    warns and goes on without one.
    """
    path = folder.resolve()
    path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except BlockingIOError as error:
        owner = "another process"
        with contextlib.suppress(OSError):  # that process may end at this moment
            owner = path.read_text(encoding="utf-8").strip() or owner
        advice = f"wait for it or choose another --save_name (its lock is {path})"
        raise InputError(f"{folder}: is in use by {owner}; {advice}") from error
    except FileExistsError as error:
        raise InputError(f"{path.parent}: cannot be written (Not a directory)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that has become read-only keeps it, unlocked
                path.unlink()


def _locked(path: Path) -> IO[str]:
    while True:
        file, locked = path.open("a+", encoding="utf-8"), True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # its former owner removed it between opening and locking
    if not locked:
        print(f"WARNING: {path.parent}: has no locks, so a second run of that name is not noticed", file=sys.stderr)
    file.truncate(0)
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk
        path.unlink()
        with contextlib.suppress(OSError):  # closing fails for the same reason
            file.close()
        raise
    return file


def describe_run(config: TrainConfig, identity: dict[str, str]) -> dict[str, Any]:
    """Return what config.json says of a run; `identity` is that of its base model."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    return settings | {"data_sha256": sha256_of(config.data_filepath), "base": identity, "versions": _versions()}


def _versions() -> dict[str, str]:
    """Return the versions of what computes a run: this package's is a checksum of its sources."""
    digest = hashlib.sha256()
    for package in ("convert", "jaxprefix"):
        for path in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
            digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return versions | {"sources": digest.hexdigest()[:16]}


def common_settings(config: TrainConfig, description: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all processes of a run."""
    settings = {field: value for field, value in _flat(description).items() if field not in PLACES}
    settings["checkpoint_path"] = None if config.checkpoint_path is None else "given"  # else some would wait for ever
    if config.checkpoint_path is not None and config.checkpoint_path.is_file():
        settings["checkpoint_sha256"] = sha256_of(config.checkpoint_path)
    return settings


def check_run_folder(config: TrainConfig, description: dict[str, Any]) -> None:
    """Check that a run may have its folder, without writing.

    Raises InputError when the folder holds something (without --resume or --overwrite), or when a resumed run's
    settings, data or base have changed.
    """
    folder = config.run_dir
    with _write_errors(folder):
        if config.resume and not _is_converted(folder):
            _check_same_run(folder, description)
        elif config.overwrite and folder.is_dir() and _content(folder):
            if not is_run_folder(folder):
                raise InputError(f"{folder}: is not empty; is no run of ours")
            for used in (config.data_filepath, config.checkpoint_path, config.pretrained_model_dir):
                if used is not None and Path(used).resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{used}: --overwrite would delete it; copy it to another place")
        elif not (config.resume or config.overwrite) and folder.is_dir() and _content(folder):
            raise InputError(f"{folder}: is not empty; use --resume, --overwrite, or another --save_name")


def open_run_folder(config: TrainConfig, description: dict[str, Any]) -> None:
    """Make the run's folder, emptied with --overwrite, and write its config.json.

    Raises InputError when it cannot be written, or no longer passes `check_run_folder`.
    """
    folder = config.run_dir
    check_run_folder(config, description)
    with _write_errors(folder):
        if config.overwrite and folder.is_dir():
            _empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_description(folder, description)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn the system's error into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's, by what its config.json says: a base model's has one, too."""
    return bool(_read_description(folder))


def setting_of(folder: Path | None, name: str) -> Any:
    """Return a setting that a run was trained with; None for anything but a run's folder, or the `prefix/` in one."""
    if folder is None:
        return None
    return (_read_description(folder) or _read_description(folder.absolute().parent)).get(name)


def check_base(run_dir: Path, identity: dict[str, str]) -> None:
    """Check that an earlier run is of a base model. Raises InputError that names the fields that differ."""
    earlier = _read_description(run_dir).get("base")
    if not isinstance(earlier, dict):
        raise InputError(f"{run_dir}: no run, {CONFIG_FILE} is missing or damaged")
    if differing := differing_fields(dict.fromkeys(identity) | earlier, identity):  # a run has all fields
        raise InputError.all(f"{run_dir}: the run is of another base model:", differing)


def check_takes_state(folder: Path) -> None:
    """Raise InputError unless a training state from elsewhere may go into a folder: a run's or an empty one."""
    if folder.exists() and not (folder.is_dir() and (_content(folder) <= {CHECKPOINTS} or is_run_folder(folder))):
        raise InputError(f"{folder}: is neither a run's folder nor an empty one")


def _is_converted(folder: Path) -> bool:
    """Tell whether the folder holds a training state from elsewhere (`jaxprefix convert`) and nothing of a run yet."""
    return folder.is_dir() and _content(folder) == {CHECKPOINTS}


def _content(folder: Path) -> set[str]:
    """Return the names in a folder, without the file that a run leaves when it is killed as it begins."""
    return {path.name for path in folder.iterdir()} - {f"{CONFIG_FILE}.tmp"}


def _empty(folder: Path) -> None:
    """Empty a run's folder, config.json last: if this is cut short, the folder is still known as a run's."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same_run(folder: Path, description: dict[str, Any]) -> None:
    earlier = _read_description(folder)
    if not earlier:
        raise InputError(f"{folder}: no run to resume, {CONFIG_FILE} is missing or damaged")
    settings, earlier = _flat(description), _flat(earlier)
    compared = earlier.keys() - MAY_CHANGE_ON_RESUME  # a setting that an earlier version did not have is not compared
    if newest_checkpoint(folder / CHECKPOINTS) is None:  # the run starts over, from there
        compared |= earlier.keys() & {"checkpoint_path"}
    changed = [
        f"{field}: was {earlier[field]!r}, now {value!r}" + (" (may grow)" if field in MAY_GROW_ON_RESUME else "")
        for field, value in settings.items()
        if field in compared and not _may_follow(field, earlier[field], value)
    ]
    if changed:
        raise InputError.all(f"{folder}: cannot be resumed with other settings:", changed)


def _flat(description: dict[str, Any]) -> dict[str, Any]:
    """Replace `base` by its fields. Its `model_type` takes the place of the setting, which only checks it."""
    base = description.get("base")
    return description | ({"base": None} | base if isinstance(base, dict) else {})


def _may_follow(field: str, earlier: Any, now: Any) -> bool:
    """Tell whether a resumed run may have this value of a setting that matters."""
    if field in MAY_GROW_ON_RESUME and isinstance(earlier, int):
        return now >= earlier
    return bool(earlier == now)


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_description(folder: Path) -> dict[str, Any]:
    """Return a run's config.json, which may come from a stranger; empty if there is none, or it is not a run's."""
    try:
        description = read_object(member(folder, CONFIG_FILE))
    except InputError:
        return {}
    return description if "data_sha256" in description else {}


def lock_shared_folder(config: TrainConfig, stack: contextlib.ExitStack) -> None:
    """Let the first process lock the run's folder until the stack is closed; check that all see its parent folder."""
    if config.writes:
        agree_first("lock the run's folder", lambda: stack.enter_context(only_writer(config.run_dir)))
        check_shared(config.run_dir.resolve().parent)


def open_shared_folder(config: TrainConfig, description: dict[str, Any]) -> None:
    """Let the first process open the run's folder, and wait until the others see it."""
    if config.writes:
        agree_first("open the run's folder", lambda: open_run_folder(config, description))
        agree("see the run's folder", lambda: wait_until_visible(config.run_dir))
