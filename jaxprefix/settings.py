"""What all settings share: converting paths and NumPy's numbers; checking types, also from Python code, and ranges."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from convert.errors import InputError


def convert_and_check(settings: Any, what: str) -> None:
    """Convert what is only spelled differently (str and Path, ~, NumPy's numbers), and check the types of all fields.

    `settings` is a dataclass, whose fields are replaced even if it is frozen. Raises InputError that lists the
    values that are of another type, not among a field's choices, a URL in place of a path, or not UTF-8:
    Python accepts such text from a shell, but config.json, SentencePiece and Orbax do not.
    """
    problems = []
    for name, kind in typing.get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), (kind, *typing.get_args(kind))  # for `A | None`, A and None
        if isinstance(value, str | Path) and Path in kinds:
            if re.match("[a-z][a-z0-9+.-]+:/", str(value), re.IGNORECASE) and not Path(Path(value).parts[0]).exists():
                problems.append(f"--{name} must be a path on this machine, is {str(value)!r}")
            value = expanded(value)
        elif name == "pretrained_model_dir" and isinstance(value, str | Path) and str(value).startswith("~"):
            value = str(expanded(value))
        elif isinstance(value, Path) and Path not in kinds:  # a model's folder, which may be a hub id instead
            value = str(value)
        elif getattr(value, "ndim", None) == 0:  # one of NumPy's numbers
            value = value.item()
        object.__setattr__(settings, name, value)
        if isinstance(value, str | Path) and not is_utf8(value):
            problems.append(f"--{name} must be UTF-8, is {str(value)!r}")
        try:
            check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            choices = [choice for k in kinds if typing.get_origin(k) is Literal for choice in typing.get_args(k)]
            if choices:
                problems.append(f"--{name} must be one of {', '.join(choices)}; is {value!r}")
            else:
                named = kind if typing.get_args(kind) else kind.__name__  # Python 3.14 names any union "Union"
                problems.append(f"--{name} must be of type {named}, is {value!r}")
    if problems:
        raise InputError.all(f"{what}:", problems)


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of ~, which a shell leaves alone in --flag=~/folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no home
        return Path(path)


def is_utf8(value: str | Path) -> bool:
    """Tell whether a text or path can be written as UTF-8: JSON and a shell may give Python unpaired surrogates."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def range_problems(settings: Any, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> list[str]:
    """Say which numbers are out of range: NaN always is, None never."""
    problems = []
    for name in positive:
        if (value := getattr(settings, name)) is not None and not value > 0:
            problems.append(f"--{name} must be positive, is {value}")
    for name in not_negative:
        if (value := getattr(settings, name)) is not None and not value >= 0:
            problems.append(f"--{name} must not be negative, is {value}")
    return problems
