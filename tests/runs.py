"""Short training runs on the golden base and documents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxprefix.config import TrainConfig
from tests.base_folders import GOLDEN, GOLDEN_BASE

CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


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
    config: TrainConfig, *flags: str, program: tuple[str, ...] = ("-m", "jaxprefix.cli"), **variables: str
) -> subprocess.Popen[str]:
    """Start a run_config as a process of its own, which keeps what it compiles where this one does."""
    folder = jax.config.jax_compilation_cache_dir
    kept = {} if folder is None else {"JAX_COMPILATION_CACHE_DIR": folder, **CACHE_ALL}
    command = [sys.executable, *program, "train", *flags_of(config), *flags]
    environment = os.environ | kept | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics_of(run_dir: Path, split: str = "train") -> list[dict]:
    """The records of one split in metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def losses_of(run_dir: Path, split: str = "train") -> list[float]:
    return [record["loss"] for record in metrics_of(run_dir, split)]
