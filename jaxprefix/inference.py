"""What generate and evaluate share: the base model with its prefix, prompts, and the devices that they compute on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from jax.sharding import Mesh

from convert.errors import InputError
from jaxprefix.base_folder import BaseFolder, open_base
from jaxprefix.config import DType, TrainConfig
from jaxprefix.data.lines import parse_line, string_of
from jaxprefix.hub import fetch_weights
from jaxprefix.inference_config import EvaluateConfig, InferenceConfig
from jaxprefix.machine.devices import compiling_for, devices, half_type, own_device
from jaxprefix.machine.memory import released_after_errors, within_memory
from jaxprefix.models import BaseModel, load_model
from jaxprefix.prefix import Prefix, load_prefix
from jaxprefix.run.description import setting_of
from jaxprefix.sharding import base_sharding


@contextlib.contextmanager
def on_its_devices(config: InferenceConfig) -> Iterator[None]:
    """Compile for the mesh's devices, or for one; if memory is too small, raise a RunError that says what to lower.

    If that one is among several CPU devices, JAX's caches are cleared before and after. Threads take turns.
    """
    used, dtype = devices() if config.mesh else [own_device()], as_trained(config, "dtype")
    with released_after_errors(), within_memory(lambda: _less_memory(config, dtype)), compiling_for(used):
        yield


def _less_memory(config: InferenceConfig, dtype: DType) -> str:
    needed = [f"--batch_size {config.batch_size}", f"--max_output_len {config.decode.max_output_len}"]
    needed += ["--max_seq_len"] if isinstance(config, EvaluateConfig) else []
    return f"lower {' or '.join(needed)}" + (f", or use --dtype {half_type()}" if dtype == "float32" else "")


def as_trained(config: InferenceConfig, name: str) -> Any:
    """Return a setting if it is given, else that of the prefix's run, else train's default. Raises InputError."""
    if (given := getattr(config, name)) is not None:
        return given
    default, found = getattr(TrainConfig, name), setting_of(config.prefix_checkpoint_path, name)
    if found is None:
        return default
    invalid = (isinstance(found, int) and found < 1) or (name == "dtype" and found not in get_args(DType))
    if type(found) is not type(default) or invalid:
        raise InputError(f"{config.prefix_checkpoint_path}: its config.json has an invalid {name}, {found!r}")
    return found


def open_with_prefix(config: InferenceConfig) -> tuple[BaseFolder, Prefix | None]:
    """Open the base model to generate or evaluate with, and load the prefix, before any weight is read.

    Raises InputError.
    """
    base = open_base(config.pretrained_model_dir, config.revision, config.model_type)
    path = config.prefix_checkpoint_path
    return base, None if path is None else load_prefix(path, base.config, base.tokenizer)


def load_base(config: InferenceConfig, base: BaseFolder, mesh: Mesh) -> BaseModel:
    """Load the base model's weights onto the mesh; a hub id's are downloaded first. Raises InputError."""
    fetch_weights(config.pretrained_model_dir, base.path)
    return load_model(base.path, as_trained(config, "dtype"), base_sharding(mesh, base.config.n_head), base.config)


def read_prompts(path: Path) -> list[str]:
    """Read a file with one prompt per line, in .jsonl as an object with a `prompt`; blank lines are skipped.

    Raises InputError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a file of prompts ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from error
    prompts = [
        prompt_of(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def prompt_of(line: str, where: str) -> str:
    """Return the prompt of a line of JSON; a completion is ignored. Raises an InputError that begins with `where`."""
    record = parse_line(line.encode(), where) or {}
    if "prompt" not in record:
        raise InputError(f"{where}: has no `prompt`")
    return string_of(record, "prompt", where)
