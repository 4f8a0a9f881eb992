"""The shape of a base model, read from its config.json only, never from flags."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from convert.errors import InputError
from convert.untrusted import member, read_object
from convert.weights import FLOATS
from jaxprefix.hub import BASE_CONFIG

Fields = dict[str, tuple[tuple[str, ...], Any]]
"""For each field, its spellings in config.json, and transformers' default if it is absent or, unless a bool, null."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the forward pass and the prefix need to know about a base model."""

    name: str = dataclasses.field(compare=False)
    """The folder or hub id that the model was loaded from; names the base in prefix files; no program depends on it."""
    model_type: Literal["gpt_neox", "gpt2"]
    """Architecture, as config.json spells it."""
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
    activation: str
    """Activation between the feed-forward layer's two linear layers, by transformers' name."""
    tied_head: bool
    """Whether the embedding is also the head."""
    layer_norm_eps: float
    """Added to the variance in every layer norm."""

    rotary_fraction: float = 0.0
    """GPT-NeoX: share of each head's dimensions that rotate."""
    rotary_base: float = 0.0
    """GPT-NeoX: base of the rotary frequencies."""
    rotary_scaling: str = "default"
    """GPT-NeoX: how rotary embeddings are stretched beyond the training length: default (not), linear or dynamic."""
    rotary_factor: float = 1.0
    """GPT-NeoX: linear divides positions by it; dynamic reaches up to this many times n_positions."""
    parallel_residual: bool = False
    """GPT-NeoX. True: x + attn(ln1 x) + mlp(ln2 x). False: two residuals, one after the other."""
    attention_bias: bool = True
    """GPT-NeoX: whether the linear layers of attention have biases."""

    scale_attention: bool = True
    """GPT-2: divide scores by √H."""
    scale_by_layer: bool = False
    """GPT-2: also divide scores by the layer's number, counted from 1."""

    revision: str | None = dataclasses.field(default=None, compare=False)
    """Branch, tag or commit of a hub id, if one was given."""

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

    @property
    def max_positions(self) -> int:
        """Positions that exist: n_positions, or more if rotary scaling extends them."""
        return self.n_positions if self.rotary_scaling == "default" else int(self.n_positions * self.rotary_factor)

    def prefix_length(self, prefix: Any) -> int:
        """Return a prefix's P, 0 for None. Raises InputError for anything that is not a prefix of this model."""
        if prefix is None:
            return 0
        n_layer, n_head, head_dim = self.n_layer, self.n_head, self.head_dim
        shape: tuple[int, ...] = getattr(prefix, "shape", ())
        if len(shape) != 5 or (*shape[:2], *shape[3:]) != (n_layer, 2, n_head, head_dim):
            found = f"one of {list(shape)}" if shape else type(prefix).__name__
            raise InputError(
                f"a prefix of this model is an array [{n_layer}, 2, P, {n_head}, {head_dim}], found {found}"
            )
        if (dtype := str(prefix.dtype)) not in FLOATS:
            kind = "NumPy's or JAX's floating-point numbers" if dtype.startswith("torch.") else "floating-point numbers"
            raise InputError(f"a prefix holds {kind}, found {dtype}")
        return int(shape[2])

    def check_vocabulary(self, n_pieces: int) -> None:
        """Raise InputError if a tokenizer has more pieces than the model: gathers would clamp their ids silently."""
        if n_pieces > self.vocab_size:
            raise InputError(
                f"{self.name}: the tokenizer has {n_pieces} pieces, more than the model's vocab_size {self.vocab_size}"
            )

    def check_fit(self, prefix_len: int, longest: int, what: str, begins: str = "", where: str = "") -> None:
        """Raise InputError unless all positions exist: gathers on the device would clamp them silently.

        `longest` is the number of tokens in `what`, `begins` the start of its text; the error begins with `where`.
        """
        if prefix_len + longest > self.max_positions:
            raise InputError(
                f"{where}a prefix of {prefix_len} plus {longest} tokens ({what}) exceeds the base model's "
                f"{self.max_positions} positions" + (f"; the text begins with {begins!r}" if begins else "")
            )


def _in_rope(key: str) -> tuple[str, str]:
    return f"rope_scaling.{key}", f"rope_parameters.{key}"


_FIELDS: dict[str, Fields] = {
    "gpt_neox": {
        "n_layer": (("num_hidden_layers",), None),
        "n_head": (("num_attention_heads",), None),
        "n_embd": (("hidden_size",), None),
        "n_inner": (("intermediate_size",), None),
        "vocab_size": (("vocab_size",), None),
        "n_positions": (("max_position_embeddings",), None),
        "activation": (("hidden_act",), "gelu"),
        "tied_head": (("tie_word_embeddings",), False),
        "layer_norm_eps": (("layer_norm_eps",), 1e-5),
        "rotary_fraction": (
            ("rotary_pct", "partial_rotary_factor", *_in_rope("partial_rotary_factor")),
            0.25,
        ),
        "rotary_base": (("rotary_emb_base", "rope_theta", *_in_rope("rope_theta")), 10000.0),
        "rotary_scaling": ((*_in_rope("rope_type"), *_in_rope("type")), "default"),
        "rotary_factor": (_in_rope("factor"), 1.0),
        "parallel_residual": (("use_parallel_residual",), True),
        "attention_bias": (("attention_bias",), True),
    },
    "gpt2": {
        "n_layer": (("n_layer", "num_hidden_layers"), None),
        "n_head": (("n_head", "num_attention_heads"), None),
        "n_embd": (("n_embd", "hidden_size"), None),
        "n_inner": (("n_inner",), 0),  # null or absent: four times n_embd
        "vocab_size": (("vocab_size",), None),
        "n_positions": (("n_positions", "max_position_embeddings"), None),
        "activation": (("activation_function",), "gelu_new"),
        "tied_head": (("tie_word_embeddings",), True),
        "layer_norm_eps": (("layer_norm_epsilon",), 1e-5),
        "scale_attention": (("scale_attn_weights",), True),
        "scale_by_layer": (("scale_attn_by_inverse_layer_idx",), False),
    },
}
# Settings that change the arithmetic, with the only value that the forward pass implements.
_FIXED = {"is_causal": True, "add_cross_attention": False}
# Limits far above any model, so that a damaged or hostile config.json is refused before it costs minutes or gigabytes.
_LARGEST = {
    "n_layer": 2**7,
    "n_head": 2**12,
    "n_embd": 2**17,
    "n_inner": 2**20,
    "vocab_size": 2**24,
    "n_positions": 2**24,
    "rotary_fraction": 1,
    "rotary_factor": 2**10,
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
ROTARY_SCALINGS = ("default", "linear", "dynamic")
MODEL_TYPES = {"gpt_neox": "gpt-neox", "gpt2": "gpt"}
"""Architectures, with their names in `--model_type`."""


def read_model_config(
    folder: Path, name: str | None = None, model_type: str | None = None, revision: str | None = None
) -> ModelConfig:
    """Read `folder/config.json`; `model_type` is the architecture that the user expects, as --model_type names it.

    Raises an InputError that names every field that is missing, contradictory or not supported.
    """
    path = member(folder, BASE_CONFIG)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a base model folder holds config.json, its weights and a tokenizer")
    raw = read_object(path)
    if "data_sha256" in raw:
        raise InputError(f"{folder}: is a run's folder; its base model was {raw.get('pretrained_model_dir')}")
    architecture = raw.get("model_type")
    if architecture not in list(MODEL_TYPES):  # a list, since the value may not be hashable
        supported = ", ".join(map(repr, MODEL_TYPES))
        raise InputError(f"{path}: model_type is {architecture!r}; supported: {supported}")
    if model_type not in (None, MODEL_TYPES[architecture]):
        raise InputError(f"{path}: model_type is {architecture!r}, which contradicts --model_type {model_type}")

    if raw.get("auto_map"):
        raise InputError(f"{path}: needs its own code (auto_map), which is never run; such models are not supported")
    problems: list[str] = []
    values = _read_fields(raw, architecture, problems)
    if problems:
        raise InputError.all(f"{path}:", problems)
    values["n_inner"] = values["n_inner"] or 4 * values["n_embd"]
    config = ModelConfig(name=name or str(folder), revision=revision, model_type=architecture, **values)
    if problems := _shape_problems(config, raw.get("head_dim")):
        raise InputError.all(f"{path}:", problems)
    return config


def _read_fields(raw: dict[str, Any], architecture: str, problems: list[str]) -> dict[str, Any]:
    """Return an architecture's fields by name; add what is missing, contradictory or unsupported to `problems`."""
    fields = _FIELDS[architecture]
    found: dict[str, tuple[str, Any]] = {}
    for field, (spellings, default) in fields.items():
        needed = field == "rotary_factor" and found["rotary_scaling"][1] in ("linear", "dynamic")
        found[field] = _lookup(raw, spellings, None if needed else default, problems)
        if type(default) is bool:  # null is false in transformers 4, refused in 5
            nulls = [name for name in spellings if name in raw and raw[name] is None]
            problems += [f"{name} must be true or false, found null" for name in nulls]
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            problems.append(f"{key} must be an object, found {raw[key]!r}")
    if raw.get("rope_scaling") and raw.get("rope_parameters") not in (None, {}, raw["rope_scaling"]):
        problems.append("contradiction: rope_scaling and rope_parameters differ")
    for field, supported in _FIXED.items():
        if (value := raw.get(field)) not in (None, supported):
            problems.append(f"{field} {value!r} is not supported, only {supported!r}")
    return {
        field: _checked(field, spelling, value, fields[field][1], problems)
        for field, (spelling, value) in found.items()
    }


def _shape_problems(config: ModelConfig, head_dim: Any) -> list[str]:
    """Say which sizes contradict each other; `head_dim` is the one in config.json, if any."""
    problems = []
    if head_dim not in (None, config.head_dim):
        problems.append(f"head_dim {head_dim!r} is not width {config.n_embd} divided by {config.n_head} heads")
    if config.n_embd % config.n_head:
        problems.append(f"width {config.n_embd} is not divisible by {config.n_head} heads")
    elif config.rotary_factor < 1:
        problems.append(
            f"rotary scaling factor {config.rotary_factor} is below 1, which would shorten the trained context"
        )
    elif config.rotary_dim % 2:
        problems.append(f"{config.rotary_dim} of {config.head_dim} dimensions rotate, which must be an even number")
    elif config.rotary_scaling == "dynamic" and config.rotary_dim < 4:
        problems.append(f"dynamic rotary scaling needs at least 4 dimensions that rotate, found {config.rotary_dim}")
    return problems


def _checked(field: str, spelling: str, value: Any, default: Any, problems: list[str]) -> Any:
    """Return a value in its field's type; if it has another type or is not supported, add that to `problems`."""
    kind = ModelConfig.__annotations__[field]
    if value is None:  # missing, which is among the problems already
        return value
    if kind is float and type(value) is int and value < 2**53:
        value = float(value)
    known = {"activation": ACTIVATIONS, "rotary_scaling": ROTARY_SCALINGS}.get(field)
    if known and value not in known:
        problems.append(f"{spelling} {value!r} is not supported, only {', '.join(known)}")
    elif type(value) is not kind or (kind in (int, float) and not (0 < value < math.inf or value == default)):
        needed = "true or false" if kind is bool else f"a positive {kind.__name__}"
        problems.append(f"{spelling} must be {needed}, found {value!r}")
    elif field in _LARGEST and value > _LARGEST[field]:
        problems.append(f"{spelling} {value!r} is more than {_LARGEST[field]:,}, the largest supported")
    return value


def _lookup(raw: dict[str, Any], spellings: tuple[str, ...], default: Any, problems: list[str]) -> tuple[str, Any]:
    """Return the first spelling found and its value, or the default; add contradictions to `problems`."""
    found: dict[str, Any] = {}
    for spelling in spellings:
        value: Any = raw
        for key in spelling.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[spelling] = value
    spelling, first = next(iter(found.items()), (spellings[0], default))
    if any(value != first for value in found.values()):
        problems.append("contradiction: " + ", ".join(f"{key} = {value}" for key, value in found.items()))
    if not found and default is None:
        problems.append(f"{spellings[0]} is missing")
    return spelling, first
