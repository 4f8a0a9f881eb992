"""What the repository carries for the demo: documents, prompts and the small base model."""

import json
from pathlib import Path

import pytest

from jaxprefix import load_tokenizer
from jaxprefix.models.config import read_model_config

DATA = Path(__file__).parent.parent / "data"
DOCUMENTS = [json.loads(line)["text"].split("\n") for line in (DATA / "sample_data.jsonl").read_text().splitlines()]
PROMPTS = (DATA / "prompts.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def small_tokenizer():
    return load_tokenizer(DATA / "small_base")


def test_at_least_a_hundred_documents_of_5_to_20_sentences():
    assert len(DOCUMENTS) >= 100
    assert all(5 <= len(sentences) <= 20 for sentences in DOCUMENTS)
    sentences = [sentence for document in DOCUMENTS for sentence in document]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)


def test_prompts_are_not_in_the_training_data():
    text = "\n".join(sentence for sentences in DOCUMENTS for sentence in sentences)
    assert len(set(PROMPTS)) == len(PROMPTS) >= 50
    assert not [prompt for prompt in PROMPTS if prompt in text]


def test_the_small_base_is_small_and_complete(small_tokenizer):
    assert sum(path.stat().st_size for path in (DATA / "small_base").iterdir()) < 10_000_000
    config = read_model_config(DATA / "small_base")
    assert config.vocab_size == small_tokenizer.vocab_size
    assert not config.parallel_residual
    written = json.loads((DATA / "small_base" / "config.json").read_text())
    newer = written["rope_parameters"]["partial_rotary_factor"], written["rope_parameters"]["rope_theta"]
    assert (written["rotary_pct"], written["rotary_emb_base"]) == newer, "transformers 4 reads these"


def test_suffix_and_prompts_are_known_to_the_tokenizer(small_tokenizer):
    unknown = small_tokenizer.unk_id
    assert not [text for text in [*PROMPTS, " 😃"] if unknown in small_tokenizer.encode(text)]
    sentences = [sentence for document in DOCUMENTS for sentence in document]
    assert sum(unknown in small_tokenizer.encode(sentence) for sentence in sentences) < 0.03 * len(sentences)
