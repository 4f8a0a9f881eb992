import dataclasses
import gzip
import itertools
import json
import re

import numpy as np
import pytest

import torch_ref.data
from convert.errors import InputError
from jaxprefix.data import lines
from jaxprefix.data.examples import Chunking, Example, chunk_document, read_examples
from jaxprefix.data.rows import label_counts, row_lengths, rows_of
from jaxprefix.recipe import RECIPES, Recipe
from tests.examples import laid_out, write_lines

SUFFIX = " 😃"


LONG = "大きな川の向こうに見える町の灯りは、夜が深くなるにつれて一つまた一つと消えていった。" * 4


def chunks_of(text, tokenizer, recipe=Recipe(), max_seq_len=64):
    return chunk_document(text.split("\n"), Chunking(tokenizer, SUFFIX, max_seq_len, recipe))[0]


def test_default_recipe_keeps_every_sentence_in_order(tokenizer):
    sentences = ["朝の市場は人でいっぱいだった。", "魚を買った。", "昼には塩焼きにして食べた。"] * 4
    text = "".join(tokenizer.decode(chunk) for chunk in chunks_of("\n".join(sentences), tokenizer)).replace(" ", "")
    assert text == "".join(sentence + "😃" for sentence in sentences)


def test_rinna_recipe_drops_the_tail_of_a_document(tokenizer):
    text = "\n".join(["朝の市場は人でいっぱいだった。"] * 5)
    sound = chunks_of(text, tokenizer)
    assert chunks_of(text, tokenizer, RECIPES["rinna"]) == sound[:-1] != sound


def test_long_sentences_are_split_by_default_and_whole_under_rinna(tokenizer):
    pieces = chunks_of(LONG + "\n短い文。", tokenizer)
    whole = tokenizer.encode(LONG + SUFFIX)
    assert max(map(len, pieces)) <= 64 < len(whole)
    assert [*itertools.chain.from_iterable(pieces[:-1])] == whole
    assert min(map(len, pieces[:-1])) > 1, "the suffix must not be left alone"
    assert whole in chunks_of(LONG + "\n短い文。", tokenizer, RECIPES["rinna"])


def test_blank_sentences_are_skipped_by_default(tokenizer):
    assert chunks_of("一つ。\n\n二つ。\n", tokenizer) == chunks_of("一つ。\n二つ。", tokenizer)
    kept = dataclasses.replace(Recipe(), keep_blank_sentences=True)
    assert chunks_of("一つ。\n\n二つ。", tokenizer, kept) != chunks_of("一つ。\n二つ。", tokenizer)


class Bytes:
    """A tokenizer that folds nothing away."""

    def encode(self, text):
        return list(text.encode())


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(), ["a!\nb!", "cccc", "ccc!", "d!"]),
        (Recipe(keep_line_ends=True), ["\na\r!", "b!", "cccc", "ccc!", "d!"]),
    ],
)
def test_a_text_does_not_begin_with_a_newline_by_default(recipe, expected):
    chunking = Chunking(Bytes(), "!", 5, recipe, False)
    chunks, _ = chunk_document(["a\r", "b", "ccccccc", "d"], chunking)
    assert [bytes(chunk).decode() for chunk in chunks] == expected


@pytest.mark.parametrize("recipe", RECIPES.values())
@pytest.mark.parametrize("max_seq_len", [1, 7, 20, 90])
def test_guessed_ends_are_those_that_a_look_after_each_sentence_finds(recipe, max_seq_len):
    """Sentences of all lengths, and of characters of one byte to four: no guess is good for long."""
    random = np.random.default_rng(0)
    letters = np.array(["a", "é", "あ", "🦀", " ", "\r"])
    for _ in range(60):
        sentences = ["".join(random.choice(letters, n)) for n in random.choice([0, 1, 4, 25], 12)]
        chunks, _ = chunk_document(sentences, Chunking(Bytes(), "!", max_seq_len, recipe, False))
        assert chunks == [*slow_chunks(sentences, max_seq_len, recipe)]


def slow_chunks(sentences, max_seq_len, recipe):
    """The original's loop: a look after each sentence."""
    chunk = b""
    for sentence in sentences:
        if not (sentence.strip() or recipe.keep_blank_sentences):
            continue
        sentence = f"{sentence if recipe.keep_line_ends else sentence.rstrip()}!".encode()
        newline = b"\n" if chunk or recipe.keep_line_ends else b""
        if len(chunk + newline + sentence) <= max_seq_len:
            chunk += newline + sentence
            continue
        yield from [list(chunk)] * (chunk != b"")
        chunk = sentence
        if len(chunk) > max_seq_len and not recipe.keep_long_sentences:
            yield from (part.tolist() for part in np.array_split([*chunk], -(-len(chunk) // max_seq_len)))
            chunk = b""
    if chunk and not recipe.drop_document_tails:
        yield list(chunk)


def test_suffix_and_length_are_settings(tokenizer, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "\n".join(["魚を買った。"] * 9)})
    examples = read_examples(path, Chunking(tokenizer, "!!", 20))
    assert all(len(example.target) <= 20 for example in examples)
    assert all("魚を買った。!!" in tokenizer.decode(example.target) for example in examples)


def test_mixed_file(tokenizer, tmp_path):
    path = write_lines(
        tmp_path / "d.jsonl",
        {"prompt": "朝の", "completion": "市場。"},
        {"text": "魚を買った。"},
        {"prompt": "", "completion": "川。"},
    )
    examples = read_examples(path, Chunking(tokenizer))
    assert examples[0] == Example(tokenizer.encode("朝の"), tokenizer.encode("市場。"))
    assert [len(rows_of(example, 1, 2)) for example in examples] == [1, 2, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not a line of JSON"),
        ("[1]", "line 2: expected a JSON object, found list"),
        ('{"body": "a"}', "line 2: has neither `text` nor `prompt` and `completion`"),
        ('{"text": "a", "prompt": "b"}', "line 2: has `text` as well as `prompt` or `completion`"),
        ('{"text": 5}', "line 2: `text` must be a string, found int"),
        ('{"prompt": "a", "completion": ""}', "line 2: `completion` is empty"),
        (r'{"text": "\ud800"}', "line 2: `text` holds an unpaired surrogate"),
        ('{"n": ' + "1" * 5000 + "}", "line 2: not a line of JSON"),
        ("[" * 200_000, "line 2: not a line of JSON"),
        (b'{"text": "\xff"}', "line 2: not a line of JSON in UTF-8"),
        (b'\xef\xbb\xbf{"text": "a"}', "line 2: not a line of JSON in UTF-8"),
        (b'{"text": "a\0b"}', "line 2: holds NUL bytes"),
        ('{"text": "a"}'.encode("utf-16-le"), "line 2: holds NUL bytes; the file must be UTF-8 text"),
        ('{"text": "a", "text": "b"}', r"line 2: not a line of JSON in UTF-8 \(duplicate key 'text'\)"),
        ('{"text": "a", "of": {"b": 1, "b": 2}}', "line 2: .*duplicate key 'b'"),
        (f'{{"text": "{"a" * 2000}"}}', "line 2: is longer than 1,000 bytes; split the document"),
    ],
)
def test_bad_line_is_named_or_skipped(tokenizer, tmp_path, monkeypatch, line, message):
    if "longer" in message:
        monkeypatch.setattr(lines, "LINE_BYTES", 1000)
    path = tmp_path / "d.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n\n{"text": "b"}\n' + line)
    with pytest.raises(InputError, match=f"^{path}, {message}"):
        read_examples(path, Chunking(tokenizer))
    found = read_examples(path, Chunking(tokenizer, skip_bad_lines=True))
    good = write_lines(tmp_path / "good.jsonl", {"text": "a"}, {"text": "b"})
    assert list(found) == list(read_examples(good, Chunking(tokenizer)))
    assert found.line_numbers.tolist() == [1, 4]
    (report,) = found.tally.report(path)
    assert re.match(f"skipped 2 of 5 lines of {path}, first: {message}", report)


def test_a_file_of_bad_lines_only_tells_the_first(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text("{\n[]\n")
    with pytest.raises(InputError, match=r"holds no example; skipped 2 of 2 lines of .*, first: line 1: not a line of"):
        read_examples(tmp_path / "d.jsonl", Chunking(tokenizer, skip_bad_lines=True))


FAMILY = "👨‍👩‍👧‍👦"


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_encodings_of_the_same_lines(tokenizer, tmp_path, escaped, end, packed, mark):
    records = [{"prompt": "朝の", "completion": f"市場{FAMILY}。"}, {"text": f"魚{FAMILY}\n川"}]
    text = "".join(json.dumps(record, ensure_ascii=escaped) + end for record in records)
    path = tmp_path / ("d.jsonl.gz" if packed else "d.jsonl")
    path.write_bytes(gzip.compress(mark + text.encode()) if packed else mark + text.encode())
    found = read_examples(path, Chunking(tokenizer))
    assert found[0] == Example(tokenizer.encode("朝の"), tokenizer.encode(f"市場{FAMILY}。"))
    assert found[1].target == tokenizer.encode(f"\n魚{FAMILY}{SUFFIX}\n川{SUFFIX}")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_told_as_such(tokenizer, tmp_path, encoding):
    (tmp_path / "d.jsonl").write_bytes('\ufeff{"text": "a"}\n'.encode(encoding))
    with pytest.raises(InputError, match="is UTF-16; save it as UTF-8"):
        read_examples(tmp_path / "d.jsonl", Chunking(tokenizer, skip_bad_lines=True))


def test_a_damaged_gzip_file(tokenizer, tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 10)
    for content in (whole[:-9], b"{}", whole[:20] + b"\xff" * 20):
        (tmp_path / "d.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match="not a valid gzip file"):
            read_examples(tmp_path / "d.jsonl.gz", Chunking(tokenizer, skip_bad_lines=True))


def test_a_missing_file_and_a_folder(tokenizer, tmp_path):
    for path, message in ((tmp_path, "is a folder or a pipe"), (tmp_path / "d.jsonl", "no such data file")):
        with pytest.raises(InputError, match=message):
            read_examples(path, Chunking(tokenizer))


def test_file_without_examples_is_an_error(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no example"):
        read_examples(tmp_path / "d.jsonl", Chunking(tokenizer))


def test_prompt_and_completion_are_encoded_apart(tokenizer, tmp_path):
    """Together they would join at the seam, where generating has a prompt alone."""
    prompt, completion = "朝", "の市場。"
    assert tokenizer.encode(prompt + completion) != tokenizer.encode(prompt) + tokenizer.encode(completion)
    path = write_lines(tmp_path / "d.jsonl", {"prompt": prompt, "completion": completion})
    assert [*read_examples(path, Chunking(tokenizer))] == [
        Example(tokenizer.encode(prompt), tokenizer.encode(completion))
    ]


def test_rinna_chunks_blank_lines_and_carriage_returns_as_the_original(monkeypatch):
    text = "a\r\n\nb\r\n\n\nccccccc\nd\n"
    monkeypatch.setattr("torch_ref.data.SUFFIX", "!")
    monkeypatch.setattr("torch_ref.data.MAX_SEQ_LEN", 8)
    expected = torch_ref.data.chunk_document(text, Bytes())
    assert expected
    assert chunk_document(text.split("\n"), Chunking(Bytes(), "!", 8, RECIPES["rinna"]))[0] == expected


def test_tokens_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr("jaxprefix.data.examples.SCANNED", 3)
    examples = laid_out([Example([7], [1, 7, 7]), Example([], [2, 3, 7]), Example([7, 7], [7])])
    assert examples.count_of(7).tolist() == [3, 1, 3]
    assert examples[1:].count_of(7).tolist() == [1, 3]


def test_examples_are_a_sequence_with_views_for_slices():
    listed = [Example([1, 2], [3]), Example([], [4, 5, 6]), Example([7], [8, 9])]
    examples = laid_out(listed)
    assert [*examples] == listed
    assert [*examples[1:]] == listed[1:]
    assert [*examples[-2:][1:]] == listed[2:]
    assert examples[-1] == listed[-1]
    for part, expected in ((examples, listed), (examples[1:], listed[1:])):
        np.testing.assert_array_equal(row_lengths(part), row_lengths(expected))
        np.testing.assert_array_equal(label_counts(part), label_counts(expected))
        assert row_lengths(part).max() == row_lengths(expected).max()
    np.testing.assert_array_equal(laid_out([Example([4], [4, 1]), Example([], [4])]).count_of(4), [2, 1])


def test_lines_of_spaces_are_blank(tokenizer):
    assert chunks_of("一つ。\n \u3000\t\r\n二つ。", tokenizer) == chunks_of("一つ。\n二つ。", tokenizer)


def test_white_space_at_a_lines_end_is_left_out():
    """A suffix behind it would be other tokens than behind a sentence."""
    assert [bytes(chunk) for chunk in chunk_document(["a \r", " b"], Chunking(Bytes(), "!"))[0]] == [b"a!\n b!"]


def test_sentences_that_are_cut_are_counted_and_many_are_warned_of(tmp_path):
    def report(n_long, recipe=Recipe()):
        texts = ["\n".join(["abcdefg"] * n_long), "\n".join(["ab"] * (100 - n_long))]
        path = write_lines(tmp_path / "d.jsonl", *({"text": text} for text in texts))
        return list(read_examples(path, Chunking(Bytes(), "!", 5, recipe))[:1].tally.report(path))

    assert report(0) == report(6, Recipe(keep_long_sentences=True)) == []
    assert report(5) == ["sentences of more than --max_seq_len tokens: 5 of 100, cut anywhere"]
    advice = "a prefix learns to end texts there: put newlines behind sentences, or raise --max_seq_len"
    assert report(6) == [f"WARNING: sentences of more than --max_seq_len tokens: 6 of 100, cut anywhere; {advice}"]


def test_an_end_of_text_in_a_prompt_ends_no_target():
    assert list(laid_out([Example([2], [5])]).report_eos(2)) == []
    assert len(list(laid_out([Example([2], [5, 2])]).report_eos(2))) == 1


def test_blank_lines_are_no_sentences_that_could_be_cut(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "abcdefg\n\n \nab\n"})
    [told] = read_examples(path, Chunking(Bytes(), "!", 5)).tally.report(path)
    assert "1 of 2, cut anywhere" in told
