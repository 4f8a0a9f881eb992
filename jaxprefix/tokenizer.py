"""SentencePiece tokenizers, read with `sentencepiece` itself.

transformers 5 rebuilds these tokenizers on another backend and puts a `▁` in front of every text when the
model was trained without a dummy prefix, as rinna's are. Ids here are exactly those of sentencepiece.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from convert.errors import InputError
from jaxprefix.hub import resolve_folder

MODEL_FILES = ("spiece.model", "spm.model", "tokenizer.model")
SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    processor: SentencePieceProcessor
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    fingerprint: str
    """First 16 hex digits of the SHA-256 of the SentencePiece file: two tokenizers agree if these do."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens. Raises InputError if it is not valid Unicode."""
        try:
            return self.processor.encode(text)
        except RuntimeError as error:
            raise InputError(f"not a valid text: {text[:40]!r}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens, and ids of a padded vocabulary, leave no trace."""
        return self.processor.decode([int(i) for i in ids if i < self.vocab_size])


def load_tokenizer(dir_or_hub_id: str | Path) -> Tokenizer:
    """Load the SentencePiece tokenizer of a base model's folder or hub id.

    The special tokens' names come from the tokenizer files beside it, or else their ids from the
    SentencePiece model. A tokenizer without a pad token pads with eos: padding is never read.
    Raises InputError when there is no SentencePiece file, or no bos or eos token.
    """
    folder = resolve_folder(dir_or_hub_id)
    path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no SentencePiece tokenizer; expected one of {', '.join(MODEL_FILES)}")
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error

    names = {key: value for file in SPECIAL_FILES for key, value in _read_object(folder / file).items()}
    bos_id = _special_id(processor, names.get("bos_token"), processor.bos_id())
    eos_id = _special_id(processor, names.get("eos_token"), processor.eos_id())
    pad_id = _special_id(processor, names.get("pad_token"), processor.pad_id())
    missing = [name for name, value in (("bos_token", bos_id), ("eos_token", eos_id)) if value is None]
    if bos_id is None or eos_id is None:
        raise InputError(f"{path}: has no {' and no '.join(missing)}")
    return Tokenizer(
        processor=processor,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        unk_id=processor.unk_id(),
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
    )


def _special_id(processor: SentencePieceProcessor, name: Any, default: int) -> int | None:
    """Return the id of a special token by its name (a string, or transformers' {"content": …}), else the default."""
    if isinstance(name, dict):
        name = name.get("content")
    if isinstance(name, str):
        found = processor.piece_to_id(name)
        if found != processor.unk_id() or name == processor.id_to_piece(processor.unk_id()):
            return found
    return None if default < 0 else default


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content
