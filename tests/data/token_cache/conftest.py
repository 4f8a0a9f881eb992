import json

import pytest

from jaxprefix.data import token_cache
from jaxprefix.data.examples import make_examples

SENTENCES = ["朝の市場は人でいっぱいだった。", "魚屋の主人が大きな声を出している。", "今日は、暑い。"]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "CACHED_BYTES", 1000)
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 2000)


@pytest.fixture
def data(tmp_path):
    """A file of 120 lines in many ranges: a mark at its start, documents, pairs, blank lines, no newline at its end."""
    lines = []
    for number in range(40):
        lines.append(json.dumps({"text": "\n".join(SENTENCES * (1 + number % 3)) + str(number)}, ensure_ascii=False))
        lines += [json.dumps({"prompt": f"{number}", "completion": SENTENCES[number % 3]}), ""]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode().rstrip())
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Starting processes takes seconds; what is tested here is what becomes of their work."""

    def in_order(path, chunking, *_):
        for block in token_cache._blocks(path):
            yield block.n_bytes, make_examples(block.lines, path, block.first_line, chunking)

    monkeypatch.setattr(token_cache, "_in_order", in_order)
