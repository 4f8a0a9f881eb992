"""Folders that hold a tokenizer, for tests to make and to change."""

import contextlib
import json
import shutil

import tokenizers

from tests.base_folders import GOLDEN_BASE


def sentencepiece_folder(folder, **settings):
    """The golden base's SentencePiece model; with a tokenizer_config.json if there are settings."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN_BASE / "spiece.model", folder)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@contextlib.contextmanager
def changed_json(path):
    """What a file holds, to change in place."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextlib.contextmanager
def changed_backend(folder):
    """The tokenizer of a tokenizer.json, to change."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    yield backend
    backend.save(str(folder / "tokenizer.json"))
