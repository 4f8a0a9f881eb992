"""What `jaxprefix convert` does: recognises the source by its content, checks it, and writes the target."""

from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import InputError
from convert.files import filling
from convert.prefix import (
    ADAPTER_CONFIG,
    PREFIX_FOLDER,
    checked_prefix,
    read_prefix,
    write_adapter,
    write_npy,
    write_safetensors,
)
from convert.torch_files import is_torch_file, load_torch, save_torch
from convert.training_state import (
    SCALE,
    STEPS,
    folded_prefix,
    is_training_state,
    read_training_state,
    write_training_state,
)
from convert.weights import has_weights
from jaxprefix.base_folder import IDENTITY, base_identity, open_base
from jaxprefix.config import ConvertConfig
from jaxprefix.hub import BASE_CONFIG
from jaxprefix.models import copy_base_model
from jaxprefix.prefix import check_prefix, check_sizes
from jaxprefix.run.checkpoint import CHECKPOINTS, Checkpoints, check_arrays, newest_checkpoint
from jaxprefix.run.description import check_base, is_run_folder, setting_of
from jaxprefix.run.folder import check_takes_state
from jaxprefix.run.lock import only_writer
from jaxprefix.run.progress import Progress

TRAINING_STATE_SUFFIX = ".pt"
PREFIX_SUFFIXES = (".weight", ".checkpoint", ".npy", ".safetensors")


def convert(config: ConvertConfig) -> str:
    """Convert `config.source` to `config.target`; return a line that says what was written.

    Raises InputError for a source that cannot be used or does not fit the base, and for files that the system refuses.
    """
    source, target = config.source, config.target
    try:
        return _convert(config)
    except OSError as error:
        path = Path(error.filename or target)
        written = target.is_relative_to(path) or path.is_relative_to(target) or path.name == f"{target.name}.tmp"
        if path.is_relative_to(source) and not written:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        raise InputError(f"{target}: cannot be written ({error.strerror})") from error


def _convert(config: ConvertConfig) -> str:
    """Choose the conversion by the target's suffix if that is .pt, else by the kind of source, and run it."""
    source, target = config.source, config.target
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if target.suffix == TRAINING_STATE_SUFFIX:
        return _export_training_state(config)
    if config.newest:
        return _convert_prefix(config, *_newest_prefix(source))
    if source.is_file() and is_torch_file(source) and is_training_state(load_torch(source)):
        return _import_training_state(config)
    if _is_base_model(source):
        if config.pretrained_model_dir is not None:
            raise InputError(
                f"{source}: is a base model; --pretrained_model_dir is only for prefixes and training states"
            )
        _check_folder_name(config, "a base model, which becomes a folder")
        copy_base_model(source, target)
        return f"{target}: base model, weights bit-identical to {source}"
    return _convert_prefix(config, *read_prefix(source))


def _is_base_model(source: Path) -> bool:
    """Tell whether a folder is a base model; an adapter folder may hold a copy of its base's config.json."""
    if not (source / BASE_CONFIG).is_file() or is_run_folder(source):
        return False
    has_prefix = any((folder / ADAPTER_CONFIG).is_file() for folder in (source, source / PREFIX_FOLDER))
    return has_weights(source) or not has_prefix


def _convert_prefix(config: ConvertConfig, folded: np.ndarray, header: dict[str, str]) -> str:
    """Write a prefix, which `read_prefix` gave, in the target's format."""
    source, target = config.source, config.target
    if config.pretrained_model_dir is not None:
        _, model_config, tokenizer = open_base(config.pretrained_model_dir, config.revision)
        check_prefix(source, folded, header, model_config, tokenizer)
        header = base_identity(model_config, tokenizer)
    if target.suffix in (".weight", ".checkpoint"):
        save_torch(target, folded)
    elif target.suffix == ".npy":
        write_npy(target, folded)
    elif target.suffix == ".safetensors":
        write_safetensors(target, folded, header)
    elif {"n_layer", "n_head"} <= header.keys():
        with filling(target):
            write_adapter(target, folded, int(header["n_layer"]), int(header["n_head"]), header)
    else:
        raise InputError(f"{source}: does not say what base model it is for; give --pretrained_model_dir")
    kind = "adapter folder, " if target.is_dir() else ""
    return f"{target}: {kind}prefix of {folded.shape[0]} positions, {folded.nbytes:,} bytes"


def _newest_prefix(run_dir: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Return the prefix in a run's newest checkpoint as `read_prefix` returns that of a file."""
    arrays, _ = _newest_state(run_dir, "--newest")
    base = setting_of(run_dir, "base")
    told = base if isinstance(base, dict) else {}
    header = {field: told[field] for field in IDENTITY if isinstance(told.get(field), str)}
    return checked_prefix(run_dir, folded_prefix(arrays, run_dir), header)


def _newest_state(run_dir: Path, needed_for: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the progress in a run's newest checkpoint. Raises InputError if it has none."""
    if newest_checkpoint(run_dir / CHECKPOINTS) is None:
        raise InputError(f"{run_dir}: not a run folder with a checkpoint, which {needed_for} needs")
    with Checkpoints(run_dir / CHECKPOINTS, writing=False) as checkpoints:
        return checkpoints.read()


def _export_training_state(config: ConvertConfig) -> str:
    """Write the state in a run's newest checkpoint as a torch file."""
    arrays, progress = _newest_state(config.source, f"a {TRAINING_STATE_SUFFIX} target")
    _check_state(config, arrays)
    write_training_state(config.target, arrays, config.source)
    return f"{config.target}: encoder and optimizer after {progress['n_done']} updates"


def _import_training_state(config: ConvertConfig) -> str:
    """Save a torch file's training state as the newest checkpoint of a run folder, from which --resume goes on."""
    resume = "; train --resume goes on from that folder and writes a prefix"
    _check_folder_name(config, "a training state, which becomes a run folder", resume)
    check_takes_state(config.target)
    arrays = read_training_state(config.source)
    _check_state(config, arrays)
    if STEPS[0] not in arrays:
        raise InputError(f"{config.source}: holds an encoder without its optimizer; give it to train --checkpoint_path")
    n_done = int(arrays[STEPS[0]])
    folder = config.target / CHECKPOINTS
    with only_writer(config.target), Checkpoints(folder) as checkpoints:
        if newest_checkpoint(folder) is not None:
            earlier, saved = checkpoints.read()
            unscaled = {name: array for name, array in earlier.items() if name not in SCALE}
            check_arrays(unscaled, arrays, config.source)
            if (last := saved["n_done"]) >= n_done:
                raise InputError(f"{folder}: already has a checkpoint of update {last}; the source is only at {n_done}")
        progress = Progress(n_done, to_evaluate=n_done > 0)  # its dev loss is unknown
        checkpoints.save(n_done, arrays, progress.to_save())
    return f"{config.target}: encoder and optimizer after {n_done} updates; go on with train --resume"


def _check_folder_name(config: ConvertConfig, what: str, advice: str = "") -> None:
    """Raise InputError if a target that becomes a folder is named like a prefix file."""
    if (suffix := config.target.suffix) in PREFIX_SUFFIXES:
        raise InputError(f"{config.source}: is {what}, not a {suffix} file{advice}")


def _check_state(config: ConvertConfig, arrays: dict[str, np.ndarray]) -> None:
    """Check that a training state, and the run that it comes from or goes to, fit the base model, if one is given."""
    if config.pretrained_model_dir is None:
        return
    base = open_base(config.pretrained_model_dir, config.revision)
    for folder in filter(is_run_folder, (config.source, config.target)):
        check_base(folder, base_identity(base.config, base.tokenizer))
    positions, output = arrays.get("encoder.prefix_wte.weight"), arrays.get("encoder.prefix_mlp.2.weight")
    if positions is not None and output is not None:
        check_sizes(config.source, len(positions), len(output), base.config)
