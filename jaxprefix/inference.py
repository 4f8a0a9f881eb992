"""What generate and evaluate share: the base model with its prefix, prompts, and the devices that they compute on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from convert.errors import InputError
from jaxprefix.base_folder import BaseFolder, open_base
from jaxprefix.devices import compiling_for, devices, own_device
from jaxprefix.hub import fetch_weights
from jaxprefix.inference_config import EvaluateConfig, InferenceConfig
from jaxprefix.memory import released_after_errors, within_memory
from jaxprefix.prefix import Prefix, load_prefix


@contextlib.contextmanager
def on_its_devices(config: InferenceConfig) -> Iterator[None]:
    """Compile for the mesh's devices, or for one; raises RunError that says what to lower if memory is too small."""
    used = devices() if config.mesh else [own_device()]
    with released_after_errors(), within_memory(lambda: _less_memory(config)), compiling_for(used):
        yield


def _less_memory(config: InferenceConfig) -> str:
    needed = [f"--batch_size {config.batch_size}", f"--max_output_len {config.decode.max_output_len}"]
    needed += ["--max_seq_len"] if isinstance(config, EvaluateConfig) else []
    return f"lower {' or '.join(needed)}" + (", or use --dtype bfloat16" if config.dtype == "float32" else "")


def open_with_prefix(config: InferenceConfig) -> tuple[BaseFolder, Prefix | None]:
    """Open the base model to generate or evaluate with, and load the prefix; then download a hub id's weights.

    Raises InputError.
    """
    base = open_base(config.pretrained_model_dir, config.revision, config.model_type)
    path = config.prefix_checkpoint_path
    prefix = None if path is None else load_prefix(path, base.config, base.tokenizer)
    fetch_weights(config.pretrained_model_dir, base.path)
    return base, prefix


def read_prompts(path: Path) -> list[str]:
    """Read a file of one prompt a line; blank lines are left out. Raises InputError."""
    try:
        prompts = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a file of prompts ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts
