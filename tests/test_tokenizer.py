import json

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel

from convert.errors import InputError
from jaxprefix import load_tokenizer
from jaxprefix.models import fingerprint
from jaxprefix.models.config import read_model_config
from tests.base_folders import GOLDEN_BASE, make_bpe_folder
from tests.tokenizer_folders import sentencepiece_folder

TEXTS = ["朝の市場は", " 先頭の空白", "改行\nを含む", "全角 空白", "😃😃", "", "ABC 123", "①株式会社ｱｲｳ"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_sentencepiece(tokenizer, text):
    processor = SentencePieceProcessor(model_file=str(GOLDEN_BASE / "spiece.model"))
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))


def test_special_ids_come_from_the_tokenizer_files(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 3, 0)


def test_special_tokens_may_be_objects_or_missing(tmp_path):
    renamed = load_tokenizer(sentencepiece_folder(tmp_path / "a", bos_token={"content": "[CLS]"}))
    assert (renamed.bos_id, renamed.eos_id) == (4, 2)
    assert load_tokenizer(sentencepiece_folder(tmp_path / "b")).bos_id == 1


def test_fingerprint_is_of_the_vocabulary(tokenizer, tmp_path):
    assert load_tokenizer(sentencepiece_folder(tmp_path / "a")).fingerprint == tokenizer.fingerprint


def test_ids_beyond_the_tokenizer_leave_no_trace(tokenizer):
    """Models pad their vocabulary; an untrained row of it may be sampled."""
    ids = tokenizer.encode("朝の市場は")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 5]) == tokenizer.decode(ids)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match="not a valid text"):
        tokenizer.encode("\ud800")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer; expected one of spiece.model, spm.model, tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"spiece.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    folder = (tmp_path / "\udce9").absolute()  # a byte that is not UTF-8
    sentencepiece_folder(folder)
    with pytest.raises(InputError, match=r"spiece.model: not a SentencePiece model"):
        load_tokenizer(folder)


def test_a_tokenizer_without_bos_and_eos(tmp_path):
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer.json: has no bos_token and no eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object")])
def test_settings_that_are_no_object(tmp_path, content, message):
    folder = sentencepiece_folder(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=f"tokenizer_config.json: {message}"):
        load_tokenizer(folder)


def unigram_folder(folder, pieces, unk_id):
    """A SentencePiece model as a tokenizer.json, as transformers 5 saves it."""
    folder.mkdir()
    model = Unigram([(piece, -1.0) for piece in pieces], unk_id=unk_id)
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


def test_a_unigram_models_unknown_token_is_known(tmp_path):
    tokenizer = load_tokenizer(unigram_folder(tmp_path / "base", ["<unk>", "<s>", "</s>", "朝"], unk_id=0))
    assert tokenizer.unk_id == 0
    assert tokenizer.encode("朝鬱") == [3, 0]


def test_a_unigram_model_whose_unknown_token_ends_texts_is_refused(tmp_path):
    """transformers 5 rebuilds rinna's so: `<unk>` is 0 in its model, and eos, 2, in T5's."""
    folder = unigram_folder(tmp_path / "base", ["<unk>", "<s>", "</s>", "朝"], unk_id=2)
    with pytest.raises(InputError, match=r"turns unknown text into '</s>', .* put that model beside it"):
        load_tokenizer(folder)


def test_a_unigram_model_may_pad_with_its_unknown_token_and_must_have_one(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "朝"]
    padded = unigram_folder(tmp_path / "padded", pieces, unk_id=0)
    (padded / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>"}))
    assert load_tokenizer(padded).pad_id == 0
    with pytest.raises(InputError, match="defines no unknown token"):
        load_tokenizer(unigram_folder(tmp_path / "none", pieces, unk_id=None))


def test_special_tokens_leave_no_trace(tokenizer):
    ids = tokenizer.encode("朝の市場は")
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode([*ids, *special]) == tokenizer.decode(ids) == "朝の市場は"


def test_a_token_for_padding_leaves_no_trace(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path / "a", pad_token="朝"))
    assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode("市場")]) == "市場"


def test_prefixes_of_earlier_versions_know_their_tokenizer(tokenizer):
    assert tokenizer.fingerprint == "f84676f3d8cb9adb"


def test_runs_of_earlier_versions_know_their_base():
    of_numbers = "3e9bd4cffaf2b73d72f0aa0cfbf74c44cfd40024c94e389c58bf80b3c672832b"
    assert fingerprint(GOLDEN_BASE, read_model_config(GOLDEN_BASE)) == of_numbers


def test_other_settings_of_the_byte_level_stay(tmp_path):
    folder = make_bpe_folder(tmp_path / "bpe")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.model = tokenizers.models.BPE({"a": 0, "!": 1, "a!": 2, "Ġ": 3}, [("a", "!")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_prefix_space": True, "bos_token": "a", "eos_token": "a"})
    )
    assert load_tokenizer(folder).encode("a!") == [3, 2], "in one piece"
