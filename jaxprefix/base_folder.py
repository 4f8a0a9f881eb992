"""A base model before any weight is read: its folder's configuration and tokenizer, and what identifies it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprefix.hub import resolve_folder
from jaxprefix.models.config import ModelConfig, read_model_config
from jaxprefix.tokenizer import Tokenizer, load_tokenizer

SHAPE = ("model_type", "n_layer", "n_head", "head_dim", "vocab_size")
IDENTITY = ("base_model", *SHAPE, "revision", "tokenizer")
"""The fields of a prefix file's header that describe its base model."""


class BaseFolder(NamedTuple):
    """A base model's folder, configuration and tokenizer."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer


def open_base(dir_or_hub_id: str, revision: str | None = None, model_type: str | None = None) -> BaseFolder:
    """Find a base model and read its config.json and tokenizer; `model_type` must agree if it is given.

    For a hub id, everything but the weights is downloaded (see `fetch_weights`). Raises InputError.
    """
    path = resolve_folder(dir_or_hub_id, revision)
    return BaseFolder(path, read_model_config(path, dir_or_hub_id, model_type, revision), load_tokenizer(path))


def base_identity(config: ModelConfig, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """Describe a base model for the header of a prefix file; on loading, all but name and revision must agree."""
    identity = {"base_model": config.name, **{field: str(getattr(config, field)) for field in SHAPE}}
    identity |= {} if config.revision is None else {"revision": config.revision}
    return identity if tokenizer is None else {**identity, "tokenizer": tokenizer.fingerprint}


def differing_fields(found: Mapping[str, Any], identity: Mapping[str, str]) -> list[str]:
    """Say which fields of a file's base differ from a `base_identity`; a field that the file lacks counts as equal."""
    return [
        f"{field}: made for {found[field]}, this base has {value}"
        for field, value in identity.items()
        if field not in ("base_model", "revision") and found.get(field, value) != value
    ]
