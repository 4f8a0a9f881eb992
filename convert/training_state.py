"""The training state of a prefix encoder, between our checkpoints and the original's state-dict names.

A torch file holds {"encoder": {name: tensor}, "optimizer": {"step": n, "exp_avg": …, "exp_avg_sq": …}}, with the
encoder's names in "exp_avg" and "exp_avg_sq", too; a bare {name: tensor} is an encoder without its optimizer.
Our checkpoints hold arrays under dotted paths (`jaxprefix.run.checkpoint`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import InputError
from convert.torch_files import load_torch, save_torch
from convert.weights import FLOATS

PARAMETERS = (
    "prefix_wte.weight",
    "prefix_mlp.0.weight",
    "prefix_mlp.0.bias",
    "prefix_mlp.2.weight",
    "prefix_mlp.2.bias",
)
"""Names in the original's state dict; weights are [out, in] on both sides."""
ENCODER = "encoder.{name}"
DIRECT = "encoder.folded"
"""The prefix itself, which a run without an encoder trains."""
MOMENTS = {"exp_avg": "moments.1.0.mu.{name}", "exp_avg_sq": "moments.1.0.nu.{name}"}
SCALE = ["loss_scale", "loss_scale.n_good"]
STEPS = ("moments.1.0.count", "moments.1.2.count")
"""The update counts of Adam and of the learning rate's schedule."""


def is_training_state(content: Any) -> bool:
    """Tell whether a torch file's content is a training state, perhaps an incomplete one."""
    return isinstance(content, dict) and not content.keys().isdisjoint({"encoder", "optimizer", *PARAMETERS})


def read_training_state(path: Path) -> dict[str, np.ndarray]:
    """Read a torch file as arrays under our paths; only the encoder's, if there is no optimizer in it.

    Raises InputError that lists everything missing, misshapen or not finite.
    """
    content = load_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict with the encoder's state, found {type(content).__name__}")
    groups = {ENCODER: content.get("encoder", content)}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict):
        groups |= {rule: optimizer.get(kind) for kind, rule in MOMENTS.items()}
    arrays: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for rule, group in groups.items():
        for name in PARAMETERS:
            key = rule.format(name=name)
            value = group.get(name) if isinstance(group, dict) else None
            if not isinstance(value, np.ndarray):
                problems.append(f"missing {key}")
                continue
            if value.dtype.name not in FLOATS:
                problems.append(f"{key} must hold floating-point numbers, found {value.dtype}")
                continue
            arrays[key] = np.array(value, np.float32)
            if not np.isfinite(arrays[key]).all():
                problems.append(f"{key} holds numbers that are not finite")
            if rule == MOMENTS["exp_avg_sq"] and (arrays[key] < 0).any():
                problems.append(f"{key}, a mean of squares, holds negative numbers")
    problems += _shape_problems(arrays)
    if isinstance(optimizer, dict):
        step = optimizer.get("step")
        if isinstance(step, int) and 0 <= step < 2**31:
            arrays |= {key: np.array(step, np.int32) for key in STEPS}
        else:
            problems.append(f"the optimizer's step must be a whole number, found {step!r}")
    if problems:
        found = ", ".join(repr(str(key)[:60]) for key in [*content][:3]) + (" …" if len(content) > 3 else "")
        raise InputError.all(f"{path}: not the training state of a prefix encoder (it holds {found}):", problems)
    return arrays


def write_training_state(path: Path, arrays: Mapping[str, np.ndarray], source: Path) -> None:
    """Write a checkpoint's arrays as a torch file, except float16's loss scale, which each side starts anew.

    Raises InputError naming what `source` lacks, and OSError.
    """
    if DIRECT in arrays:
        raise InputError(f"{source}: was trained without an encoder, --prefix_hidden_dim 0; convert its prefix instead")
    rules = (ENCODER, *MOMENTS.values())
    expected = [rule.format(name=name) for rule in rules for name in PARAMETERS] + list(STEPS)
    problems = [f"missing {key}" for key in expected if key not in arrays]
    problems += [f"{key} has no counterpart in the original's names" for key in arrays if key not in expected + SCALE]
    if problems:
        raise InputError.all(f"{source}: not a training state of the original's encoder:", problems)

    def group(rule: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(arrays[rule.format(name=name)]) for name in PARAMETERS}

    moments = {kind: group(rule) for kind, rule in MOMENTS.items()}
    save_torch(path, {"encoder": group(ENCODER), "optimizer": {"step": int(arrays[STEPS[0]]), **moments}})


def folded_prefix(arrays: Mapping[str, np.ndarray], source: Path) -> np.ndarray:
    """Return the prefix [P, L·2·N·H] that the encoder among a checkpoint's arrays makes.

    Raises InputError naming what `source` lacks.
    """
    if DIRECT in arrays:
        return arrays[DIRECT]
    expected = [ENCODER.format(name=name) for name in PARAMETERS]
    problems = [f"missing {key}" for key in expected if key not in arrays]
    if problems := problems or _shape_problems(arrays):
        raise InputError.all(f"{source}: not the checkpoint of a prefix:", problems)
    embedding, weight, bias, out_weight, out_bias = (arrays[key] for key in expected)
    return np.tanh(embedding @ weight.T + bias) @ out_weight.T + out_bias


def _shape_problems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Say which shapes contradict the encoder's sizes: P, input_dim, hidden_dim, and the width of the prefix."""
    shapes = {key: array.shape for key, array in arrays.items()}
    embedding, output = shapes.get("encoder.prefix_wte.weight"), shapes.get("encoder.prefix_mlp.2.weight")
    if embedding is None or output is None:
        return []  # reported as missing
    if len(embedding) != 2 or len(output) != 2:
        return [f"encoder.prefix_wte.weight {embedding} and encoder.prefix_mlp.2.weight {output} must have two axes"]
    (length, input_dim), (width, hidden_dim) = embedding, output
    expected = ((length, input_dim), (hidden_dim, input_dim), (hidden_dim,), (width, hidden_dim), (width,))
    return [
        f"{key}: expected shape {shape}, found {shapes[key]}"
        for rule in (ENCODER, *MOMENTS.values())
        for name, shape in zip(PARAMETERS, expected, strict=True)
        if shapes.get(key := rule.format(name=name), shape) != shape
    ]
