"""SentencePiece through the `sentencepiece` package: the ids of the slow T5 tokenizer that the original uses."""

import dataclasses
import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back."""

    processor: SentencePieceProcessor
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Return a text's ids, without special tokens."""
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.processor.decode(ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `spiece.model`, and the special tokens that tokenizer_config.json names, which must be pieces of it.

    Raises ValueError for folders of any other layout: the original does not read them.
    """
    model, settings = folder / "spiece.model", folder / "tokenizer_config.json"
    for path in (model, settings):
        if not path.is_file():
            raise ValueError(f"{path}: missing; torch_ref reads no other tokenizer")
    processor = SentencePieceProcessor(model_file=str(model))
    names = json.loads(settings.read_text(encoding="utf-8"))
    ids = {}
    for kind in ("bos", "eos", "pad"):
        name = names.get(f"{kind}_token")
        if not isinstance(name, str) or processor.id_to_piece(found := processor.piece_to_id(name)) != name:
            raise ValueError(f"{settings}: {kind}_token must be a piece of {model.name}, found {name!r}")
        ids[f"{kind}_id"] = found
    return Tokenizer(processor, **ids)
