"""The two kinds of vocabulary: SentencePiece models by `sentencepiece`; byte-level BPE and others by `tokenizers`.

SentencePiece models are never rebuilt on another backend: that changes ids (an extra `▁`, byte fallback lost).
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from sentencepiece import SentencePieceProcessor

from convert.errors import InputError, first_line

NEWLINE_PIECE = "<NL>"
TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
"""Properties of an added token in a tokenizer_config.json."""
BYTE_LEVEL_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
"""Values of `tokenizer_class` for which transformers puts no space before a text unless `add_prefix_space` is given."""
PROBE = "Hello, World!  it's 1234 x2.5\n\n  朝の市場は、１２３\nÀ 😃"
"""A text whose ids differ between tokenizers that share a vocabulary but normalise or split differently."""


class SentencePiece:
    """A SentencePiece model, with what a base model's folder adds to it.

    `added` are tokens with ids after the model's, or with the id of a piece that they rename; texts are split at
    them first. Where the vocabulary has the piece `<NL>`, it stands for newlines. With `lower`, everything but added
    tokens is lower-cased.
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
        """Tell whether an id is a control or added token's, not a piece of text."""
        is_piece = index < self.processor.get_piece_size()
        return index in self._added_by_id or (is_piece and self.processor.is_control(index))

    def _encode_pieces(self, text: str) -> list[int]:
        text = text.lower() if self.lower else text
        try:
            return self.processor.encode(text.replace("\n", NEWLINE_PIECE) if self._has_newline else text)
        except RuntimeError as error:
            raise InputError(f"not a valid text: {text[:40]!r}") from error


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of `tokenizers`, which is written in Rust, into InputError: a panic is not an Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"the tokenizer fails ({first_line(error)})") from error


class Added(NamedTuple):
    """A token that a base model's folder adds to its tokenizer."""

    id: int
    flags: dict[str, bool]
    """Those of its properties TOKEN_FLAGS that the folder gives."""


class TokenizersFile:
    """A tokenizer.json, usually byte-level BPE, or GPT-2's two files.

    `added` are tokens that other files of the folder add to it, or name in its vocabulary. As in transformers, their
    `add_prefix_space`, a space before the first word of a text, takes precedence over that of tokenizer.json; if they
    lack it, no space is put where `tokenizer_class` is GPT-2's or GPT-NeoX's, or not given.
    """

    def __init__(self, backend: tokenizers.Tokenizer, added: Mapping[str, Added], settings: Mapping[str, Any]):
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # ids would be random
            backend.model.dropout = None
        _add_tokens(backend, added)
        by_class = False if settings.get("tokenizer_class") in BYTE_LEVEL_CLASSES else None
        add_prefix_space = settings.get("add_prefix_space", by_class)
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
            with panics_as_errors():
                [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)  # without offsets
        except (TypeError, UnicodeError) as error:
            raise InputError(f"not a valid text: {text[:40]!r}") from error
        return encoding.ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        with panics_as_errors():
            return self.backend.decode(ids, skip_special_tokens=True)

    def id_of(self, piece: str) -> int | None:
        """Return a piece's id."""
        return self.backend.token_to_id(piece)

    def is_special(self, index: int) -> bool:
        """Tell whether an id is a special token's, not a piece of text; without added tokens, any id may be one."""
        added = self.backend.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special] or added
        return index in special if special else index < self.size

    def content(self, padding: int | None) -> bytes:
        """Return what determines the ids of texts, without a token that is there for padding alone.

        It does not depend on how the file is written: transformers, for one, saves the same tokenizer differently.
        """
        model = json.loads(self.backend.to_str())["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
        every = self.backend.get_vocab(with_added_tokens=True)
        tokens = {token: index for token, index in every.items() if index != padding or token in model["vocab"]}
        parts = (model.get("vocab"), merges, tokens, self.encode(PROBE))
        return json.dumps(parts, sort_keys=True).encode()

    def exact_content(self) -> bytes:
        """Return everything that determines the ids of texts, even flags of added tokens and how texts are split."""
        return self.backend.to_str().encode()


def _add_tokens(backend: tokenizers.Tokenizer, added: Mapping[str, Added]) -> None:
    """Add the tokens that a tokenizer lacks, or has without the given flags; their ids must be those it gives them."""
    known, missing = backend.get_added_tokens_decoder(), list[tokenizers.AddedToken]()
    for name, (index, flags) in sorted(added.items(), key=lambda item: item[1].id):
        earlier = known.get(index)
        if earlier is not None and earlier.content == name:
            own = {flag: getattr(earlier, flag) for flag in TOKEN_FLAGS}
            if own | flags == own:
                continue
            flags = own | flags
        if backend.token_to_id(name) in (None, index):
            missing.append(tokenizers.AddedToken(name, **flags))
    for special, tokens in itertools.groupby(missing, key=lambda token: token.special):
        (backend.add_special_tokens if special else backend.add_tokens)([*tokens])
    for name, (index, _) in added.items():
        if (found := backend.token_to_id(name)) != index:
            raise InputError(f"added token {name!r} has id {index} in one file, {found} here")


Vocabulary = SentencePiece | TokenizersFile
