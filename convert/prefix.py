"""Prefix files: the original's `.weight`, PEFT adapter folders, bare `.safetensors`, and `.npy`.

Two layouts of the same numbers:
    folded  [P, L·2·N·H]      the original's tensor and PEFT's `prompt_embeddings`; along the second axis,
                              block 2·i is layer i's key and block 2·i + 1 its value
    layered [L, 2, P, N, H]   what jaxprefix's models take
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import torch_files
from convert.errors import InputError, first_line
from convert.files import flush_to_disk, replacing, save_safetensors
from convert.training_state import is_training_state
from convert.untrusted import member, read_object, refuse_pointer
from convert.weights import FLOATS, read_safetensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_WEIGHTS_TORCH = "adapter_model.bin"
TENSOR_NAME = "prompt_embeddings"
PREFIX_FOLDER = "prefix"

_NPY = b"\x93NUMPY"
_SHAPE = ("n_layer", "n_head", "head_dim")


def to_layers(folded: Any, n_layer: int, n_head: int, head_dim: int) -> Any:
    """Turn [P, L·2·N·H] into [L, 2, P, N, H]; works on numpy and jax arrays alike."""
    return folded.reshape(-1, n_layer, 2, n_head, head_dim).transpose(1, 2, 0, 3, 4)


def to_folded(layered: Any) -> Any:
    """Turn [L, 2, P, N, H] into [P, L·2·N·H]; the inverse of `to_layers`."""
    return layered.transpose(2, 0, 1, 3, 4).reshape(layered.shape[2], -1)


def read_prefix(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read a prefix of any format as (folded float32 array, its header: base model, dev loss).

    Accepts a run folder, an adapter folder or a file, whose format is recognised by its content. Tensors may be
    float64, float32, float16 or bfloat16; folded, [P, 2·L, N, H] or layered. A safetensors header names the base model;
    an adapter folder and an array of more than two axes give layers, heads and head dim. Raises InputError when it is
    none of these, or holds a number that is not finite.
    """
    if path.is_dir():
        return _read_adapter(path)
    if not path.is_file():
        raise InputError(f"{path}: no such prefix file or folder")
    return checked_prefix(path, *_read_file(path))


def checked_prefix(path: Path, array: np.ndarray, header: Mapping[str, str]) -> tuple[np.ndarray, dict[str, str]]:
    """Return an array and its header as `read_prefix` does. Raises InputError, about `path`, if it is no prefix."""
    if array.dtype.name not in FLOATS:
        raise InputError(f"{path}: expected floating-point numbers, found {array.dtype}")
    if array.ndim == 5 and 0 not in array.shape:
        if array.shape[1] != 2:
            raise InputError(f"{path}: a layered prefix has axes [L, 2, P, N, H], found shape {array.shape}")
        array = to_folded(array).reshape(array.shape[2], -1, *array.shape[3:])
    if array.ndim not in (2, 4) or 0 in array.shape or (array.ndim == 4 and array.shape[1] % 2):
        raise InputError(f"{path}: a prefix has axes [P, L·2·N·H] or [P, 2·L, N, H], found shape {array.shape}")
    if array.ndim == 4:
        header = {**_shape(array.shape[1] // 2, *array.shape[2:]), **header}
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
        folded = np.array(array.reshape(array.shape[0], -1), dtype=np.float32, order="C")
    if not np.isfinite(folded).all():
        raise InputError(f"{path}: holds {int((~np.isfinite(folded)).sum())} numbers that are not finite")
    _check_shape(path, header, folded.shape[1])
    return folded, dict(header)


def is_bare_prefix(path: Path) -> bool:
    """Tell whether a file or folder is a prefix alone, not a run, which has its encoder as well."""
    if path.is_dir():
        return (path / ADAPTER_CONFIG).is_file()
    try:
        read_prefix(path)
    except InputError:
        return False
    return True


def write_adapter(folder: Path, folded: np.ndarray, n_layer: int, n_head: int, header: Mapping[str, str]) -> None:
    """Write a PEFT adapter folder (PREFIX_TUNING); `header` goes into the safetensors file.

    Each file replaces its predecessor in one step, so a reader never sees half of one. Raises OSError; the folder is
    then as it was.
    """
    n_virtual_tokens, width = folded.shape
    token_dim = width // (2 * n_layer)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": header.get("base_model"),
        "revision": header.get("revision"),
        "num_virtual_tokens": n_virtual_tokens,
        "token_dim": token_dim,
        "num_transformer_submodules": 1,
        "num_layers": n_layer,
        "num_attention_heads": n_head,
        "encoder_hidden_size": token_dim,
        "prefix_projection": False,
        "inference_mode": True,
    }
    with replacing(folder / ADAPTER_CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        flush_to_disk(temporary)  # before the weights are replaced: the folder changes as a whole or not at all
        write_safetensors(folder / ADAPTER_WEIGHTS, folded, header)


def write_npy(path: Path, folded: np.ndarray) -> None:
    """Write the folded array in numpy's format; raises OSError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, folded, allow_pickle=False)


def write_safetensors(path: Path, folded: np.ndarray, header: Mapping[str, str]) -> None:
    """Write the one tensor of an adapter folder; `header` goes into the file. Raises OSError."""
    with replacing(path) as temporary:
        save_safetensors({TENSOR_NAME: np.ascontiguousarray(folded)}, temporary, header)


def to_dynamic_cache(folded: np.ndarray, n_layer: int, n_head: int, batch_size: int = 1, dtype: Any = None) -> Any:
    """Return transformers' DynamicCache with the prefix as the past of every row: keys and values [B, N, P, H].

    `dtype` is the model's torch type; by default float32. Raises InputError unless the prefix fits n_layer and n_head.
    Pass it as `model(tokens, past_key_values=cache)`, from transformers 5.24 on as `cache=cache`. A model writes into
    its cache, so make a new one for each call.
    """
    torch = torch_files.import_torch("making a DynamicCache")
    from transformers import DynamicCache

    if folded.shape[1] % (2 * n_layer * n_head):
        raise InputError(f"{folded.shape[1]} numbers per position do not fit {n_layer} layers and {n_head} heads")
    cache = DynamicCache()
    layered = to_layers(folded, n_layer, n_head, folded.shape[1] // (2 * n_layer * n_head))
    for index, keys_values in enumerate(layered.transpose(0, 1, 3, 2, 4)):  # [2, N, P, H]
        rows = np.repeat(keys_values[:, None], batch_size, axis=1)
        cache.update(*torch.from_numpy(np.ascontiguousarray(rows)).to(dtype or torch.float32), index)
    return cache


def from_dynamic_cache(cache: Any) -> np.ndarray:
    """Return the folded array of a DynamicCache that no model has used: a model appends its tokens.

    Raises InputError when its rows differ, or it is empty.
    """
    if not cache.get_seq_length():
        raise InputError("the cache is empty: nothing has been written to it")
    layers = [(layer[0], layer[1]) for layer in cache]
    pairs = np.stack([[part.detach().float().cpu().numpy() for part in pair] for pair in layers])  # [L, 2, B, N, P, H]
    if not (pairs == pairs[:, :, :1]).all():
        raise InputError(f"the {pairs.shape[2]} rows of the cache differ; a prefix is the same for all")
    return np.ascontiguousarray(to_folded(pairs[:, :, 0].transpose(0, 1, 3, 2, 4)))


def _read_file(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read a prefix file, whose format is recognised by its content, as (the array as stored, its header)."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(_NPY):
        return _read_npy(path), {}
    if start.startswith(torch_files.MAGIC):
        return _read_torch(path), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise InputError(f"{path}: not a prefix; expected .weight, .checkpoint, .safetensors, .npy or an adapter folder")


def _read_adapter(folder: Path) -> tuple[np.ndarray, dict[str, str]]:
    """Read an adapter folder, or the one in a run folder; adapter_config.json completes the header."""
    config_path = member(folder, ADAPTER_CONFIG)
    if not config_path.is_file():
        if (folder / PREFIX_FOLDER / ADAPTER_CONFIG).is_file():
            return _read_adapter(member(folder, PREFIX_FOLDER))
        named = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))[:3]
        raise InputError(
            f"{folder}: holds no prefix: neither {ADAPTER_CONFIG} nor {PREFIX_FOLDER}/, which a run writes after "
            "its first dev evaluation" + (f"; subfolders that hold one: {', '.join(named)}" if named else "")
        )
    config = read_object(config_path)
    if config.get("peft_type") != "PREFIX_TUNING":
        raise InputError(f"{config_path}: peft_type is not PREFIX_TUNING")
    weights_path = _adapter_weights(folder)
    folded, header = read_prefix(weights_path)
    length = config.get("num_virtual_tokens")
    if length not in (None, len(folded)):
        raise InputError(f"{config_path}: num_virtual_tokens is {length}, the weights have {len(folded)} positions")
    sizes = [config.get(field) for field in ("num_layers", "token_dim", "num_attention_heads")]
    if None not in sizes:
        if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise InputError(
                f"{config_path}: num_layers, token_dim and num_attention_heads must be positive 32-bit integers, "
                f"found {sizes}"
            )
        n_layer, token_dim, n_head = (int(size) for size in sizes if size is not None)
        if 2 * n_layer * token_dim != folded.shape[1]:
            raise InputError(
                f"{config_path}: num_layers {n_layer} and token_dim {token_dim} ask for {2 * n_layer * token_dim} "
                f"numbers per position, the weights have {folded.shape[1]}"
            )
        if token_dim % n_head:
            raise InputError(f"{config_path}: token_dim {token_dim} is not divisible by num_attention_heads {n_head}")
        header = {**_shape(n_layer, n_head, token_dim // n_head), **header}
    base = {"base_model": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    header = {**{field: value for field, value in base.items() if isinstance(value, str)}, **header}
    return folded, header


def _shape(n_layer: int, n_head: int, head_dim: int) -> dict[str, str]:
    """Return a prefix's shape as fields of a header."""
    return dict(zip(_SHAPE, map(str, (n_layer, n_head, head_dim)), strict=True))


def _check_shape(path: Path, header: Mapping[str, str], width: int) -> None:
    """Raise InputError if a header's shape contradicts the numbers per position."""
    if width % 2:
        raise InputError(f"{path}: has {width} numbers per position, which must be an even number, for keys and values")
    said = {field: header[field] for field in _SHAPE if field in header}
    sizes = [int(size) if re.fullmatch("[0-9]{1,9}", size) else 0 for size in said.values()]
    claimed = 2 * math.prod(sizes)
    if claimed == 0 or width % claimed or (len(said) == len(_SHAPE) and width != claimed):
        raise InputError(f"{path}: has {width} numbers per position, which do not fit its header's {said}")


def _adapter_weights(folder: Path) -> Path:
    """Return PEFT's weights file: safetensors, or the torch file of older versions."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_WEIGHTS_TORCH):
        if (path := member(folder, name)).is_file():
            return path
    raise InputError(f"{folder}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}")


def _read_safetensors(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    weights, header = read_safetensors(path)
    if TENSOR_NAME not in weights and len(weights) != 1:
        raise InputError(f"{path}: expected the tensor {TENSOR_NAME}, found {len(weights)} others: {list(weights)[:3]}")
    _refuse_others(path, weights)
    return next(iter(weights.values())).view(), header


def _refuse_others(path: Path, weights: Mapping[str, Any]) -> None:
    """Raise InputError for weights that PEFT's modules_to_save trained with the prefix, which needs them."""
    others = [name for name in weights if name != TENSOR_NAME]
    if TENSOR_NAME in weights and others:
        raise InputError(
            f"{path}: holds {others[:3]} besides the prefix; trained parts of the base model are not supported"
        )


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: it cannot claim more than its file holds
    except Exception as error:  # numpy's parser of the header raises many kinds
        raise InputError(f"{path}: not a readable .npy file ({first_line(error)})") from error


def _read_torch(path: Path) -> np.ndarray:
    tensor = torch_files.load_torch(path)
    if isinstance(tensor, dict) and TENSOR_NAME in tensor:  # PEFT's adapter_model.bin
        _refuse_others(path, tensor)
        tensor = tensor[TENSOR_NAME]
    if not isinstance(tensor, np.ndarray):
        kind = type(tensor).__name__
        if isinstance(tensor, dict):
            kind = f"a dict of {[str(key)[:60] for key in [*tensor][:3]]}"
        advice = "; this is a training state: pass it to train --checkpoint_path" if is_training_state(tensor) else ""
        raise InputError(f"{path}: expected one dense tensor, found {kind}{advice}")
    return tensor
