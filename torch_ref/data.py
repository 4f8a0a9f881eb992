"""JSON Lines → chunks → padded batches, as the original makes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from torch_ref.tokenizer import Tokenizer

MAX_SEQ_LEN = 64
SUFFIX = " 😃"


class Example(NamedTuple):
    """Token ids; the loss is on the target. `read_chunks` makes no prompts, but `collate` takes them."""

    prompt: list[int]
    target: list[int]


def read_chunks(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of every chunk of a file of documents, in file order."""
    chunks = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            chunks.extend(chunk_document(json.loads(line)["text"], tokenizer))
    return chunks


def chunk_document(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Split a document into chunks of whole sentences with the suffix.

    Quirks: what is left in the buffer at the end is dropped, and a sentence longer than MAX_SEQ_LEN is kept whole.
    """
    chunks, buffer = [], ""
    for sentence in text.split("\n"):
        candidate = buffer + "\n" + sentence + SUFFIX
        if len(tokenizer.encode(candidate)) > MAX_SEQ_LEN:
            if ids := tokenizer.encode(buffer):
                chunks.append(ids)
            buffer = sentence + SUFFIX
        else:
            buffer = candidate
    return chunks


def split_examples(examples: Sequence[Example], n_train: int, n_dev: int) -> tuple[list[Example], list[Example]]:
    """Return the first n_train and the last n_dev examples. Raises ValueError for fewer than both together."""
    if len(examples) < n_train + n_dev:
        raise ValueError(f"{len(examples)} chunks are fewer than {n_train} for training + {n_dev} for evaluation")
    return list(examples[:n_train]), list(examples[-n_dev:])


def collate(examples: Sequence[Example], tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels [rows, longest]: two rows for an example without a prompt, one row for one with."""
    inputs, labels = [], []
    for prompt, target in examples:
        if prompt:
            inputs.append(prompt + target)
            labels.append([tokenizer.pad_id] * (len(prompt) - 1) + target + [tokenizer.eos_id])
        else:
            inputs += [[tokenizer.bos_id, *target], target]
            labels += [[*target, tokenizer.eos_id], [*target[1:], tokenizer.eos_id]]
    return pad(inputs, tokenizer.pad_id), pad(labels, tokenizer.pad_id)


def pad(rows: Sequence[list[int]], pad_id: int) -> torch.Tensor:
    """Pad rows on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
