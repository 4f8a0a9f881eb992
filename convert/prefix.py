"""Prefix files: the original's `.weight`, PEFT adapter folders, bare `.safetensors`, and `.npy`.

Two layouts of the same numbers:
    folded  [P, L·2·N·H]      the original's tensor and PEFT's `prompt_embeddings`; along the second axis,
                              block 2·i is layer i's key and block 2·i + 1 its value
    layered [L, 2, P, N, H]   what jaxprefix's models take
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TENSOR_NAME = "prompt_embeddings"
RUN_SUBFOLDER = "prefix"

# How a file of each format begins; torch's two are its zip format and the one before torch 1.6.
_NPY = b"\x93NUMPY"
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")


def to_layers(folded: Any, n_layer: int, n_head: int, head_dim: int) -> Any:
    """Turn [P, L·2·N·H] into [L, 2, P, N, H]; works on numpy and jax arrays alike."""
    return folded.reshape(-1, n_layer, 2, n_head, head_dim).transpose(1, 2, 0, 3, 4)


def to_folded(layered: Any) -> Any:
    """Turn [L, 2, P, N, H] into [P, L·2·N·H]; the inverse of `to_layers`."""
    return layered.transpose(2, 0, 1, 3, 4).reshape(layered.shape[2], -1)


def read_prefix(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read a prefix of any format as (folded float32 array, what its header says of the base model).

    Accepts a run folder, an adapter folder or a file; files are told apart by content. Tensors may be
    float32, float16 or bfloat16, folded, [P, 2·L, N, H] or layered; only safetensors headers can name
    a base. Raises InputError when it is none of these, or holds a number that is not finite.
    """
    if path.is_dir():
        return read_prefix(_file_of_folder(path))
    if not path.is_file():
        raise InputError(f"{path}: no such prefix file or folder")
    with path.open("rb") as file:
        start = file.read(16)
    base: dict[str, str] = {}
    if start.startswith(_NPY):
        array = _read_npy(path)
    elif start.startswith(_TORCH):
        array = _read_torch(path)
    elif start[8:9] == b"{":
        array, base = _read_safetensors(path)
    else:
        raise InputError(
            f"{path}: not a prefix; expected .weight, .checkpoint, .safetensors, .npy or an adapter folder"
        )

    if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
        raise InputError(f"{path}: expected floating-point numbers, found {array.dtype}")
    if array.ndim == 5:
        array = to_folded(array)
    if array.ndim not in (2, 4) or 0 in array.shape:
        raise InputError(f"{path}: a prefix has axes [P, L·2·N·H] or [P, 2·L, N, H], found shape {array.shape}")
    folded = np.ascontiguousarray(array.reshape(array.shape[0], -1), dtype=np.float32)
    if not np.isfinite(folded).all():
        raise InputError(f"{path}: holds {int((~np.isfinite(folded)).sum())} numbers that are not finite")
    return folded, base


def write_adapter(folder: Path, folded: np.ndarray, n_layer: int, n_head: int, base: Mapping[str, str]) -> None:
    """Write a PEFT adapter folder (PREFIX_TUNING); `base` goes into the safetensors header.

    Each file replaces its predecessor in one step, so a reader never sees half of one. Raises OSError.
    """
    n_virtual_tokens, width = folded.shape
    token_dim = width // (2 * n_layer)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("base_model"),
        "num_virtual_tokens": n_virtual_tokens,
        "token_dim": token_dim,
        "num_transformer_submodules": 1,
        "num_layers": n_layer,
        "num_attention_heads": n_head,
        "encoder_hidden_size": token_dim,
        "prefix_projection": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights_tmp, config_tmp = folder / (ADAPTER_WEIGHTS + ".tmp"), folder / (ADAPTER_CONFIG + ".tmp")
    save_file({TENSOR_NAME: np.ascontiguousarray(folded)}, weights_tmp, metadata={"format": "pt", **base})
    config_tmp.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    os.replace(config_tmp, folder / ADAPTER_CONFIG)
    os.replace(weights_tmp, folder / ADAPTER_WEIGHTS)


def write_weight(path: Path, folded: np.ndarray) -> None:
    """Write the original's format: `torch.save` of the folded tensor. Needs torch; raises OSError."""
    torch = _import_torch(f"writing {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(torch.from_numpy(np.ascontiguousarray(folded)), file)


def _file_of_folder(folder: Path) -> Path:
    if not (folder / ADAPTER_CONFIG).is_file():
        if (folder / RUN_SUBFOLDER / ADAPTER_CONFIG).is_file():
            return _file_of_folder(folder / RUN_SUBFOLDER)
        raise InputError(f"{folder}: neither an adapter folder ({ADAPTER_CONFIG}) nor a run folder ({RUN_SUBFOLDER}/)")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
    except ValueError as error:
        raise InputError(f"{folder / ADAPTER_CONFIG}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "PREFIX_TUNING":
        raise InputError(f"{folder / ADAPTER_CONFIG}: peft_type is not PREFIX_TUNING")
    return folder / ADAPTER_WEIGHTS


def _read_safetensors(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if TENSOR_NAME not in names and len(names) != 1:
                raise InputError(f"{path}: expected the tensor {TENSOR_NAME}, found {names}")
            name = TENSOR_NAME if TENSOR_NAME in names else names[0]
            return file.get_tensor(name), dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's parser of the header raises many kinds
        raise InputError(f"{path}: not a readable .npy file ({_reason(error)})") from error


def _read_torch(path: Path) -> np.ndarray:
    torch = _import_torch(f"reading {path}")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # so does torch's, on a damaged file
        raise InputError(f"{path}: not a tensor that torch can load safely ({_reason(error)})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InputError(f"{path}: expected one dense tensor, found {type(tensor).__name__}")
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def _reason(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _import_torch(purpose: str) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise InputError(f"{purpose} needs PyTorch: pip install 'jaxprefix[torch]'") from error
    return torch
