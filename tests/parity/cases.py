"""What both sides of the parity report are given: cases, files, prompts; and how their numbers are laid out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.base_folders import GOLDEN, GOLDEN_BASE, SAMPLE, make_base_folder

BATCH_SIZE = 4
MAX_LR, SEED = 1e-3, 42  # ten times the default
LOW_CLIP = 1e-2  # below the norm of any gradient of the first batch
PROMPTS = ("", "今日は", "猫が", "電車で")
NUCLEUS = ((50, 0.95), (0, 0.9), (7, 0.0), (0, 0.05))


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train; by default, 60 updates on the golden documents."""

    name: str
    n_train: int = 9  # batches of 4, 4, 1
    n_dev: int = 5  # batches of 4, 1
    trained_base: bool = False
    """The demo's base model, documents and prompts, instead of random weights and the golden documents."""
    deepspeed: bool = False
    model_type: str = "gpt-neox"
    parallel_residual: bool = False
    completions: bool = False
    bf16: bool = False
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    packing: bool = False
    n_accum_steps: int = 1
    n_warmup_steps: int = 0
    n_training_steps: int = 60

    @property
    def flags(self) -> dict[str, Any]:
        """The training flags that both sides take."""
        n_epochs = self.n_training_steps * self.n_accum_steps // (-(-self.n_train // BATCH_SIZE))
        return {
            "train_data_size": self.n_train,
            "dev_data_size": self.n_dev,
            "batch_size": BATCH_SIZE,
            "n_epochs": n_epochs,
            "n_training_steps": self.n_training_steps,
            "n_accum_steps": self.n_accum_steps,
            "n_warmup_steps": self.n_warmup_steps,
            "max_lr": MAX_LR,
            "grad_clip": self.grad_clip,
            "weight_decay": self.weight_decay,
            "seed": SEED,
            "log_every_n_steps": 1,
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        """What both sides continue."""
        return tuple((SAMPLE.parent / "prompts.txt").read_text().splitlines()) if self.trained_base else PROMPTS


def make_files(case: Case, folder: Path) -> tuple[Path, Path]:
    """Return the case's base model and its data file."""
    if case.trained_base:
        return SAMPLE.parent / "small_base", SAMPLE
    base = GOLDEN_BASE
    if case.model_type == "gpt":
        base = make_base_folder(folder / "gpt2", seed=1, model_type="gpt2")
    if case.parallel_residual:
        base = make_base_folder(folder / "parallel", use_parallel_residual=True)
    if not case.completions:
        return base, GOLDEN / "documents.jsonl"
    documents = [json.loads(line)["text"] for line in (GOLDEN / "documents.jsonl").read_text().splitlines()]
    halves = [(text[: len(text) // 3], text[len(text) // 3 : 90]) for text in documents]
    records = [{"prompt": prompt[-40:], "completion": completion} for prompt, completion in halves]
    records += [{"text": text} for text in documents[:6]]
    data = folder / "completions.jsonl"
    data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return base, data


def batched(order: list[int]) -> list[list[int]]:
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def sentences(data: Path) -> list[str]:
    """Every text of a data file, whole and sentence by sentence."""
    texts = [value for line in data.read_text().splitlines() for value in json.loads(line).values()]
    return texts + [sentence for text in texts for sentence in text.split("\n")]


def as_cache(prefix: Any) -> np.ndarray:
    """[L, 2, P, N, H] → [L·2, 1, N, P, H], as the reference holds it."""
    layered = np.asarray(prefix)
    return layered.reshape(-1, 1, *layered.shape[2:]).swapaxes(2, 3)


def nucleus_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=3, size=(20, 440)).astype(np.float32)
