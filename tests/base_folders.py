"""Base models for tests: folders in the hub's layout, with weights under which a wrong setting shows.

Head dim 16, weights of std 0.2, random biases and norms: with smaller ones a wrong rotary embedding or
residual form goes unnoticed.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert import gpt_neox
from convert.table import expand
from jaxprefix.models.config import read_model_config
from jaxprefix.models.gpt_neox import GPTNeoX

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_BASE = GOLDEN / "base"
TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")

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


def make_base_folder(folder: Path, seed: int = 0, std: float = 0.2, **config: object) -> Path:
    """Write a GPT-NeoX folder with random weights and the golden tokenizer; `config` overrides TINY."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY | config))
    for name in TOKENIZER_FILES:
        shutil.copy(GOLDEN_BASE / name, folder / name)
    model_config = read_model_config(folder)
    abstract = nnx.to_flat_state(nnx.split(nnx.eval_shape(lambda: GPTNeoX(model_config, nnx.Rngs(0))))[1])
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in abstract}
    random = np.random.default_rng(seed)
    weights = {}
    for name, path in expand(gpt_neox.TABLE, model_config.n_layer).items():
        if path:
            centre = 1.0 if path.endswith("norm.weight") else 0.0
            weights[name] = (centre + std * random.standard_normal(shapes[path], dtype=np.float32)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_gpt2_folder(folder: Path, seed: int = 0, std: float = 0.2) -> Path:
    """Write a GPT-2 folder with random weights, as transformers saves it, and the golden tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=440, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter[0] == 1 else 0.0, std)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(GOLDEN_BASE / name, folder / name)
    return folder


def random_prefix(config, length: int = 7, seed: int = 1) -> jax.Array:
    """A prefix [L, 2, P, N, H] of std 1."""
    return jax.random.normal(jax.random.key(seed), (config.n_layer, 2, length, config.n_head, config.head_dim))
