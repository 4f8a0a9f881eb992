"""Short training runs on the golden base and documents."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxprefix.train as train_module
from convert.prefix import read_prefix
from jaxprefix.config import TrainConfig
from jaxprefix.run.checkpoint import Checkpoints
from jaxprefix.run.description import describe_run
from jaxprefix.run.folder import check_run_folder, open_run_folder
from tests.base_folders import GOLDEN, GOLDEN_BASE

CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

PATIENCE = 600
"""Seconds after which a test gives up on another process: machines differ by a factor of twenty."""


def run_config(folder: Path, name: str = "run", **changes: object) -> TrainConfig:
    """14 train and 4 dev chunks, 4 updates an epoch; every update is logged."""
    settings = {
        "pretrained_model_dir": str(GOLDEN_BASE),
        "data_filepath": GOLDEN / "documents.jsonl",
        "save_name": name,
        "output_dir": folder,
        "train_data_size": 14,
        "dev_data_size": 4,
        "n_epochs": 2,
        "max_lr": 1e-2,
        "log_every_n_steps": 1,
        "packing": False,  # its up to four shapes take four times as long to compile
    }
    return TrainConfig(**settings | changes)


def flags_of(config: TrainConfig) -> list[str]:
    """The command-line flags of a run_config."""
    names = ("pretrained_model_dir", "data_filepath", "save_name", "output_dir", "train_data_size", "dev_data_size")
    names += ("n_epochs", "max_lr", "log_every_n_steps", "n_training_steps", "batch_size", "checkpoint_every_n_steps")
    default = run_config(config.output_dir, config.save_name)
    changed = {name for name, value in vars(config).items() if value != getattr(default, name)}
    assert changed <= {*names}, f"add {changed - {*names}} to flags_of"
    return [*(part for name in names for part in (f"--{name}", str(getattr(config, name)))), "--no_packing"]


def start(
    config: TrainConfig,
    *flags: str,
    program: tuple[str, ...] = ("-m", "jaxprefix"),
    within: tuple[str, ...] = (),
    **variables: str,
) -> subprocess.Popen[str]:
    """Start a run_config as a process of its own, which keeps what it compiles where this one does.

    `within` is the command that runs it, if there is one.
    """
    folder = jax.config.jax_compilation_cache_dir
    kept = {} if folder is None else {"JAX_COMPILATION_CACHE_DIR": folder, **CACHE_ALL}
    command = [*within, sys.executable, *program, "train", *flags_of(config), *flags]
    environment = os.environ | kept | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin(config: TrainConfig, **base: str) -> None:
    """Open a run's folder as the run of a base model does."""
    open_run_folder(config, describe_run(config, base))


def check_resumed(config: TrainConfig, **base: str) -> None:
    """Check the folder as a resumed run of a base model does."""
    resumed = dataclasses.replace(config, resume=True)
    check_run_folder(resumed, describe_run(resumed, base))


def metrics_of(run_dir: Path, split: str = "train") -> list[dict]:
    """The records of one split in metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def losses_of(run_dir: Path, split: str = "train") -> list[float]:
    return [record["loss"] for record in metrics_of(run_dir, split)]


def assert_same_end(config: TrainConfig, other: TrainConfig) -> None:
    """Assert that two runs have the same prefix, newest checkpoint, and metrics but for speed, bit for bit."""
    (prefix, base), (other_prefix, other_base) = (read_prefix(run.run_dir) for run in (config, other))
    assert base == other_base
    np.testing.assert_array_equal(prefix, other_prefix)

    (arrays, progress), (other_arrays, other_progress) = (newest_state(run) for run in (config, other))
    assert progress == other_progress
    assert arrays.keys() == other_arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], other_arrays[name], err_msg=name)

    for split in ("train", "dev"):
        points, other_points = (
            [point | {"tokens_per_s": None} for point in metrics_of(run.run_dir, split)] for run in (config, other)
        )
        assert points == other_points


def newest_state(config: TrainConfig) -> tuple[dict[str, np.ndarray], dict]:
    """Read the newest checkpoint of a run."""
    with Checkpoints(config.run_dir / "checkpoints", writing=False) as checkpoints:
        return checkpoints.read()


def before_updates(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], object]) -> None:
    """Do something just before each update is made, given its number."""
    shared_update = train_module.shared_update

    def own_update(*arguments):
        update, numbers = shared_update(*arguments), itertools.count(1)

        def disturbed(*state):
            action(next(numbers))
            return update(*state)

        return disturbed

    monkeypatch.setattr(train_module, "shared_update", own_update)


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something just before one update is made."""
    before_updates(monkeypatch, lambda each: action() if each == number else None)


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Press Ctrl-C while the given update is made."""
    at_update(monkeypatch, update, lambda: signal.raise_signal(signal.SIGINT))


def printed_by(program, *arguments, **environment):
    """Run a program in a process of its own, whose devices are not ours."""
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert result.returncode == 0, result.stderr
    return result.stdout
