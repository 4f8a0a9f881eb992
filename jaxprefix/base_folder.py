"""A base model's folder, opened: its configuration and tokenizer, before any weight is read."""

from pathlib import Path
from typing import NamedTuple

from jaxprefix.hub import resolve_folder
from jaxprefix.models.config import ModelConfig, read_model_config
from jaxprefix.tokenizer import Tokenizer, load_tokenizer


class BaseFolder(NamedTuple):
    """Where a base model lies, and what it is."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer


def open_base(
    dir_or_hub_id: str, revision: str | None = None, model_type: str | None = None, weights: bool = True
) -> BaseFolder:
    """Find a base model and read its config.json and tokenizer; `model_type` must agree if it is given.

    Without `weights`, those of a hub id are not downloaded. Raises InputError.
    """
    path = resolve_folder(dir_or_hub_id, revision, weights)
    return BaseFolder(path, read_model_config(path, dir_or_hub_id, model_type), load_tokenizer(path))
