"""The four ways in which SentencePiece lies in base models' folders, and tokenizer.json, on random strings."""

import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers

from convert.errors import InputError
from jaxprefix import load_tokenizer
from jaxprefix.vocabularies import TokenizersFile
from tests.base_folders import GOLDEN_BASE, SAMPLE, make_bpe_folder
from tests.tokenizer_folders import changed_backend, sentencepiece_folder

FRAGMENTS = [
    "今日は晴れ。",
    "朝の市場",
    "😃",
    "👨‍👩‍👧",
    "🇯🇵",
    "ABC",
    "Hello, World!",
    "①㈱ｱｲｳ",
    " ",
    "　",
    "\n",
    "\n\n",
    "",
    "é",
    "#x",
    "\t",
    "123",
]
FRAGMENTS += ["IJsselmeer", "STRASSE", "ω≠Ω", "鬱", "한국어", "</s>", "▁"]
# file name, trainer options, tokenizer_config.json, and how the text reaches sentencepiece
LAYOUTS = {
    "unk 0, bos 1, eos 2": (
        "spiece.model",
        {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": False},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
        str,
    ),
    "pad 0, byte fallback": (
        "spm.model",
        {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "byte_fallback": True},
        {},
        str,
    ),
    "lower-cased": (
        "spiece.model",
        {"unk_id": 0, "bos_id": 1, "eos_id": 2, "user_defined_symbols": ["[PAD]"]},
        {"do_lower_case": True, "pad_token": "[PAD]"},
        str.lower,
    ),
    "newline piece": (
        "tokenizer.model",
        {"pad_id": 3, "unk_id": 0, "bos_id": 1, "eos_id": 2, "user_defined_symbols": ["<NL>"], "byte_fallback": True}
        | {"add_dummy_prefix": False},
        {"bos_token": {"content": "<s>"}},
        lambda text: text.replace("\n", "<NL>"),
    ),
}


def texts(seed: int, n: int = 1000) -> list[str]:
    generator = random.Random(seed)
    documents = [json.loads(line)["text"] for line in SAMPLE.read_text().splitlines()]
    sentences = [sentence for document in documents for sentence in document.split("\n")]
    return [
        "".join(generator.choices(FRAGMENTS + generator.sample(sentences, 3), k=generator.randint(1, 9)))
        for _ in range(n)
    ]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """A tokenizer folder, sentencepiece's own processor, and what the folder asks to do to a text first."""
    name, options, settings, prepare = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    documents = [prepare(json.loads(line)["text"]) for line in SAMPLE.read_text().splitlines()]
    with (folder / name).open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            **{"vocab_size": 2000, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False} | options,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / name)), prepare


def test_a_thousand_strings_are_sentencepieces(layout):
    folder, processor, prepare = layout
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (processor.bos_id(), processor.eos_id())
    has_newline = processor.piece_to_id("<NL>") != processor.unk_id()
    for text in texts(seed=1):
        expected = processor.encode(prepare(text))
        assert tokenizer.encode(text) == expected
        decoded = processor.decode(
            [i for i in expected if i not in {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}]
        )
        assert tokenizer.decode(expected) == (decoded.replace("<NL>", "\n") if has_newline else decoded)


def test_newlines_come_back_where_the_vocabulary_has_them(layout):
    folder, processor, _ = layout
    tokenizer = load_tokenizer(folder)
    has_newline = processor.piece_to_id("<NL>") != processor.unk_id()
    assert ("\n" in tokenizer.decode(tokenizer.encode("朝の市場。\n魚屋"))) == has_newline


def test_lower_casing_makes_another_tokenizer(tmp_path):
    sentencepiece_folder(tmp_path)
    plain = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert load_tokenizer(tmp_path).fingerprint != plain.fingerprint


def test_padding_of_a_tokenizer_json_is_not_obeyed(own_bpe, bpe_folder):
    with changed_backend(own_bpe) as backend:
        backend.enable_padding(length=50)
    assert load_tokenizer(own_bpe).encode("Hello") == load_tokenizer(bpe_folder).encode("Hello")


def test_added_tokens_have_ids_behind_the_model(tmp_path):
    named = {"441": {"content": "<end>"}, "1": {"content": "<s>"}}
    sentencepiece_folder(tmp_path, eos_token="<end>", added_tokens_decoder=named)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<chat>": 440, "<chat>2": 442}))
    tokenizer, plain = load_tokenizer(tmp_path), load_tokenizer(GOLDEN_BASE)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (441, 443)
    ids = tokenizer.encode("朝の<chat>2市場<chat>は")
    assert ids == [*plain.encode("朝の"), 442, *plain.encode("市場"), 440, *plain.encode("は")]
    assert tokenizer.decode([*ids, 441, -1, 9999]) == "朝の<chat>2市場<chat>は"


@pytest.mark.parametrize("added", [{"<a>": "x"}, {"<a>": -1}, {"": 440}])
def test_added_tokens_without_an_id_are_refused(tmp_path, added):
    sentencepiece_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(InputError, match="added tokens without a proper id"):
        load_tokenizer(tmp_path)


def test_byte_level_bpe_is_that_of_transformers(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_folder / "tokenizer.json"), additional_special_tokens=["<extra>"]
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 0, 1, None)
    assert tokenizer.vocab_size == len(reference) == 601
    for text in [*texts(seed=2, n=300), "a<extra>b"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(ids) == text.replace("<extra>", "")


def gpt2_folder(bpe_folder, folder, **settings):
    """The same as GPT-2's own two files, without a tokenizer.json."""
    folder.mkdir()
    tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json")).model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "settings", [{}, {"pad_token": "<|padding|>"}, {"add_prefix_space": True, "bos_token": "!"}], ids=str
)
def test_gpt2s_two_files_are_as_transformers_reads_them(bpe_folder, tmp_path, settings):
    folder = gpt2_folder(bpe_folder, tmp_path / "gpt2", **settings)
    tokenizer, reference = load_tokenizer(folder), transformers.GPT2Tokenizer.from_pretrained(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.pad_id == (0 if reference.pad_token_id is None else reference.pad_token_id)
    assert tokenizer.vocab_size == len(reference) == 600
    for text in [*texts(seed=3, n=300), "a<|endoftext|>b<|padding|>c!"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        assert tokenizer.decode(ids) == reference.decode([index for index in ids if index not in special])


def test_gpt2s_two_files_saved_as_one_are_the_same_tokenizer(bpe_folder, tmp_path):
    folder = gpt2_folder(bpe_folder, tmp_path / "gpt2")
    transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path / "saved").fingerprint == load_tokenizer(folder).fingerprint


def test_gpt2s_two_files_must_both_be_there_and_whole(bpe_folder, tmp_path):
    folder = gpt2_folder(bpe_folder, tmp_path / "gpt2")
    (folder / "merges.txt").rename(tmp_path / "merges.txt")
    with pytest.raises(InputError, match=r"vocab.json: has no merges.txt beside it"):
        load_tokenizer(folder)
    (tmp_path / "merges.txt").rename(folder / "merges.txt")
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match=r"vocab.json: not a vocab.json \(.*out of vocabulary"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text('{"a": 0, "a": 1}')
    with pytest.raises(InputError, match=r"vocab.json: .*duplicate key 'a'"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')  # whose tokenizer these files do not describe
    with pytest.raises(InputError, match=r"no tokenizer; expected one of .*, tokenizer.json$"):
        load_tokenizer(folder)


def with_settings(bpe_folder, folder, **settings):
    shutil.copytree(bpe_folder, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_what_tokenizer_config_says_of_added_tokens_counts(bpe_folder, tmp_path):
    flags = {"content": "<extra>", "special": False, "lstrip": True, "rstrip": True}
    tokenizer = with_settings(bpe_folder, tmp_path / "bpe", added_tokens_decoder={"600": flags})
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe")
    for text in ("a<extra>b", "a <extra> b"):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == reference.decode(ids) == "a<extra>b"


@pytest.mark.parametrize("decoder", [{"added_tokens_decoder": {"600": {"content": "<extra>", "special": True}}}, {}])
def test_of_two_files_that_disagree_the_one_that_transformers_follows_counts(own_bpe, decoder):
    settings = {"bos_token": "<|padding|>", "eos_token": "<|padding|>"} | decoder
    (own_bpe / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"} | settings))
    (own_bpe / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer, reference = load_tokenizer(own_bpe), transformers.AutoTokenizer.from_pretrained(own_bpe)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert tokenizer.eos_id == (1 if decoder else 0)


def test_a_space_in_front_of_texts_is_as_tokenizer_config_says(bpe_folder, tmp_path):
    plain, spaced = load_tokenizer(bpe_folder), with_settings(bpe_folder, tmp_path / "bpe", add_prefix_space=True)
    assert spaced.encode("Hello") == plain.encode(" Hello") != plain.encode("Hello")
    assert spaced.fingerprint != plain.fingerprint


def test_a_token_for_padding_alone_makes_no_other_tokenizer(bpe_folder, tmp_path):
    first = with_settings(bpe_folder, tmp_path / "first")
    padding = {"pad_token": "[PAD]", "added_tokens_decoder": {"600": {"content": "[PAD]", "special": True}}}
    second = with_settings(bpe_folder, tmp_path / "second", **padding)
    assert (first.pad_id, second.pad_id) == (1, 600)
    assert first.fingerprint == second.fingerprint
    assert first.encode("a [PAD] b") != second.encode("a [PAD] b")
    assert first.exact_fingerprint != second.exact_fingerprint, "ids of one are not the other's"
    third = with_settings(bpe_folder, tmp_path / "third", **padding | {"pad_token": None})
    assert third.fingerprint != first.fingerprint


def test_a_tokenizer_json_spelled_otherwise_is_the_same(own_bpe, bpe_folder):
    found = load_tokenizer(own_bpe).fingerprint
    assert found == load_tokenizer(bpe_folder).fingerprint
    content = json.loads((own_bpe / "tokenizer.json").read_text())
    pairs = content["model"]["merges"]
    spelled = {
        **content,
        "truncation": None,
        "model": {**content["model"], "merges": [" ".join(pair) for pair in pairs]},
    }
    (own_bpe / "tokenizer.json").write_text(json.dumps(spelled, indent=1))
    assert load_tokenizer(own_bpe).fingerprint == found
    others = ({"model": {**content["model"], "merges": pairs[::-1]}}, {"normalizer": {"type": "Lowercase"}})
    for other in others:
        (own_bpe / "tokenizer.json").write_text(json.dumps(content | other))
        assert load_tokenizer(own_bpe).fingerprint != found


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_added_tokens_that_contradict_the_file_are_refused(own_bpe):
    (own_bpe / "added_tokens.json").write_text(json.dumps({"<extra>": 650}))
    (own_bpe / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="added token '<extra>' has id 650 in one file, 600 here"):
        load_tokenizer(own_bpe)


def test_gaps_between_ids_count():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert TokenizersFile(backend, {}, {}).size == 8


def test_half_a_surrogate_pair_is_refused_in_bpe_too(bpe_folder):
    with pytest.raises(InputError, match="not a valid text"):
        load_tokenizer(bpe_folder).encode("\ud800")


def test_word_and_normalizer_flags_of_added_tokens_count(tmp_path):
    for flags in ({"single_word": True}, {"single_word": False}, {"normalized": True}, {"normalized": False}):
        folder = make_bpe_folder(tmp_path / str(flags))
        with changed_backend(folder) as backend:
            backend.normalizer = tokenizers.normalizers.Lowercase()
        token = {"content": "<Extra>", "special": False, **flags}
        index = backend.get_vocab_size()
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {str(index): token}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer, reference = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("a<Extra>b", "a <Extra> b", "a <extra> b"):
            assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), (flags, text)


def test_a_name_that_gpt2s_two_files_lack_adds_no_token(bpe_folder, tmp_path):
    tokenizer = load_tokenizer(gpt2_folder(bpe_folder, tmp_path / "gpt2", pad_token="[PAD]"))
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (600, tokenizer.eos_id)
