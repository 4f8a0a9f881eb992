"""Text to ids and back: SentencePiece models through `sentencepiece`, byte-level BPE and others through `tokenizers`.

SentencePiece models are never rebuilt on another backend: that changes ids (an extra `▁`, byte fallback lost).
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor

from convert.errors import InputError
from convert.untrusted import member, read_object, refuse_pointer
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

NEWLINE_PIECE = "<NL>"
GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
"""GPT-2's own special tokens, which apply to its two files unless other files of the folder name others."""
TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
"""Properties of an added token in a tokenizer_config.json."""
PROBE = "Hello, World!  it's 1234 x2.5\n\n  朝の市場は、１２３\nÀ 😃"
"""Its ids differ between tokenizers that share a vocabulary but normalise or split differently."""


class SentencePiece:
    """A SentencePiece model, with what a base model's folder adds to it.

    `added` are tokens with ids after the model's; texts are split at them first. Where the vocabulary has the piece
    `<NL>`, it stands for newlines. With `lower`, everything but added tokens is lower-cased.
    """

    def __init__(self, processor: SentencePieceProcessor, added: Mapping[str, int], lower: bool):
        self.processor, self.added, self.lower = processor, dict(added), lower
        self.unk_id: int | None = processor.unk_id()
        self.size = max([processor.get_piece_size() - 1, *added.values()]) + 1
        self._added_by_id = {index: token for token, index in added.items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(longest_first)})" if added else "(?!)")  # (?!) splits nowhere
        self._has_newline = self.id_of(NEWLINE_PIECE) is not None

    def encode(self, text: str) -> list[int]:
        """Return a text's ids, without special tokens. Raises InputError if it is not valid Unicode."""
        ids: list[int] = []
        for part in self._splitter.split(text):
            if part in self.added:
                ids.append(self.added[part])
            elif part:
                ids += self._encode_pieces(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids below `size`, without special tokens."""
        texts: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self._added_by_id:
                texts += [self.processor.decode(run), self._added_by_id[index]]
                run = []
            elif index < self.processor.get_piece_size():
                run.append(index)
        text = "".join([*texts, self.processor.decode(run)])
        return text.replace(NEWLINE_PIECE, "\n") if self._has_newline else text

    def content(self, padding: int | None) -> bytes:
        """Return what determines the ids of texts, without a token that is added for padding alone."""
        added = sorted((token, index) for token, index in self.added.items() if index != padding)
        additions = f"{added} {self.lower}" if added or self.lower else ""
        return self.processor.serialized_model_proto() + additions.encode()

    def exact_content(self) -> bytes:
        """Return everything that determines the ids of texts."""
        return self.content(None)

    def id_of(self, piece: str) -> int | None:
        """Return a piece's id, None if there is no such piece."""
        found = self.added.get(piece, self.processor.piece_to_id(piece))
        is_unknown = found == self.unk_id and piece != self.processor.id_to_piece(found)
        return None if is_unknown else found

    def is_special(self, index: int) -> bool:
        """Tell whether an id is a control or added token's, not a piece of texts."""
        is_piece = index < self.processor.get_piece_size()
        return self.processor.is_control(index) if is_piece else index in self._added_by_id

    def _encode_pieces(self, text: str) -> list[int]:
        text = text.lower() if self.lower else text
        try:
            return self.processor.encode(text.replace("\n", NEWLINE_PIECE) if self._has_newline else text)
        except RuntimeError as error:
            raise InputError(f"not a valid text: {text[:40]!r}") from error


class Added(NamedTuple):
    """A token that a base model's folder adds to its tokenizer."""

    id: int
    token: tokenizers.AddedToken


class TokenizersFile:
    """A tokenizer.json, usually byte-level BPE, or GPT-2's two files.

    `added` are tokens that other files of the folder add to it. As in transformers, their `add_prefix_space`, a space
    before the first word of a text, takes precedence over the tokenizer.json's.
    """

    def __init__(self, backend: tokenizers.Tokenizer, added: Mapping[str, Added], settings: Mapping[str, Any]):
        backend.no_truncation()
        backend.no_padding()
        for name, (index, token) in sorted(added.items(), key=lambda item: item[1].id):
            if backend.token_to_id(name) is None:
                (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            if backend.token_to_id(name) != index:
                raise InputError(f"added token {name!r} has id {index} in one file, {backend.token_to_id(name)} here")
        add_prefix_space = settings.get("add_prefix_space")
        if isinstance(backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel) and type(add_prefix_space) is bool:
            backend.pre_tokenizer.add_prefix_space = add_prefix_space
        self.backend = backend
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.is_unigram = isinstance(backend.model, tokenizers.models.Unigram)
        if self.is_unigram:
            self.unk_id = json.loads(backend.to_str())["model"].get("unk_id")
        else:
            unknown = getattr(backend.model, "unk_token", None)
            self.unk_id = None if unknown is None else backend.token_to_id(unknown)

    def encode(self, text: str) -> list[int]:
        """Return a text's ids."""
        try:
            [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)  # without offsets
        except (TypeError, UnicodeError) as error:
            raise InputError(f"not a valid text: {text[:40]!r}") from error
        return encoding.ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, piece: str) -> int | None:
        """Return a piece's id."""
        return self.backend.token_to_id(piece)

    def is_special(self, index: int) -> bool:
        """Tell whether an id is a special token's, not a piece of texts; a file without added tokens does not say."""
        added = self.backend.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special] or added
        return index in special if special else index < self.size

    def content(self, padding: int | None) -> bytes:
        """Return what determines the ids of texts, without a token that is there for padding alone.

        It does not depend on how the file spells it: transformers, for one, saves the same tokenizer differently.
        """
        model = json.loads(self.backend.to_str())["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
        every = self.backend.get_vocab(with_added_tokens=True)
        tokens = {token: index for token, index in every.items() if index != padding or token in model["vocab"]}
        parts = (model.get("vocab"), merges, tokens, self.backend.encode(PROBE, add_special_tokens=False).ids)
        return json.dumps(parts, sort_keys=True).encode()

    def exact_content(self) -> bytes:
        """Return everything that determines the ids of texts: also flags of added tokens, and how texts are split."""
        return self.backend.to_str().encode()


Vocabulary = SentencePiece | TokenizersFile


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
        """Return the text of ids, without special tokens and ids of a padded vocabulary."""
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
    The special tokens' names come from the tokenizer files beside it, or else their ids from config.json or the
    SentencePiece model. A tokenizer without a pad token pads with eos: padding is never read.
    Raises InputError when there is no tokenizer file, or no bos or eos token.
    """
    folder = resolve_folder(dir_or_hub_id, revision)
    settings, special = (_read_settings(folder, file) for file in (TOKENIZER_SETTINGS, SPECIAL_TOKENS))
    settings = special | settings if "added_tokens_decoder" in settings else settings | special  # older ones lack it
    config = _read_settings(folder, BASE_CONFIG)
    names = [*SENTENCEPIECE_FILES, TOKENIZERS_FILE]
    if config.get("model_type") != "gpt_neox":  # whose tokenizer normalises texts first, and has a tokenizer.json
        names.append(VOCAB_FILE)
    path = next((p for name in names if (p := member(folder, name)).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no tokenizer; expected one of {', '.join(names)}")
    if path.name == VOCAB_FILE:
        settings = GPT2_SPECIAL | settings
    vocabulary = _open_vocabulary(path, _added_tokens(folder, settings), settings)

    bos_id, eos_id, pad_id = (_special_id(vocabulary, kind, settings, config) for kind in ("bos", "eos", "pad"))
    if bos_id is None or eos_id is None:
        missing = [name for name, found in (("bos_token", bos_id), ("eos_token", eos_id)) if found is None]
        raise InputError(f"{path}: has no {' and no '.join(missing)}; name the special token in {TOKENIZER_SETTINGS}")
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
            backend = _gpt2(path, settings) if path.name == VOCAB_FILE else tokenizers.Tokenizer.from_file(str(path))
            return TokenizersFile(backend, added, settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # what the library raises is a bare Exception
            raise InputError(f"{path}: not a {path.name} ({error})") from error
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: a path that is not UTF-8
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error
    beyond = {token: index for token, (index, _) in added.items() if index >= processor.get_piece_size()}
    return SentencePiece(processor, beyond, bool(settings.get("do_lower_case", False)))


def _gpt2(vocab: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make GPT-2's tokenizer of its vocabulary and the merges beside it."""
    merges = member(vocab.parent, MERGES_FILE)
    if not merges.is_file():
        raise InputError(f"has no {MERGES_FILE} beside it")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [_content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")]
    backend.add_special_tokens([token for token in special if token and backend.token_to_id(token) is not None])
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
    return {name: Added(index, tokenizers.AddedToken(name, **flags.get(name, {}))) for name, index in ids.items()}


def _special_id(
    vocabulary: Vocabulary, kind: str, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> int | None:
    """Return the id of the bos, eos or pad token: by its name, else config.json's, else the SentencePiece model's.

    config.json counts where it gives a special token: some have another model's ids, which are words here.
    """
    name = _content(settings.get(f"{kind}_token"))
    if isinstance(name, str) and (found := vocabulary.id_of(name)) is not None:
        return found
    given = config.get(f"{kind}_token_id")
    given = given[0] if isinstance(given, list) and given else given  # the first of several that end a text
    if type(given) is int and given >= 0 and vocabulary.is_special(given):
        return given
    own = getattr(vocabulary.processor, f"{kind}_id")() if isinstance(vocabulary, SentencePiece) else -1
    return own if own >= 0 else None


def _content(token: Any) -> Any:
    """Return a token's text, which is given as such or in transformers' {"content": …}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder; empty if there is none."""
    path = member(folder, name)
    return read_object(path) if path.is_file() else {}
