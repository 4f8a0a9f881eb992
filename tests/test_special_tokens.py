"""Which ids begin and end a text: the tokenizer's own names, config.json's ids, SentencePiece's defaults."""

import json

import pytest
import sentencepiece
import tokenizers

from convert.errors import InputError
from jaxprefix import load_tokenizer
from tests.base_folders import SAMPLE
from tests.tokenizer_folders import sentencepiece_folder


def test_of_several_tokens_that_end_a_text_the_first_is_eos(own_bpe):
    (own_bpe / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 0]}))
    assert load_tokenizer(own_bpe).eos_id == 1


def test_a_word_is_no_special_token(own_bpe):
    """Some models' config.json has GPT-2's ids, which are words in a vocabulary of their own."""
    (own_bpe / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 5}))
    with pytest.raises(InputError, match=r"has no eos_token; name the special token in tokenizer_config.json"):
        load_tokenizer(own_bpe)
    (own_bpe / "added_tokens.json").write_text(json.dumps({"    ": 601}))  # as GPT-NeoX's runs of spaces
    (own_bpe / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 601}))
    with pytest.raises(InputError, match="has no eos_token"):
        load_tokenizer(own_bpe)


def test_where_no_added_token_is_special_a_word_is_none_either(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    backend.add_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    for eos_id, found in (2, None), (3, 3):
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": eos_id}))
        if found is None:
            with pytest.raises(InputError, match="has no eos_token"):
                load_tokenizer(tmp_path)
        else:
            assert load_tokenizer(tmp_path).eos_id == found


def test_config_json_knows_better_than_a_sentencepiece_model(tmp_path):
    """Its model has the trainer's bos, 1, also where a base model was trained with eos in its place."""
    sentencepiece_folder(tmp_path)
    for given, expected in (
        ({"bos_token_id": 2, "eos_token_id": 2}, (2, 2)),
        ({"bos_token_id": 7}, (1, 2)),
        ({}, (1, 2)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(given))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 2}))
    assert load_tokenizer(tmp_path).bos_id == 1, "a name in the tokenizer's own files comes first"


def test_config_json_may_name_an_added_token(tmp_path):
    sentencepiece_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": 440}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 440}))
    assert load_tokenizer(tmp_path).eos_id == 440


def test_the_unknown_token_has_its_name_too(tmp_path):
    sentencepiece_folder(tmp_path, pad_token="<unk>")
    assert load_tokenizer(tmp_path).pad_id == 0


def test_a_sentencepiece_model_without_a_special_token(tmp_path):
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text().splitlines()[:50]]
    options = {"vocab_size": 1500, "bos_id": -1, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False}
    with (tmp_path / "spiece.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **options)
    with pytest.raises(InputError, match=r"spiece.model: has no bos_token; name the special token"):
        load_tokenizer(tmp_path)
