"""The folder of a run: what may lie in it when the run begins, and how it is opened."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.files import is_incidental
from convert.prefix import PREFIX_FOLDER
from jaxprefix.config import TrainConfig
from jaxprefix.machine.hosts import agree, agree_first, wait_until_visible
from jaxprefix.run.checkpoint import CHECKPOINTS, newest_checkpoint
from jaxprefix.run.description import CONFIG_FILE, check_same_run, is_run_folder, origin_of, write_description
from jaxprefix.run.log import check_metrics
from jaxprefix.settings import is_utf8


def open_shared_folder(config: TrainConfig, description: dict[str, Any]) -> None:
    """Let the first process open the run's folder, and wait until the others see it."""
    if config.writes:
        agree_first("open the run's folder", lambda: open_run_folder(config, description))
        agree("see the run's folder", lambda: wait_until_visible(config.run_dir))


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
        if newest_checkpoint(folder / CHECKPOINTS) is not None:  # the run goes on; what it began with stays
            description = description | {"checkpoint_path": origin_of(folder)}
        write_description(folder, description)


def check_run_folder(config: TrainConfig, description: dict[str, Any]) -> None:
    """Check, without writing, that a run may use its folder.

    Raises InputError when the folder holds something (without --resume or --overwrite), or when a resumed run's
    settings, data or base have changed.
    """
    folder = config.run_dir
    with _write_errors(folder):
        if not is_utf8(folder.absolute()):
            raise InputError(f"{folder}: lies in {str(Path.cwd())!r}, which is not UTF-8; no checkpoint can be written")
        if config.resume:
            _check_resumable(config, description)
        elif folder.is_dir() and _content(folder):
            _check_deletable(config)


def _check_resumable(config: TrainConfig, description: dict[str, Any]) -> None:
    """Check that a folder's run can go on; a folder with only a training state from elsewhere passes, too."""
    folder = config.run_dir
    if _is_converted(folder):
        return
    starts_over = newest_checkpoint(folder / CHECKPOINTS) is None
    check_same_run(folder, description, starts_over)
    if config.save_log:
        check_metrics(folder)
    if starts_over and (folder / PREFIX_FOLDER).exists():
        advice = "use another --save_name, or --overwrite, which deletes it"
        raise InputError(f"{folder}: holds a prefix but no checkpoint to resume; {advice}")


def _check_deletable(config: TrainConfig) -> None:
    """Check that a folder may be emptied: only with --overwrite, and only of a run that this one does not need."""
    folder = config.run_dir
    if not config.overwrite:
        advice = "use another --save_name"
        if is_run_folder(folder):
            advice = "use --resume, --overwrite, or another --save_name"
        elif _is_converted(folder):
            advice = "use --resume or another --save_name"
        raise InputError(f"{folder}: is not empty; {advice}")
    if not is_run_folder(folder):
        raise InputError(f"{folder}: is not empty, and not a run's folder; --overwrite deletes only runs")
    for used in (config.data_filepath, config.checkpoint_path, config.pretrained_model_dir):
        if used is not None and _lies_in(Path(used).resolve(), folder):
            raise InputError(f"{used}: --overwrite would delete it; copy it to another folder first")


def check_takes_state(folder: Path) -> None:
    """Raise InputError unless a training state from elsewhere may go into a folder: a run's or an empty one."""
    if folder.exists() and not (folder.is_dir() and (_content(folder) <= {CHECKPOINTS} or is_run_folder(folder))):
        raise InputError(f"{folder}: is neither a run's folder nor an empty one")


def _is_converted(folder: Path) -> bool:
    """Tell whether the folder holds a training state from elsewhere (`jaxprefix convert`) and nothing of a run yet."""
    return folder.is_dir() and _content(folder) == {CHECKPOINTS} and newest_checkpoint(folder / CHECKPOINTS) is not None


def _content(folder: Path) -> set[str]:
    """Return the names in a folder that count: not incidental ones, or what a run leaves if killed as it begins."""
    return {path.name for path in folder.iterdir() if not is_incidental(path.name)} - {f"{CONFIG_FILE}.tmp"}


def _empty(folder: Path) -> None:
    """Empty a run's folder: its prefix first, config.json last.

    If this is cut short, the folder still counts as a run's, and never has a prefix without a checkpoint.
    """
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name != PREFIX_FOLDER)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # with a file, macOS removes another that may hold its attributes


def _lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a path leads into a folder, however it is spelled: disks may ignore case, or be mounted twice."""
    return any(parent.exists() and parent.samefile(folder) for parent in (path, *path.parents))


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn the system's error into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
