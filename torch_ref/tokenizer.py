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
    """Load `spiece.model` and the special tokens that tokenizer_config.json names."""
    processor = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {f"{kind}_id": processor.piece_to_id(names[f"{kind}_token"]) for kind in ("bos", "eos", "pad")}
    return Tokenizer(processor, **ids)
