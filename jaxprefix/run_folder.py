"""The folder of a run: who may write it, and config.json, which holds enough to rebuild the run."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from convert.errors import InputError
from jaxprefix.config import TrainConfig

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
MAY_CHANGE_ON_RESUME = {
    "resume",
    "overwrite",
    "output_dir",
    "save_log",
    "log_every_n_steps",
    "checkpoint_every_n_steps",
    "hosts",
}


def open_run_folder(config: TrainConfig, base: dict[str, str]) -> None:
    """Make the run's folder and write its config.json; when resuming, check that the run is the same one.

    `base` describes the base model. Raises InputError when the folder cannot be written, holds another
    run (without --resume or --overwrite), or when a resumed run's settings, data or base have changed.
    """
    if not (config.save_log or config.save_model):
        return
    description = {**_plain(config), "data_sha256": _sha256(config.data_filepath), "base": base}
    folder = config.run_dir
    try:
        if config.resume and not _is_converted(folder):
            _check_same_run(folder, description)
            return
        if config.overwrite and folder.is_dir() and _read_description(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not config.resume and any(folder.iterdir()):
            advice = "is no run of ours" if config.overwrite else "use --resume, --overwrite, or another --save_name"
            raise InputError(f"{folder}: is not empty; {advice}")
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's: a base model's has a config.json too."""
    return bool(_read_description(folder))


def check_base(run_dir: Path, base: dict[str, str]) -> None:
    """Check that an earlier run belongs to a base model. Raises InputError naming the fields that differ."""
    earlier = _read_description(run_dir).get("base")
    if not isinstance(earlier, dict):
        raise InputError(f"{run_dir}: no run, {CONFIG_FILE} is missing or damaged")
    differing = [
        f"{field}: made for {earlier.get(field)}, this base has {value}"
        for field, value in base.items()
        if field != "base_model" and earlier.get(field) != value
    ]
    if differing:
        raise InputError.all(f"{run_dir}: the run is of another base model:", differing)


def _is_converted(folder: Path) -> bool:
    """Tell whether the folder holds a training state from elsewhere (`jaxprefix convert`) and nothing of a run yet."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [CHECKPOINTS]


def _check_same_run(folder: Path, description: dict[str, Any]) -> None:
    earlier = _read_description(folder)
    if not earlier:
        raise InputError(f"{folder}: no run to resume, {CONFIG_FILE} is missing or damaged")
    changed = [
        f"{field}: was {earlier.get(field)!r}, now {value!r}"
        for field, value in description.items()
        if field not in MAY_CHANGE_ON_RESUME and earlier.get(field) != value
    ]
    if changed:
        raise InputError.all(f"{folder}: cannot be resumed with other settings:", changed)


def _read_description(folder: Path) -> dict[str, Any]:
    """Return a run's config.json, empty when there is none or it is not one of ours."""
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) and "data_sha256" in description else {}


def _plain(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
