"""Prefix-tuning of GPT-NeoX and GPT-2 language models in JAX: a frozen base model, a few trained keys and values."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if (_found := importlib.util.find_spec("convert")) is not None and not _found.submodule_search_locations:
    raise ImportError(f"{_found.origin}: hides jaxprefix's package convert; rename it")

from convert.errors import InputError, RunError

if TYPE_CHECKING:
    from jaxprefix.decode import generate
    from jaxprefix.models import load_model
    from jaxprefix.prefix import load_prefix, save_prefix
    from jaxprefix.tokenizer import load_tokenizer

__version__ = "0.1.0"
__all__ = ["InputError", "RunError", "generate", "load_model", "load_prefix", "load_tokenizer", "save_prefix"]

_MODULE_OF = {
    "generate": "decode",
    "load_model": "models",
    "load_prefix": "prefix",
    "load_tokenizer": "tokenizer",
    "save_prefix": "prefix",
}


def _imported(name: str) -> Any:
    """Import a public name when it is first used, so that code which does not compute need not wait for JAX."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


if not TYPE_CHECKING:  # a type checker would assume that every name exists
    __getattr__ = _imported


def __dir__() -> list[str]:
    """List the public names too, although they may not be imported yet."""
    return sorted({*globals(), *__all__})
