"""Prefix-tuning of GPT-NeoX language models in JAX: a frozen base model, a few trained keys and values."""

from convert.errors import InputError
from jaxprefix.generate import generate
from jaxprefix.models import load_model
from jaxprefix.prefix import load_prefix
from jaxprefix.tokenizer import load_tokenizer

__all__ = ["InputError", "generate", "load_model", "load_prefix", "load_tokenizer"]
