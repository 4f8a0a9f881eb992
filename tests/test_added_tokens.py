"""Tokens that a base model's folder adds to its vocabulary, or marks in it: which files tell of them, and how."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

from convert.errors import InputError
from jaxprefix import load_tokenizer
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.vocabularies import BYTE_LEVEL_CLASSES
from tests.base_folders import GOLDEN_BASE, make_bpe_folder
from tests.tokenizer_folders import changed_backend, changed_json, sentencepiece_folder

USER = "<|user|>"
TEXTS = (f"a{USER}b", f"a {USER} b", USER, "朝<mask>の")


def test_a_piece_can_be_renamed(tmp_path):
    """As reserved pieces are, by those who tune a model further."""
    renamed = {"100": {"content": "<|im_start|>"}, "101": {"content": "<|im_end|>"}, "1": {"content": "<s>"}}
    folder = sentencepiece_folder(tmp_path / "renamed", eos_token="<|im_end|>", added_tokens_decoder=renamed)
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(GOLDEN_BASE)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 101, 440)
    ids = tokenizer.encode("朝の<|im_start|>市場<|im_end|><s>")
    assert ids == [*plain.encode("朝の"), 100, *plain.encode("市場"), 101, *plain.encode("<s>")]
    assert tokenizer.decode(ids[:-1]) == "朝の<|im_start|>市場"
    assert tokenizer.fingerprint != plain.fingerprint


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_a_named_token_that_no_file_has_is_refused(tmp_path, file):
    """SentencePiece's own eos would be another one: texts would never end where the base model ends them."""
    folder = sentencepiece_folder(tmp_path / "base") if file == "spiece.model" else make_bpe_folder(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 2000}))
    with pytest.raises(InputError, match=rf"{file}: has no eos_token \('<\|im_end\|>': neither in it nor in added_tok"):
        load_tokenizer(folder)


@pytest.fixture
def vocabulary(tmp_path):
    """A byte-level tokenizer.json whose vocabulary has tokens that its `added_tokens` lack, and GPT-2's two files."""
    backend = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", USER, "<mask>"]
    backend.train_from_iterator(["今日は晴れ。"] * 9, vocab_size=300, special_tokens=special)
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    backend.save_model(str(folder))
    backend.save(str(folder / "tokenizer.json"))
    with changed_json(folder / "tokenizer.json") as content:
        content["added_tokens"] = content["added_tokens"][:1]
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0}))
    return folder


def described(index, **flags):
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(index): {"content": {0: "<|endoftext|>", 1: USER, 2: "<mask>"}[index], "special": True} | off | flags}


TELLING = {
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": described(0) | described(1) | described(2)}},
    "flags": {"tokenizer_config.json": {"added_tokens_decoder": described(0) | described(1, lstrip=True, rstrip=True)}},
    "ids": {"added_tokens.json": {USER: 1}},
}
TELLING_OF_TWO_FILES = {
    **TELLING,
    "names": {"special_tokens_map.json": {"additional_special_tokens": [USER], "mask_token": "<mask>"}},
}


@pytest.mark.parametrize(
    ("kept", "files"),
    [("tokenizer.json", files) for files in TELLING.values()]
    + [("vocab.json", files) for files in TELLING_OF_TWO_FILES.values()],
    ids=[*TELLING, *(f"two files, {name}" for name in TELLING_OF_TWO_FILES)],
)
def test_tokens_of_the_vocabulary_that_other_files_name_are_tokens(vocabulary, kept, files):
    if kept == "vocab.json":
        (vocabulary / "tokenizer.json").unlink()
    for name, content in files.items():
        (vocabulary / name).write_text(json.dumps(content))
    tokenizer, reference = load_tokenizer(vocabulary), transformers.GPT2Tokenizer.from_pretrained(vocabulary)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert 1 in tokenizer.encode(TEXTS[0])


def test_flags_in_tokenizer_config_come_before_those_of_the_file(own_bpe):
    with changed_backend(own_bpe) as backend:
        backend.add_special_tokens([USER])
    plain = backend.encode(f"a {USER} b").ids
    described_so = {"content": USER, "special": True, "lstrip": True, "rstrip": True}
    with changed_json(own_bpe / "tokenizer_config.json") as settings:
        settings["added_tokens_decoder"] = {str(backend.token_to_id(USER)): described_so}
    found = load_tokenizer(own_bpe).encode(f"a {USER} b")
    assert found == transformers.AutoTokenizer.from_pretrained(own_bpe).encode(f"a {USER} b", add_special_tokens=False)
    assert len(found) < len(plain)


@pytest.mark.parametrize("name", [*BYTE_LEVEL_CLASSES, "PreTrainedTokenizerFast"])
def test_a_space_before_texts_goes_by_the_class_where_no_setting_says(tmp_path, name):
    """`tokenizers` puts one unless it is told not to; GPT-2's and GPT-NeoX's classes do not."""
    folder = make_bpe_folder(tmp_path / "bpe")
    plain = load_tokenizer(folder)
    with changed_backend(folder) as backend:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    (folder / "tokenizer_config.json").write_text(json.dumps({} if name is None else {"tokenizer_class": name}))
    spaced = name == "PreTrainedTokenizerFast"
    assert load_tokenizer(folder).encode("晴れ") == plain.encode(" 晴れ" if spaced else "晴れ")
    if name is not None:  # config.json may say it instead
        with changed_json(folder / "config.json") as config:
            config["tokenizer_class"] = name
        (folder / "tokenizer_config.json").unlink()
        assert load_tokenizer(folder).encode("晴れ") == plain.encode(" 晴れ" if spaced else "晴れ")
    if not spaced:
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        assert reference.encode("晴れ", add_special_tokens=False) == plain.encode("晴れ")


def test_ids_are_not_random(own_bpe, bpe_folder):
    """BPE's dropout, which a file may have from training its model, is off."""
    with changed_json(own_bpe / "tokenizer.json") as content:
        content["model"]["dropout"] = 0.5
    text = "今日は晴れ。朝の市場"
    backend = tokenizers.Tokenizer.from_file(str(own_bpe / "tokenizer.json"))
    assert len({tuple(backend.encode(text).ids) for _ in range(20)}) > 1
    tokenizer = load_tokenizer(own_bpe)
    assert {tuple(tokenizer.encode(text)) for _ in range(20)} == {tuple(load_tokenizer(bpe_folder).encode(text))}


def panicking(folder):
    """A tokenizer at which the library panics for some texts."""
    tokenizer = load_tokenizer(folder)
    tokenizer.vocabulary.backend.normalizer = normalizers.Strip()
    tokenizer.vocabulary.backend.add_tokens([tokenizers.AddedToken("\n", normalized=True)])
    return tokenizer


def test_a_panic_of_the_library_is_an_error(own_bpe, bpe_folder):
    with pytest.raises(InputError, match="the tokenizer fails"):
        panicking(bpe_folder).encode("À\n")
    with changed_json(own_bpe / "tokenizer.json") as content:
        content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    with pytest.raises(InputError, match=rf"{own_bpe}/tokenizer.json: the tokenizer fails \(Precompiled"):
        load_tokenizer(own_bpe)


def test_ids_between_added_tokens_leave_no_trace(tmp_path):
    folder = sentencepiece_folder(tmp_path / "base")
    (folder / "added_tokens.json").write_text(json.dumps({"<chat>": 445}))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("朝の市場は")
    assert tokenizer.decode([*ids, 440, 444]) == tokenizer.decode(ids)


def test_a_token_may_be_special_in_tokenizer_config_alone(own_bpe):
    with changed_backend(own_bpe) as backend:
        backend.add_tokens([tokenizers.AddedToken(USER, normalized=False)])
    token = {"content": USER, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    decoder = {str(backend.token_to_id(USER)): token}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    (own_bpe / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(own_bpe)
    assert tokenizer.decode(tokenizer.encode(f"a{USER}b")) == "ab"


def test_added_tokens_stand_as_they_are_where_the_rest_is_lower_cased(tmp_path):
    folder = sentencepiece_folder(tmp_path / "base", do_lower_case=True)
    (folder / "added_tokens.json").write_text(json.dumps({"<CHAT>": 440}))
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(GOLDEN_BASE)
    assert tokenizer.encode("AB<CHAT>C") == [*plain.encode("ab"), 440, *plain.encode("c")]


def test_an_added_token_whose_id_is_no_number(tmp_path):
    folder = sentencepiece_folder(tmp_path / "base", added_tokens_decoder={"x": {"content": "<a>"}})
    with pytest.raises(InputError, match=r"added tokens without a proper id: {'<a>': 'x'}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("token", [USER, {"content": USER}, {"content": USER, "rstrip": True}])
def test_flags_that_tokenizer_config_does_not_give_stay(vocabulary, token):
    listed = {"id": 1, "content": USER, "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    with changed_json(vocabulary / "tokenizer.json") as content:
        content["added_tokens"].append(listed | {"special": True})
    (vocabulary / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"1": token}}))
    backend = load_tokenizer(vocabulary).vocabulary.backend
    found = backend.get_added_tokens_decoder()[1]
    assert (found.special, found.lstrip, found.normalized) == (True, True, False)
    assert found.rstrip == ("rstrip" in token)


def test_where_a_named_eos_is_unknown_config_jsons_id_counts(tmp_path):
    folder = sentencepiece_folder(tmp_path / "base", eos_token="<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_tokenizer(folder).eos_id == 3


@pytest.mark.parametrize("skipping", [False, True])
def test_a_line_at_which_the_library_panics_is_named(bpe_folder, tmp_path, skipping):
    tokenizer, path = panicking(bpe_folder), tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "completion": "a"}) for text in ("a", "À\n", "b")))
    if skipping:
        examples = read_examples(path, Chunking(tokenizer, skip_bad_lines=True))
        assert examples.line_numbers.tolist() == [1, 3]
        assert examples.tally.first_bad.startswith("line 2: the tokenizer fails")
    else:
        with pytest.raises(InputError, match=f"^{path}, line 2: the tokenizer fails"):
            read_examples(path, Chunking(tokenizer))
