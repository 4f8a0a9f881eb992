"""Text to ids and back: a base model's vocabulary with the special tokens that its folder names."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from convert.errors import InputError
from convert.untrusted import member, read_object, refuse_pointer, unique_keys
from jaxprefix.hub import (
    ADDED_TOKENS_FILE,
    BASE_CONFIG,
    MERGES_FILE,
    SENTENCEPIECE_FILES,
    SPECIAL_TOKENS,
    TOKENIZER_SETTINGS,
    TOKENIZERS_FILE,
    VOCAB_FILE,
    resolve_folder,
)
from jaxprefix.vocabularies import TOKEN_FLAGS, Added, SentencePiece, TokenizersFile, Vocabulary, panics_as_errors

GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
"""GPT-2's own special tokens, which apply to its two files unless other files of the folder name others."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

    vocabulary: Vocabulary
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """16 hex digits that identify the tokenizer in prefix files, however it is saved or padded."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces, added tokens included."""
        return self.vocabulary.size

    @property
    def unk_id(self) -> int | None:
        """Id that stands for what the vocabulary lacks; None if it lacks nothing."""
        return self.vocabulary.unk_id

    @functools.cached_property
    def exact_fingerprint(self) -> str:
        """A checksum of everything that determines the ids of texts: the key to cache them by."""
        return hashlib.sha256(self.vocabulary.exact_content()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens. Raises InputError if it is not valid Unicode."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and without ids that only pad a vocabulary."""
        special = {self.bos_id, self.eos_id, self.pad_id}
        return self.vocabulary.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in special])

    def why_unlearnable(self, text: str) -> str | None:
        """Say why no model can learn to write `text`; None if one can."""
        ids = self.encode(text)
        if self.unk_id in ids:
            return "holds text unknown to the tokenizer"
        if not ids:
            return "is nothing to the tokenizer"
        return "is a special token, which no text shows" if text.strip() and not self.decode(ids) else None


def load_tokenizer(dir_or_hub_id: str | Path, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a base model's folder or hub id.

    That is a SentencePiece model if there is one, else tokenizer.json, else GPT-2's vocab.json and merges.txt.
    The tokenizer files beside it name the special tokens; if they do not, config.json or the SentencePiece model
    gives their ids. A tokenizer without a pad token pads with eos: padding is never read.
    Raises InputError when there is no tokenizer file, or no bos or eos token.
    """
    folder = resolve_folder(dir_or_hub_id, revision)
    settings, special = (_read_settings(folder, file) for file in (TOKENIZER_SETTINGS, SPECIAL_TOKENS))
    settings = special | settings if "added_tokens_decoder" in settings else settings | special  # older files lack it
    config = _read_settings(folder, BASE_CONFIG)
    names = [*SENTENCEPIECE_FILES, TOKENIZERS_FILE]
    if config.get("model_type") != "gpt_neox":  # GPT-NeoX's normalises texts first, and has a tokenizer.json
        names.append(VOCAB_FILE)
    path = next((p for name in names if (p := member(folder, name)).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no tokenizer; expected one of {', '.join(names)}")
    if settings.get("tokenizer_class") is None:
        settings = settings | {"tokenizer_class": config.get("tokenizer_class")}
    if path.name == VOCAB_FILE:
        settings = GPT2_SPECIAL | settings
    vocabulary = _open_vocabulary(path, _added_tokens(folder, settings), settings)

    bos_id, eos_id, pad_id = (_special_id(vocabulary, kind, settings, config) for kind in ("bos", "eos", "pad"))
    if bos_id is None or eos_id is None:
        missing = [name for name, found in (("bos_token", bos_id), ("eos_token", eos_id)) if found is None]
        named = [repr(name) for name in map(_content, map(settings.get, missing)) if isinstance(name, str)]
        unknown = f" ({', '.join(named)}: neither in it nor in {ADDED_TOKENS_FILE})" if named else ""
        raise InputError(
            f"{path}: has no {' and no '.join(missing)}{unknown}; name the special token in {TOKENIZER_SETTINGS}"
        )
    if isinstance(vocabulary, TokenizersFile) and vocabulary.is_unigram and vocabulary.unk_id in (None, bos_id, eos_id):
        if vocabulary.unk_id is None:
            raise InputError(f"{path}: defines no unknown token (unk_id)")
        token = vocabulary.backend.id_to_token(vocabulary.unk_id)
        raise InputError(
            f"{path}: turns unknown text into {token!r}, as files converted from a SentencePiece model do; put that "
            f"model beside it, as {SENTENCEPIECE_FILES[0]}"
        )
    padding = pad_id if pad_id not in (bos_id, eos_id, vocabulary.unk_id) else None
    fingerprint = hashlib.sha256(vocabulary.content(padding)).hexdigest()[:16]
    return Tokenizer(vocabulary, bos_id, eos_id, eos_id if pad_id is None else pad_id, fingerprint)


def _open_vocabulary(path: Path, added: dict[str, Added], settings: Mapping[str, Any]) -> Vocabulary:
    refuse_pointer(path)
    if path.name in (TOKENIZERS_FILE, VOCAB_FILE):
        try:
            with panics_as_errors():
                two_files = path.name == VOCAB_FILE
                backend = _gpt2(path, settings) if two_files else tokenizers.Tokenizer.from_file(str(path))
                return TokenizersFile(backend, added, settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path}: not a {path.name} ({error})") from error
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: a path that is not UTF-8
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error
    n_pieces = processor.get_piece_size()
    others = {
        name: token.id
        for name, token in added.items()
        if token.id >= n_pieces or processor.id_to_piece(token.id) != name
    }
    return SentencePiece(processor, others, bool(settings.get("do_lower_case", False)))


def _gpt2(vocab: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make GPT-2's tokenizer from its vocabulary and the merges beside it."""
    merges = member(vocab.parent, MERGES_FILE)
    if not merges.is_file():
        raise InputError(f"has no {MERGES_FILE} beside it")
    json.loads(vocab.read_bytes(), object_pairs_hook=unique_keys)  # raises for a repeated key; the library does not
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    if isinstance(more := settings.get("additional_special_tokens"), list):
        special += more
    names = [name for name in map(_content, special) if name and backend.token_to_id(name) is not None]
    backend.add_special_tokens(names)
    return backend


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, Added]:
    """Return the tokens that added_tokens.json and the settings' added_tokens_decoder add."""
    ids: dict[str, Any] = dict(_read_settings(folder, ADDED_TOKENS_FILE))
    decoder = settings.get("added_tokens_decoder")
    flags: dict[str, dict[str, bool]] = {}
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        name = str(_content(token))
        ids[name] = int(index) if str(index).isdecimal() else index
        said = token if isinstance(token, dict) else {}
        flags[name] = {flag: said[flag] for flag in TOKEN_FLAGS if type(said.get(flag)) is bool}
    wrong = {token: index for token, index in ids.items() if type(index) is not int or index < 0 or not token}
    if wrong:
        raise InputError(f"{folder}: added tokens without a proper id: {wrong}")
    return {name: Added(index, flags.get(name, {})) for name, index in ids.items()}


def _special_id(
    vocabulary: Vocabulary, kind: str, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> int | None:
    """Return the id of the bos, eos or pad token: by its name, else config.json's, else the SentencePiece model's.

    config.json counts only where its id is a special token's: some have another model's ids, which are words here. If
    a bos or eos token has a name, the SentencePiece model's own is not taken: it is another token.
    """
    name = _content(settings.get(f"{kind}_token"))
    if isinstance(name, str) and (found := vocabulary.id_of(name)) is not None:
        return found
    given = config.get(f"{kind}_token_id")
    given = given[0] if isinstance(given, list) and given else given  # the first of several that end a text
    if type(given) is int and given >= 0 and vocabulary.is_special(given):
        return given
    if not isinstance(vocabulary, SentencePiece) or (isinstance(name, str) and kind != "pad"):
        return None
    own = getattr(vocabulary.processor, f"{kind}_id")()
    return own if own >= 0 else None


def _content(token: Any) -> Any:
    """Return a token's text, which is given plainly or as transformers' {"content": …}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder; empty if there is none."""
    path = member(folder, name)
    return read_object(path) if path.is_file() else {}
