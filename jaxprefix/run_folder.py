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
MAY_CHANGE_ON_RESUME = {
    "resume",
    "overwrite",
    "output_dir",
    "save_log",
    "log_every_n_steps",
    "checkpoint_every_n_steps",
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
        if config.resume:
            _check_same_run(folder, description)
            return
        if config.overwrite and (folder / CONFIG_FILE).is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty; use --resume, --overwrite, or another --save_name")
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def _check_same_run(folder: Path, description: dict[str, Any]) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: no run to resume, {CONFIG_FILE} is missing")
    earlier = json.loads((folder / CONFIG_FILE).read_text())
    changed = [
        f"{field}: was {earlier.get(field)!r}, now {value!r}"
        for field, value in description.items()
        if field not in MAY_CHANGE_ON_RESUME and earlier.get(field) != value
    ]
    if changed:
        raise InputError.all(f"{folder}: cannot be resumed with other settings:", changed)


def _plain(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
