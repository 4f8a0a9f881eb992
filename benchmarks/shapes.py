"""Base models of known sizes with random weights, in the hub's layout. Making or reading one imports jax."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np

from convert.table import write_weights

if TYPE_CHECKING:
    from jaxprefix.models.config import ModelConfig

DATA = Path(__file__).parents[1] / "data"
SMALL_BASE, SAMPLE = DATA / "small_base", DATA / "sample_data.jsonl"
N_NUMBERS = 1_000_003
"""Random numbers that weights repeat over and over: a prime number of them, so that no two rows are equal."""
TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def neox(n_layer: int, width: int, n_head: int, vocab: int, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a GPT-NeoX model."""
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": n_layer,
        "hidden_size": width,
        "num_attention_heads": n_head,
        "intermediate_size": 4 * width,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "use_parallel_residual": False,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def gpt2(n_layer: int, width: int, n_head: int, vocab: int, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a GPT-2 model."""
    return {
        "model_type": "gpt2",
        "n_layer": n_layer,
        "n_embd": width,
        "n_head": n_head,
        "vocab_size": vocab,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


SHAPES = {
    "1m": neox(2, 64, 4, 4000),
    "3m": neox(4, 192, 6, 4000),
    "13m": neox(4, 384, 6, 8000),
    "110m": neox(12, 768, 12, 44416),  # rinna/japanese-gpt-neox-small
    "gpt2": gpt2(12, 768, 12, 32000),  # rinna/japanese-gpt2-small
    "1.4b": neox(24, 2048, 16, 50304, rotary_pct=0.25, use_parallel_residual=True),  # pythia-1.4b
    "6.9b": neox(32, 4096, 32, 50432, rotary_pct=0.25, use_parallel_residual=True),  # pythia-6.9b
    "20b": neox(
        44, 6144, 64, 50432, rotary_pct=0.25, use_parallel_residual=True, hidden_act="gelu_fast"
    ),  # gpt-neox-20b
}


def is_gpt2(folder: Path) -> bool:
    """Tell whether a folder holds a GPT-2."""
    return json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"


def sizes_of(folder: Path) -> tuple[int, int, int, int]:
    """Return layers, width, inner width and vocabulary of a folder's model, without JAX."""
    config = json.loads((folder / "config.json").read_text())
    n_layer, width = ("n_layer", "n_embd") if is_gpt2(folder) else ("num_hidden_layers", "hidden_size")
    return config[n_layer], config[width], 4 * config[width], config["vocab_size"]


def model_config(config: dict[str, Any]) -> "ModelConfig":
    """Return the ModelConfig of a config.json."""
    from jaxprefix.models.config import read_model_config

    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        return read_model_config(Path(temporary))


def make_folder(folder: Path, config: dict[str, Any], dtype: str = "float32", n_shards: int = 1) -> Path:
    """Write a base model with random weights of std 0.02 and the small base's tokenizer."""
    from jaxprefix.models import weight_shapes, weight_table
    from jaxprefix.models.config import read_model_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(SMALL_BASE / name, folder)
    model = read_model_config(folder)
    stored = np.dtype(dtype)
    numbers = np.float32(0.02) * np.random.default_rng(0).standard_normal(N_NUMBERS, dtype=np.float32)
    shapes = weight_shapes(model)
    n_bytes = sum(int(np.prod(shape)) for shape in shapes.values()) * stored.itemsize

    def weights():
        for index, (path, shape) in enumerate(shapes.items()):
            centre = np.float32(path.endswith("norm.weight"))
            yield path, np.resize((centre + np.roll(numbers, index * N_NUMBERS // len(shapes))).astype(stored), shape)

    shard_bytes = -(-n_bytes * 103 // 100) // n_shards
    write_weights(folder, weight_table(model), model.n_layer, weights(), shard_bytes)
    return folder


def attention_flops(lengths: list[np.ndarray], prefix_len: int, n_layer: int, width: int) -> float:
    """Return the operations of causal attention on rows of these lengths after the prefix.

    The forward pass computes scores and weighted sums; the backward pass, recomputing scores, 2.5 times as many.
    """
    n_pairs = sum(float((of_batch * (prefix_len + of_batch / 2)).sum()) for of_batch in lengths)
    return 3.5 * 4 * n_layer * width * n_pairs
