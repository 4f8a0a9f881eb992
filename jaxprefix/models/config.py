"""The shape of a base model, read from its config.json only, never from flags."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from convert.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the forward pass and the prefix need to know of a GPT-NeoX base model."""

    name: str
    """The folder or hub id that the model was loaded from; names the base in prefix files."""
    model_type: str
    """`gpt_neox`."""
    n_layer: int
    """L: transformer layers."""
    n_head: int
    """N: attention heads."""
    n_embd: int
    """D: width of the residual stream."""
    n_inner: int
    """F: width of the feed-forward layer."""
    vocab_size: int
    """V: rows of the embedding, which may exceed the tokenizer's."""
    n_positions: int
    """Positions the model was trained on; prefix and tokens together must fit."""
    rotary_fraction: float
    """Share of each head's dimensions that rotate."""
    rotary_base: float
    """Base of the rotary frequencies."""
    parallel_residual: bool
    """True: x + attn(ln1 x) + mlp(ln2 x). False: two residuals, one after the other."""
    layer_norm_eps: float
    """Added to the variance in every layer norm."""

    @property
    def head_dim(self) -> int:
        """H: dimensions of one head."""
        return self.n_embd // self.n_head

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def folded_width(self) -> int:
        """Numbers that one prefix position adds to the model: a key and a value in every layer."""
        return 2 * self.n_layer * self.n_embd

    def check_fit(self, n_pieces: int, prefix_len: int, longest: int, what: str) -> None:
        """Check that all ids and positions exist, since gathers on the device clamp silently.

        `n_pieces` is the tokenizer's, `longest` the tokens of `what`. Raises InputError.
        """
        if prefix_len + longest > self.n_positions:
            raise InputError(
                f"prefix of {prefix_len} + {what}, {longest} tokens, is more than the base model's "
                f"{self.n_positions} positions"
            )
        if n_pieces > self.vocab_size:
            raise InputError(
                f"{self.name}: the tokenizer has {n_pieces} pieces, more than the model's vocab_size {self.vocab_size}"
            )


# Field → (every spelling in config.json, default of transformers when none is present).
_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "n_layer": (("num_hidden_layers",), None),
    "n_head": (("num_attention_heads",), None),
    "n_embd": (("hidden_size",), None),
    "n_inner": (("intermediate_size",), None),
    "vocab_size": (("vocab_size",), None),
    "n_positions": (("max_position_embeddings",), None),
    "rotary_fraction": (("rotary_pct", "partial_rotary_factor", "rope_parameters.partial_rotary_factor"), 0.25),
    "rotary_base": (("rotary_emb_base", "rope_theta", "rope_parameters.rope_theta"), 10000.0),
    "parallel_residual": (("use_parallel_residual",), True),
    "layer_norm_eps": (("layer_norm_eps",), 1e-5),
}
# Settings that change the arithmetic, with the one value that this forward pass computes.
_FIXED: dict[str, tuple[tuple[str, ...], Any]] = {
    "hidden_act": (("hidden_act",), "gelu"),
    "tie_word_embeddings": (("tie_word_embeddings",), False),
    "attention_bias": (("attention_bias",), True),
    "rope scaling": (("rope_scaling.type", "rope_scaling.rope_type", "rope_parameters.rope_type"), "default"),
}


def read_model_config(folder: Path, name: str | None = None) -> ModelConfig:
    """Read `folder/config.json`. Raises InputError naming every field that is missing or not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a base model folder holds config.json, its weights and a tokenizer")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    if raw.get("model_type") != "gpt_neox":
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}; supported: 'gpt_neox'")

    problems: list[str] = []
    values = {field: _lookup(raw, spellings, default, problems) for field, (spellings, default) in _FIELDS.items()}
    for field, (spellings, supported) in _FIXED.items():
        if (found := _lookup(raw, spellings, supported, problems)) != supported:
            problems.append(f"{field} {found!r} is not supported, only {supported!r}")
    for field, value in values.items():
        kind = ModelConfig.__annotations__[field]
        if kind is float and type(value) is int:
            values[field] = float(value)
        elif value is not None and (type(value) is not kind or (kind is not bool and value <= 0)):
            problems.append(f"{_FIELDS[field][0][0]} must be a positive {kind.__name__}, found {value!r}")
    if not problems and values["n_embd"] % values["n_head"]:
        problems.append(f"hidden_size {values['n_embd']} is not divisible by {values['n_head']} heads")
    if problems:
        raise InputError.all(f"{path}:", problems)
    return ModelConfig(name=name or str(folder), model_type="gpt_neox", **values)


def _lookup(raw: dict[str, Any], spellings: tuple[str, ...], default: Any, problems: list[str]) -> Any:
    """Return the value that the spellings agree on, the default when none is present; note contradictions."""
    found: dict[str, Any] = {}
    for spelling in spellings:
        value: Any = raw
        for key in spelling.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[spelling] = value
    if len(set(map(repr, found.values()))) > 1 and len(set(found.values())) > 1:
        problems.append("contradiction: " + ", ".join(f"{key} = {value}" for key, value in found.items()))
    if not found and default is None:
        problems.append(f"{spellings[0]} is missing")
    return next(iter(found.values()), default)
