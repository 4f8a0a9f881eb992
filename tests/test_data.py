import dataclasses
import errno
import gzip
import itertools
import json
import re

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix import lines
from jaxprefix.data import (
    IGNORED,
    PackedShape,
    UpdatePlan,
    fitting_shape,
    longest_row,
    make_batch,
    make_packed_batch,
    n_labels,
    n_tokens,
    pack_rows,
    packed_shapes,
    rows_of,
    split_examples,
)
from jaxprefix.examples import Chunking, Example, chunk_document, read_examples
from jaxprefix.recipe import RECIPES, Recipe

SUFFIX = " 😃"
LONG = "大きな川の向こうに見える町の灯りは、夜が深くなるにつれて一つまた一つと消えていった。" * 4


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def chunks_of(text, tokenizer, recipe=Recipe(), max_seq_len=64):
    return list(chunk_document(text.split("\n"), Chunking(tokenizer, SUFFIX, max_seq_len, recipe)))


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
    assert flat(pieces[:-1]) == whole
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
        (Recipe(keep_line_ends=True), ["\na\r!", "b!", "cccc", "ccc!", "\nd!"]),
    ],
)
def test_a_text_does_not_begin_with_a_newline_by_default(recipe, expected):
    chunking = Chunking(Bytes(), "!", 5, recipe, False)
    chunks = chunk_document(["a\r", "b", "ccccccc", "d"], chunking)
    assert [bytes(chunk).decode() for chunk in chunks] == expected


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


def test_rows_of_an_example_without_prompt():
    assert rows_of(Example([], [10, 11, 12]), 1, 2) == [
        ([1, 10, 11, 12], [10, 11, 12, 2]),
        ([10, 11, 12], [11, 12, 2]),
    ]


def test_loss_of_a_prompt_is_on_the_completion_only():
    ((inputs, labels),) = rows_of(Example([7, 8, 9], [10, 11]), 1, 2)
    assert inputs == [7, 8, 9, 10, 11]
    assert labels == [IGNORED, IGNORED, 10, 11, 2]


@pytest.mark.parametrize("example", [Example([], [10, 11]), Example([7, 8], [10, 11, 12])])
def test_counts_agree_with_the_rows(example):
    rows = rows_of(example, 1, 2)
    assert n_labels([example])[0] == sum(label != IGNORED for _, labels in rows for label in labels)
    assert longest_row([example]) == max(len(inputs) for inputs, _ in rows)


def test_batch_is_padded_right_and_below(tokenizer):
    batch = make_batch([Example([], [10, 11])], tokenizer, n_rows=4, n_columns=5)
    pad = tokenizer.pad_id
    assert batch.tokens.tolist() == [[1, 10, 11, pad, pad], [10, 11, pad, pad, pad], [pad] * 5, [pad] * 5]
    assert (batch.labels == IGNORED).sum() == 20 - 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not a line of JSON"),
        ("[1]", "line 2: expected a JSON object, found list"),
        ('{"body": "a"}', "line 2: has neither `text` nor `prompt` and `completion`"),
        ('{"text": "a", "prompt": "b"}', "line 2: has `text` as well as `prompt` or `completion`"),
        ('{"text": 5}', "line 2: `text` must be a string, found int"),
        ('{"prompt": "a", "completion": ""}', "line 2: `completion` is empty"),
        (r'{"text": "\ud800"}', "line 2: `text` holds half a surrogate pair"),
        ('{"n": ' + "1" * 5000 + "}", "line 2: not a line of JSON"),
        ("[" * 200_000, "line 2: not a line of JSON"),
        (b'{"text": "\xff"}', "line 2: not a line of JSON in UTF-8"),
        (b'\xef\xbb\xbf{"text": "a"}', "line 2: not a line of JSON in UTF-8"),
        (b'{"text": "a\0b"}', "line 2: holds NUL bytes"),
        ('{"text": "a"}'.encode("utf-16-le"), "line 2: holds NUL bytes; the file must be UTF-8 text"),
        ('{"text": "a", "text": "b"}', r"line 2: not a line of JSON in UTF-8 \(the key 'text' stands twice\)"),
        ('{"text": "a", "of": {"b": 1, "b": 2}}', "line 2: .*the key 'b' stands twice"),
        (f'{{"text": "{"a" * 2000}"}}', "line 2: is longer than 1,000 bytes; split the document"),
    ],
)
def test_bad_line_is_named_or_skipped(tokenizer, tmp_path, monkeypatch, line, message):
    if "longer" in message:
        monkeypatch.setattr(lines, "LINE_BYTES", 1000)
        monkeypatch.setattr("jaxprefix.examples.LINE_BYTES", 1000)
    path = tmp_path / "d.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n\n{"text": "b"}\n' + line)
    with pytest.raises(InputError, match=f"^{path}, {message}"):
        read_examples(path, Chunking(tokenizer))
    found = read_examples(path, Chunking(tokenizer, skip_bad_lines=True))
    good = write_lines(tmp_path / "good.jsonl", {"text": "a"}, {"text": "b"})
    assert list(found) == list(read_examples(good, Chunking(tokenizer)))
    (report,) = found.skipped.report(path)
    assert re.match(f"skipped 2 of 5 lines of {path}, first: {message}", report)


def test_a_file_of_bad_lines_only_tells_the_first(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text("{\n[]\n")
    with pytest.raises(InputError, match=r"holds no example; skipped 2 of 2 lines of .*, first: line 1: not a line of"):
        read_examples(tmp_path / "d.jsonl", Chunking(tokenizer, skip_bad_lines=True))


FAMILY = "👨‍👩‍👧‍👦"


def test_a_mark_before_an_overlong_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_BYTES", 100)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"a" * 101 + b"\nsecond\n")
    assert list(lines.read_lines(path)) == [b"a" * 101, b"second\n"]


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


def test_a_line_is_read_no_further_than_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_BYTES", 1000)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"a" * 999 + b"\n" + b"b" * 1000 + b"\n" + b"c" * 5000 + b"\nd\n" + b"e" * 1000)
    assert [(line[:1], len(line)) for line in lines.read_lines(path)] == [
        (b"a", 1000),
        (b"b", 1001),
        (b"c", 1001),
        (b"d", 2),
        (b"e", 1000),
    ]


@pytest.mark.parametrize("change", ["append", "replace", "delete"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = write_lines(tmp_path / "d.jsonl", *[{"text": "a"}] * 3)
    found = lines.read_lines(path)
    next(found)
    if change == "append":
        with path.open("a") as file:
            file.write("\n")
    elif change == "replace":
        write_lines(tmp_path / "other", *[{"text": "b"}] * 3).replace(path)
    else:
        path.unlink()
    with pytest.raises(InputError, match="changed while it was read; copy it"):
        list(found)


def test_a_damaged_gzip_file(tokenizer, tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 10)
    for content in (whole[:-9], b"{}", whole[:20] + b"\xff" * 20):
        (tmp_path / "d.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match="not a whole gzip file"):
            read_examples(tmp_path / "d.jsonl.gz", Chunking(tokenizer, skip_bad_lines=True))


def test_a_missing_file_and_a_folder(tokenizer, tmp_path):
    for path, message in ((tmp_path, "is a folder or a pipe"), (tmp_path / "d.jsonl", "no such data file")):
        with pytest.raises(InputError, match=message):
            read_examples(path, Chunking(tokenizer))


def test_file_without_examples_is_an_error(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no example"):
        read_examples(tmp_path / "d.jsonl", Chunking(tokenizer))


def test_split_takes_both_ends(tmp_path):
    examples = [Example([], [i]) for i in range(10)]
    assert split_examples(examples, 6, 3, tmp_path) == (examples[:6], examples[7:])
    with pytest.raises(InputError, match="makes 10 examples"):
        split_examples(examples, 8, 3, tmp_path)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def seen_in(plan, first, last):
    """The examples that updates first … last − 1 see, in order."""
    return flat(flat(plan.micro_batches(update)) for update in range(first, last))


def make_plan(carry, n_accum_steps=3, n_training_steps=1000, n_epochs=4):
    return UpdatePlan(10, 2, n_accum_steps, n_epochs, n_training_steps, 42, carry)


def test_every_epoch_sees_every_example_once_in_a_fresh_order():
    plan = make_plan(carry=False)
    assert plan.n_updates == 8
    epochs = [seen_in(plan, 2 * e, 2 * e + 2) for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert [plan.epochs_ending(n) for n in range(1, 9)] == [[], [0], [], [1], [], [2], [], [3]]


def test_carried_accumulation_joins_the_next_epoch():
    plan = make_plan(carry=True)
    assert plan.n_updates == 6  # 20 micro-batches, 3 an update, the last 2 never applied
    seen = seen_in(plan, 0, 6)
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20])
    assert [plan.epochs_ending(n) for n in range(1, 7)] == [[0], [], [1], [], [2], [3]]


@pytest.mark.parametrize(
    ("n_examples", "n_accum_steps", "n_epochs"), [(5, 2, 2), (10, 3, 4), (3, 5, 9), (9, 4, 5), (2, 3, 7)]
)
def test_carried_accumulation_is_applied_in_the_epoch_of_its_last_batch(n_examples, n_accum_steps, n_epochs):
    plan = UpdatePlan(n_examples, 2, n_accum_steps, n_epochs, 1000, 1, carry_accumulation=True)
    n_batches, epochs, evaluated = 0, [], {}
    for epoch in range(n_epochs):  # as the original goes through them
        for _ in range(plan.batches_per_epoch):
            n_batches += 1
            if n_batches % n_accum_steps == 0:
                epochs.append(epoch)
        evaluated.setdefault(len(epochs), []).append(epoch)
    assert [plan.epoch_of(update) for update in range(plan.n_updates)] == epochs
    for n_done in range(1, plan.n_updates + 1):
        assert plan.epochs_ending(n_done) == evaluated.get(n_done, [])


def test_a_run_cut_short_ends_its_epoch():
    plan = make_plan(carry=False, n_training_steps=3)
    assert plan.n_updates == 3
    assert [plan.epochs_ending(n) for n in (1, 2, 3)] == [[], [0], [1]]


def test_order_depends_on_the_seed():
    orders = [UpdatePlan(50, 50, 1, 1, 1, seed, False).micro_batches(0) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert np.sort(orders[2][0]).tolist() == list(range(50))


def test_packed_rows_hold_every_text_once_and_tell_where(tokenizer):
    examples = [Example([], list(range(10, 10 + n))) for n in (5, 9, 14, 7)] + [Example([20, 21], [30, 31, 32])]
    texts = [text for example in examples for text in rows_of(example, tokenizer.bos_id, tokenizer.eos_id)]
    shape = PackedShape(n_rows=3, n_columns=32, n_texts=3, n_slots=15)
    tokens, labels, packing = make_packed_batch(examples, tokenizer, shape)
    assert tokens.shape == labels.shape == packing.places.shape == (3, 32)
    assert packing.columns.shape == (3, 3, 15)
    found, n_found = [], 0
    for row in range(3):
        for place, columns in enumerate(packing.columns[row]):
            own = columns[columns < 32]
            assert packing.places[row, own].tolist() == list(range(place * 15, place * 15 + len(own)))
            found.append((tokens[row, own].tolist(), labels[row, own].tolist()))
            n_found += len(own)
    assert sorted(found) == sorted(texts)
    assert (packing.places < 45).sum() == n_found == (tokens != tokenizer.pad_id).sum()


def test_packed_rows_are_even_and_hold_no_more_texts_than_they_may():
    assert [len(row) for row in pack_rows([9, 1, 1, 1, 1, 1], 2, 3)] == [3, 3]
    lengths = [6, 5, 10, 9, 15, 14, 8, 7, 5]
    assert max(sum(lengths[text] for text in row) for row in pack_rows(lengths, 3, 4)) < 30, "79 tokens in three"


def test_packed_shapes_are_few_and_hold_every_batch(monkeypatch):
    generator = np.random.default_rng(0)
    examples = [Example([], [7] * int(n)) for n in generator.integers(3, 64, 300)]
    updates = [generator.choice(300, (2, 4), replace=False).tolist() for _ in range(400)]
    for n_rows in (1, 8):
        shapes = packed_shapes(examples, iter(updates), n_rows)
        assert len(shapes) <= 4
        for batches in updates:
            groups = [[examples[i] for i in batch] for batch in batches]
            assert fitting_shape(shapes, groups).n_rows == n_rows
    most = max(n_tokens([examples[i] for i in batch]).sum() for batches in updates for batch in batches)
    assert packed_shapes(examples, iter(updates), 1)[-1].n_columns < most + 8, "no room for what the run does not make"
    worst = [examples[i] for i in sorted(range(300), key=lambda i: -len(examples[i].target))[:4]]
    monkeypatch.setattr("jaxprefix.data.SAMPLED_UPDATES", 1)
    few = packed_shapes(examples, iter(updates), 1)
    assert fitting_shape(few, [worst]) == few[-1]


def test_a_disk_that_fails_while_a_file_is_read(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "d.jsonl.gz").write_bytes(b"")
    monkeypatch.setattr(gzip, "open", fail)
    with pytest.raises(InputError, match=r"d.jsonl.gz: cannot be read \(Input/output error\)"):
        list(lines.read_lines(tmp_path / "d.jsonl.gz"))
