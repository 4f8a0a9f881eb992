"""JSON Lines → examples: token ids in flat arrays."""

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from convert.errors import InputError
from jaxprefix.data.lines import parse_line, read_lines, string_of
from jaxprefix.recipe import Recipe
from jaxprefix.tokenizer import Tokenizer

SCANNED = 2**24
"""Tokens that are scanned at a time, so that no more of a mapped file is in memory."""
MANY_UNKNOWN = 0.05
"""Share of unknown tokens above which a warning follows: text and base model may be of different languages."""
MANY_CUT = 0.05
"""Share of sentences that were cut above which a warning follows: they may be paragraphs."""
GUESSED_CHARACTERS = 2.0
"""Characters per token, as a first guess, until a document's first chunk has been tokenized."""


class Example(NamedTuple):
    """Token ids; only the target has a loss."""

    prompt: list[int]
    target: list[int]


class Chunking(NamedTuple):
    """How lines become examples."""

    tokenizer: Tokenizer
    suffix: str = " 😃"
    """Appended to every sentence of a document."""
    max_seq_len: int = 64
    """Longest chunk of a document, in tokens."""
    recipe: Recipe = Recipe()
    skip_bad_lines: bool = False
    """Leave bad lines out and count them, instead of refusing the file."""


class Tally(NamedTuple):
    """What was counted while a file's lines became examples."""

    n_lines: int = 0
    """All lines, including blank ones."""
    n_bad: int = 0
    """Lines that were skipped as bad."""
    first_bad: str = ""
    """Line number and fault of the first of them."""
    n_sentences: int = 0
    n_cut: int = 0
    """Sentences that were cut into pieces, since each alone is longer than a chunk may be."""
    n_too_long: int = 0
    """Examples left out, once all lines were counted, because the base model has too few positions for them."""
    first_too_long: int = 0
    """Line number of the first of them."""

    def __add__(self, later: "Tally") -> "Tally":  # type: ignore[override]
        n_bad, first_bad = self.n_bad + later.n_bad, self.first_bad or later.first_bad
        n_sentences, n_cut = self.n_sentences + later.n_sentences, self.n_cut + later.n_cut
        return Tally(self.n_lines + later.n_lines, n_bad, first_bad, n_sentences, n_cut)

    def report(self, path: Path) -> Iterator[str]:
        """Yield lines on what was skipped and on what was cut, if anything was; warn about many cuts."""
        yield from self._skipped(path)
        if self.n_cut:
            cut = f"sentences of more than --max_seq_len tokens: {self.n_cut:,} of {self.n_sentences:,}, cut anywhere"
            advice = "; a prefix learns to end texts there: put newlines behind sentences, or raise --max_seq_len"
            yield cut if self.n_cut <= MANY_CUT * self.n_sentences else f"WARNING: {cut}{advice}"

    def in_error(self, path: Path) -> str:
        """Return the report on what was skipped, to end an error message with; empty if nothing was."""
        return "".join(f"; {line}" for line in self._skipped(path))

    def _skipped(self, path: Path) -> Iterator[str]:
        if self.n_bad:
            yield f"skipped {self.n_bad:,} of {self.n_lines:,} lines of {path}, first: {self.first_bad}"
        if self.n_too_long:
            yield f"skipped {self.n_too_long:,} example(s) of {path} as too long, first: line {self.first_too_long}"


class Examples(Sequence[Example]):
    """Examples in flat arrays, which may be files mapped into memory; a part of them shares the ids."""

    def __init__(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        prompt_lengths: np.ndarray,
        line_numbers: np.ndarray,
        tally: Tally = Tally(),
    ):
        """Take the ids of all examples, prompt before target, and each example's end, prompt length and line number.

        `tally` is that of the whole file, also in a part.
        """
        self._tokens, self._ends, self.prompt_lengths, self.line_numbers = tokens, ends, prompt_lengths, line_numbers
        self.tally = tally
        self._starts = np.concatenate([[0], ends[:-1]])

    @classmethod
    def of_lines(cls, examples: Iterable[tuple[int, Example]]) -> "Examples":
        """Lay examples out end to end; each comes with the number of its line."""
        tokens, ends, prompt_lengths, line_numbers = array("I"), array("Q"), array("I"), array("Q")
        for line_number, (prompt, target) in examples:
            tokens.extend(prompt)
            tokens.extend(target)
            ends.append(len(tokens))
            prompt_lengths.append(len(prompt))
            line_numbers.append(line_number)
        of_each = [np.array(values, np.int64) for values in (ends, prompt_lengths, line_numbers)]
        return cls(np.array(tokens, np.uint32), of_each[0], of_each[1], of_each[2])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "Examples": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice | np.ndarray):
            of_each = self._ends[index], self.prompt_lengths[index], self.line_numbers[index]
            part = Examples(self._tokens, *of_each, self.tally)
            part._starts = self._starts[index]
            return part
        ids = self._tokens[self._starts[index] : self._ends[index]].tolist()
        return Example(ids[: self.prompt_lengths[index]], ids[self.prompt_lengths[index] :])

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The first four arguments of the constructor; meaningless for a part."""
        return self._tokens, self._ends, self.prompt_lengths, self.line_numbers

    def count_of(self, token: int, in_targets: bool = False) -> np.ndarray:
        """Return how often a token occurs in each example, or in its target alone."""
        first, last = (int(self._starts[0]), int(self._ends[-1])) if len(self) else (0, 0)
        blocks = ((start, self._tokens[start : min(start + SCANNED, last)]) for start in range(first, last, SCANNED))
        places = np.concatenate(
            [np.empty(0, int), *(start + np.flatnonzero(block == token) for start, block in blocks)]
        )
        starts = self._starts + self.prompt_lengths if in_targets else self._starts
        return np.searchsorted(places, self._ends) - np.searchsorted(places, starts)

    def report_unknown(self, unk_id: int | None) -> Iterator[str]:
        """Yield how many tokens the tokenizer does not know, if it has an id for them; warn about many."""
        if unk_id is not None:
            unknown, n_tokens = self.count_of(unk_id), (self._ends - self._starts).sum()
            share, n_examples = unknown.sum() / n_tokens, int((unknown > 0).sum())
            found = f"unknown tokens: {unknown.sum():,} ({share:.2%}), in {n_examples:,} examples"
            yield found if share <= MANY_UNKNOWN else f"WARNING: {found}; this base model is made for other text"

    def report_eos(self, eos_id: int) -> Iterator[str]:
        """Yield a warning about targets that hold the end-of-text token, if any do."""
        if n_targets := int((self.count_of(eos_id, in_targets=True) > 0).sum()):
            yield f"WARNING: targets that hold the end-of-text token: {n_targets:,}; generation stops at the first one"

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target."""
        return self._ends - self._starts - self.prompt_lengths


def read_examples(path: Path, chunking: Chunking) -> Examples:
    """Read a JSON Lines file of `text` documents and `prompt` + `completion` pairs, in file order.

    A document becomes chunks of at most max_seq_len tokens. Raises an InputError that names file and line.
    """
    return not_empty(make_examples(read_lines(path), path, 1, chunking), path)


def make_examples(lines: Iterable[bytes], path: Path, first_line: int, chunking: Chunking) -> Examples:
    """Return the examples of consecutive lines of a file, numbered from first_line."""
    tally = Tally()

    def of_each_line() -> Iterator[tuple[int, Example]]:
        nonlocal tally
        for number, line in enumerate(lines, start=first_line):
            where = f"{path}, line {number}"
            try:
                made, of_line = _examples_of(line, where, chunking)
                tally += of_line
                yield from ((number, example) for example in made)
            except InputError as error:
                if not str(error).startswith(where):  # of the tokenizer
                    error = InputError(f"{where}: {error}")
                if not chunking.skip_bad_lines:
                    raise error
                tally += Tally(1, 1, str(error).removeprefix(f"{path}, "))

    examples = Examples.of_lines(of_each_line())
    examples.tally = tally
    return examples


def not_empty(examples: Examples, path: Path) -> Examples:
    """Return a file's examples. Raises InputError if there are none."""
    if not examples:
        report = examples.tally.in_error(path)
        raise InputError(f"{path}: holds no example{report}")
    return examples


def _examples_of(line: bytes, where: str, chunking: Chunking) -> tuple[list[Example], Tally]:
    """Return a line's examples, none for a blank line, and its tally."""
    tokenizer, record = chunking.tokenizer, parse_line(line, where)
    if record is None:
        return [], Tally(1)
    if "text" in record and not record.keys().isdisjoint({"prompt", "completion"}):
        raise InputError(f"{where}: has `text` as well as `prompt` or `completion`: which of them is meant?")
    if "completion" in record and "prompt" in record:
        prompt, completion = (string_of(record, field, where) for field in ("prompt", "completion"))
        if not (target := tokenizer.encode(completion)):
            raise InputError(f"{where}: `completion` is empty")
        return [Example(tokenizer.encode(prompt), target)], Tally(1)
    if "text" in record:
        sentences = string_of(record, "text", where).split("\n")
        chunks, n_cut = chunk_document(sentences, chunking)
        n_sentences = sum(map(bool, map(str.strip, sentences)))
        return [Example([], chunk) for chunk in chunks], Tally(1, n_sentences=n_sentences, n_cut=n_cut)
    raise InputError(f"{where}: has neither `text` nor `prompt` and `completion`")


def chunk_document(sentences: Sequence[str], chunking: Chunking) -> tuple[list[list[int]], int]:
    """Return the token ids of a document's chunks, and how many of its sentences were cut.

    A chunk is as many sentences, with their suffixes, as fit into max_seq_len tokens. A sentence that is longer by
    itself is cut into even pieces, unless the recipe keeps it whole.
    """
    chunks, n_cut = list[list[int]](), 0
    for chunk in _whole_chunks(sentences, chunking):
        if len(chunk) <= chunking.max_seq_len or chunking.recipe.keep_long_sentences:
            chunks.append(chunk)
        else:
            chunks += [piece.tolist() for piece in np.array_split(chunk, -(-len(chunk) // chunking.max_seq_len))]
            n_cut += 1
    return chunks, n_cut


def _whole_chunks(sentences: Sequence[str], chunking: Chunking) -> Iterator[list[int]]:
    """Yield a document's chunks; a sentence that is too long for one is not cut yet.

    A chunk's end is guessed from the characters per token so far, then found by bisection. That tokenizes a few
    candidates; adding sentences one by one, and tokenizing each time, would be quadratic in a chunk's length.
    """
    tokenizer, suffix, max_seq_len, recipe, _ = chunking
    kept = [sentence for sentence in sentences if recipe.keep_blank_sentences or sentence.strip()]
    whole = [(sentence if recipe.keep_line_ends else sentence.rstrip()) + suffix for sentence in kept]
    places = [*itertools.accumulate(map(len, whole), initial=0)]  # index of each sentence's first character
    start, newline, per_token = 0, "\n" if recipe.keep_line_ends else "", GUESSED_CHARACTERS
    while start < len(whole):
        # Sentences start:end fit, start:too_far do not.
        chunk, end, too_far = list[int](), start, len(whole) + 1
        while too_far - end > 1:
            guess = bisect.bisect_right(places, places[start] + per_token * max_seq_len) - 1
            stop = min(max(guess, end + 1), too_far - 1)
            ids = tokenizer.encode(newline + "\n".join(whole[start:stop]))
            per_token = (places[stop] - places[start]) / max(len(ids), 1)
            if len(ids) <= max_seq_len:
                chunk, end = ids, stop
            else:
                too_far = stop
        if end == start and newline:  # as in the original, the newline counts at first, and is then left out
            newline = ""
            continue
        if end == start:  # one sentence alone does not fit
            chunk, end = ids, start + 1
        if chunk and not (end == len(whole) and recipe.drop_document_tails):
            yield chunk
        start, newline = end, ""
