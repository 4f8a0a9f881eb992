"""What config.json says of a run, enough to rebuild it: written, read, and compared when the run is resumed."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.files import replacing
from convert.prefix import PREFIX_FOLDER
from convert.untrusted import member, read_object
from jaxprefix import __version__
from jaxprefix.base_folder import differing_fields
from jaxprefix.config import Compute, TrainConfig
from jaxprefix.data.lines import sha256_of
from jaxprefix.machine.devices import own_device
from jaxprefix.settings import expanded

CONFIG_FILE = "config.json"
PATHS = {"output_dir", "data_filepath", "checkpoint_path"}
PLACES = {"hosts", "pretrained_model_dir", "revision", "base_model", *PATHS}
"""Settings of locations and processes; they may differ between processes, since weights and data have checksums."""
MAY_CHANGE_ON_RESUME = {
    *PLACES,
    *("resume", "overwrite", "save_name", "filename_note"),
    *("save_log", "log_every_n_steps", "checkpoint_every_n_steps", "checkpoint_every_minutes"),
    *("compute", "mesh", "versions"),
}
MAY_GROW_ON_RESUME = {"n_epochs", "n_training_steps"}


def describe_run(config: TrainConfig, identity: dict[str, str]) -> dict[str, Any]:
    """Return what config.json says of a run; `identity` is that of its base model."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
    return settings | {"data_sha256": sha256_of(config.data_filepath), "base": identity, "versions": _versions()}


def _versions() -> dict[str, str]:
    """Return the versions of the software that computes a run, and a checksum of this package's sources."""
    digest = hashlib.sha256()
    for package in ("convert", "jaxprefix"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"jaxprefix": __version__, "sources": digest.hexdigest()[:16], **versions}


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write config.json, whole or not at all."""
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def common_settings(config: TrainConfig, description: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all processes of a run."""
    settings = {field: value for field, value in _flat(description).items() if field not in PLACES}
    settings |= {name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS")}
    settings["device"] = own_device().device_kind  # processes that compile for other kinds would wait for each other
    settings["checkpoint_path"] = None if config.checkpoint_path is None else "given"  # else some would wait for ever
    if config.checkpoint_path is not None and config.checkpoint_path.is_file():
        settings["checkpoint_sha256"] = sha256_of(config.checkpoint_path)
    return settings


def check_same_run(folder: Path, description: dict[str, Any], starts_over: bool) -> None:
    """Check that a resumed run is the one in the folder. Raises InputError that names the settings that differ.

    A run without a checkpoint yet `starts_over`, so that what it starts from matters, too.
    """
    earlier = _read_description(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no run to resume; without --resume it begins")
    if not earlier:
        raise InputError(f"{folder}: no run to resume, {CONFIG_FILE} is missing or damaged")
    settings, earlier = _flat(description), _flat(earlier)
    compared = earlier.keys() - MAY_CHANGE_ON_RESUME  # a setting that an earlier version did not have is not compared
    if starts_over:
        compared |= earlier.keys() & {"checkpoint_path"}
    changed = [
        f"{field}: was {earlier[field]!r}, now {value!r}"
        + (" (may only be raised)" if field in MAY_GROW_ON_RESUME else "")
        for field, value in settings.items()
        if field in compared and not _may_follow(field, earlier[field], value)
    ]
    if changed:
        raise InputError.all(f"{folder}: cannot be resumed with other settings:", changed)


def _may_follow(field: str, earlier: Any, now: Any) -> bool:
    """Tell whether a resumed run may have this value of a setting that matters."""
    if field in MAY_GROW_ON_RESUME and isinstance(earlier, int):
        return now >= earlier
    return bool(earlier == now)


def _flat(description: dict[str, Any]) -> dict[str, Any]:
    """Replace `base` by its fields. Its `model_type` takes the place of the setting, which only checks it."""
    base = description.get("base")
    return description | ({"base": None} | base if isinstance(base, dict) else {})


def check_base(run_dir: Path, identity: dict[str, str]) -> None:
    """Check that an earlier run was made for a base model. Raises InputError that names the fields that differ."""
    earlier = _read_description(run_dir).get("base")
    if not isinstance(earlier, dict):
        raise _no_run(run_dir)
    if differing := differing_fields(dict.fromkeys(identity) | earlier, identity):  # a run has all fields
        raise InputError.all(f"{run_dir}: the run is for another base model:", differing)


def setting_of(folder: Path | None, name: str) -> Any:
    """Return a setting that a run was trained with; None for anything but a run's folder, or the `prefix/` in one."""
    if folder is None:
        return None
    description, folder = _read_description(folder), folder.absolute()
    if not description and folder.name == PREFIX_FOLDER:
        description = _read_description(folder.parent)
    return description.get(name)


def origin_of(run_dir: Path) -> str | None:
    """Return the --checkpoint_path that a run began with; None if there was none, or it is not known."""
    origin = _read_description(run_dir).get("checkpoint_path")
    return origin if isinstance(origin, str) else None


def config_of(run_dir: str | Path, **changes: Any) -> TrainConfig:
    """Return the settings of an earlier run, to make another like it; `changes` replace some, such as save_name.

    `resume`, `overwrite` and the processes are as by default; paths are as the run was given them. Raises InputError
    for a folder that is no run, and for settings that cannot be used.
    """
    folder = expanded(run_dir)
    if not (description := _read_description(folder)):
        raise _no_run(folder)
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"resume", "overwrite", "hosts"}
    settings = {name: value for name, value in description.items() if name in names}
    try:
        settings |= {name: Path(settings[name]) for name in PATHS if settings.get(name) is not None}
        config = TrainConfig(**settings | {"compute": Compute(**settings.get("compute", {}))})
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    return dataclasses.replace(config, **changes)


def _no_run(run_dir: Path) -> InputError:
    return InputError(f"{run_dir}: not a run, {CONFIG_FILE} is missing or damaged")


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's, by what its config.json says: a base model's folder has one, too."""
    return bool(_read_description(folder))


def _read_description(folder: Path) -> dict[str, Any]:
    """Return a run's config.json, which may come from a stranger; empty if there is none, or it is not a run's."""
    try:
        description = read_object(member(folder, CONFIG_FILE))
    except InputError:
        return {}
    return description if "data_sha256" in description else {}
