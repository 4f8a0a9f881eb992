"""Base models for tests: folders in the hub's layout, with weights that make a wrong setting visible.

Head dim 16, weights of std 0.2, random biases and norms: with smaller ones a wrong rotary embedding or
residual form goes unnoticed.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.shapes import TOKENIZER_FILES
from convert.table import write_weights
from jaxprefix.models import BaseModel, abstract_model, weight_shapes, weight_table
from jaxprefix.models.config import read_model_config

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_BASE = GOLDEN / "base"
SAMPLE = Path(__file__).parent.parent / "data" / "sample_data.jsonl"

TINY = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 440,
    "max_position_embeddings": 256,
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_inner": 128,
    "vocab_size": 440,
    "n_positions": 256,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_base_folder(folder: Path, seed: int = 0, std: float = 0.2, **config: object) -> Path:
    """Write a folder with random weights and the golden tokenizer; `config` overrides TINY, or TINY_GPT2."""
    settings = (TINY_GPT2 if config.get("model_type") == "gpt2" else TINY) | config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    for name in TOKENIZER_FILES:
        shutil.copy(GOLDEN_BASE / name, folder / name)
    model_config = read_model_config(folder)
    random = np.random.default_rng(seed)
    weights = {}
    for path, shape in weight_shapes(model_config).items():
        centre = np.float32(path.endswith("norm.weight"))
        weights[path] = centre + np.float32(std) * random.standard_normal(shape, dtype=np.float32)
    write_weights(folder, weight_table(model_config), model_config.n_layer, weights.items())
    return folder


@contextlib.contextmanager
def changed_weights(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The weights of a base model's one file, by their names in it, to change in place."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors")


def make_bpe_folder(folder: Path) -> Path:
    """Write a GPT-2 with a byte-level tokenizer.json, whose one special token is bos and eos."""
    make_base_folder(folder, model_type="gpt2", vocab_size=512, eos_token_id=0, bos_token_id=0)
    for name in TOKENIZER_FILES:
        (folder / name).unlink()
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["今日は晴れ。"] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def with_config(model: BaseModel, **changes: Any) -> BaseModel:
    """The same weights in a model of a changed configuration."""
    changed = abstract_model(dataclasses.replace(model.config, **changes))
    return nnx.merge(nnx.split(changed)[0], nnx.split(model)[1])
