"""The sentences of generated texts, and how many of them end with the suffix that a prefix was trained for."""

import re
from collections.abc import Iterable

# A sentence ends at its marks, unless a closing bracket follows; then at the bracket, if a space follows that.
# A full stop needs a space after it: 3.5 is no end.
_MARKS, _BRACKETS, _QUOTES = "。！？!?", "」』）)", "\"'”’"
_CLOSING = _MARKS + _BRACKETS + _QUOTES + "."
_NO_WORDS_AT_END = re.compile(rf"[\s{_CLOSING}]+\Z")
AT_MARKS = re.compile(rf"[{_MARKS}]+(?:(?![{_MARKS}{_BRACKETS}])|[{_BRACKETS}]+(?=\s|$))|\.+(?=\s|$)")
"""What ends a sentence within a line, for a tokenizer that turns newlines into spaces."""
NOWHERE = re.compile("(?!)")
"""The same for a tokenizer that keeps newlines: then a sentence is a line, as in training."""


def suffix_rate(texts: Iterable[str], suffix: str, ends: re.Pattern[str] = AT_MARKS) -> dict[str, float | int]:
    """Return {"sentences": their number, "suffix_rate": the share that end with the suffix} over generated texts."""
    n_sentences, n_suffixed = _summed(count_sentences(text, suffix, ends) for text in texts)
    return {"sentences": n_sentences, "suffix_rate": n_suffixed / n_sentences if n_sentences else 0.0}


def count_sentences(text: str, suffix: str, ends: re.Pattern[str] = AT_MARKS) -> tuple[int, int]:
    """Return (sentences, those that end with the suffix) of a text that continues a prompt.

    A sentence ends with its line, at the suffix, or at one of `ends` when the suffix does not follow. An unfinished
    last sentence does not count, nor does the prompt's own if only its end is in the text.
    """
    text, task = text.lstrip(f"{_CLOSING} "), suffix.strip()
    begins = suffix[: suffix.index(task)].lstrip(" ")  # a tokenizer may put one space before every text
    if "\n" in begins:  # then the suffix is on the line after its sentence
        text = text.replace(begins + task, f" {task}")
    *lines, last = text.split("\n")
    counts = [_count_in_line(last, task, ends), *(_count_in_line(f"{line}\n", task, ends) for line in lines)]
    return _summed(counts)


def _count_in_line(line: str, task: str, ends: re.Pattern[str]) -> tuple[int, int]:
    """Count in one line, which ends with its newline unless it is the text's last; `task` is the suffix, stripped."""
    first, *others = line.split(task)
    *pieces, rest = [first, *(piece.lstrip(_MARKS + ".") for piece in others)]  # marks after a suffix end no sentence
    suffixed = list(filter(None, map(_up_to_words, pieces)))
    sentences = ends.split(rest)[: None if rest.endswith("\n") else -1]
    for piece in suffixed:
        sentences += ends.split(piece)[:-1]  # without the one that the suffix ends
    return len(suffixed) + sum(map(bool, map(_up_to_words, sentences))), len(suffixed)


def _up_to_words(piece: str) -> str:
    """Return a piece of a line without the marks and spaces at its end: nothing, if it has no words."""
    return _NO_WORDS_AT_END.sub("", piece)


def _summed(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    n_sentences, n_suffixed = (sum(column) for column in zip(*counts, strict=True))
    return n_sentences, n_suffixed


def without_cut_end(text: str, suffix: str) -> str:
    """Return a text cut off by the length limit, without the end marks of a last sentence whose suffix may be missing.

    Part of the suffix may be there already; part of an emoji is a replacement character.
    """
    task, rest = suffix.strip(" ").rstrip(), text.rstrip(" \ufffd")  # a newline at its beginning counts
    begun = next((n for n in range(len(task) - 1, 0, -1) if rest.endswith(task[:n])), 0)
    rest = rest[: len(rest) - begun].rstrip(" ")
    unfinished = rest.rstrip(_MARKS + _BRACKETS + ".")
    return unfinished if len(unfinished) < len(rest) or "\n" in task[:begun] else text
