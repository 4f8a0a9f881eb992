import pytest

from jaxprefix.suffix_rate import NOWHERE, count_sentences, suffix_rate, without_cut_end

SMILE = " 😃"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("今日は晴れ。 😃 明日は雨。 😃", (2, 2)),
        ("今日は晴れ。 明日は雨。 😃", (2, 1)),
        ("今日は晴れ。明日は雨。", (2, 0)),
        ("今日は晴れ 😃 明日は", (1, 1)),
        ("今日は晴れ", (0, 0)),
        ("本当に！？ 😃", (1, 1)),
        ("「行こう。」と言った。 😃", (1, 1)),
        ("「行こう。」 「はい。」 😃", (2, 1)),
        ("今日は晴れ。😃 😃 😃", (1, 1)),
        ("I paid 3.5 yen. You paid more. 😃", (2, 1)),
        ("He left. 😃. She stayed. 😃", (2, 2)),
        ("He left (why?), and she stayed. 😃", (1, 1)),
        (" 😃 次の文。", (1, 0)),  # the prompt's own sentence does not count if only its end is generated, …
        ("。 😃 次の文。", (1, 0)),
        ("。」 次の文。 😃", (1, 1)),  # … whether the suffix follows or not
        ("。\n次の文。 😃", (1, 1)),
        ("見出し\n本文です。 😃", (2, 1)),  # a line ends its sentence
        ("一行目\n二行目。\n三行目 😃\n途中", (3, 1)),
        ("一。\n\n😃\n二。 😃\n", (2, 1)),
        ("「A。 😃」 😃", (1, 1)),
        ("😃", (0, 0)),
        ("", (0, 0)),
        ("すごい！ ！ ！", (1, 0)),  # marks alone are no sentence
        ("晴れ。 ！\u3000！\t！ 😃", (1, 1)),
        ("晴れ。 😃 。 ！ 😃", (1, 1)),
        ("晴れ。\u2003😃\u2003😃", (1, 1)),
    ],
)
def test_count_sentences(text, counts):
    assert count_sentences(text, SMILE) == counts


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ('Dr. Smith arrived at 5 p.m. etc. 😃\n"Why?" asked Ms. Brown. Wait... what? 😃\n', (2, 2)),
        ("Dr. Smith left. She stayed.\nNobody spoke. 😃\n", (2, 1)),
        ("He left. 😃 She stayed. 😃\n", (2, 2)),
        ("He left. 😃 She stayed.\n\n", (2, 1)),
        ("He left. 😃\nShe stayed. And", (1, 1)),
        ("。\n", (0, 0)),
        ("He left. 😃\r\n\u3000\nShe stayed. 😃\n", (2, 2)),
        ('He said "Why?" 😃"\nShe left. 😃.\n', (2, 2)),
    ],
)
def test_where_newlines_stay_a_sentence_is_a_line(text, counts):
    assert count_sentences(text, SMILE, NOWHERE) == counts


def test_a_suffix_on_a_line_of_its_own():
    assert count_sentences("He left.\n😃\n\nShe stayed.\n😃\n\nWe sat.\n", "\n😃\n", NOWHERE) == (3, 2)
    assert count_sentences("一。\n\n😃 二。\n\n😃 三。", "\n\n😃") == (3, 2)
    text = "He left.\n😃\n\nShe stayed.\n😃\n\nWe sat.\n😃\n\n"
    for end in range(len(text)):  # wherever the limit cuts it off
        for cut in text[:end], text[:end] + "\ufffd":
            n_sentences, n_suffixed = count_sentences(without_cut_end(cut, "\n😃\n"), "\n😃\n", NOWHERE)
            assert n_sentences == n_suffixed == text[:end].count("😃")


def test_a_suffix_on_a_line_of_its_own_where_every_text_begins_with_a_space():
    assert count_sentences("Good night.\n😃\nGood day.\n😃\n", " \n😃", NOWHERE) == (2, 2)


def test_a_suffix_of_marks():
    assert count_sentences("すごい！！！ 猫。", "！！") == (2, 1)


def test_suffix_rate_is_over_all_sentences():
    assert suffix_rate(["一。 😃 二。", "三。 😃"], SMILE) == {"sentences": 3, "suffix_rate": 2 / 3}
    assert suffix_rate(["途中"], SMILE) == {"sentences": 0, "suffix_rate": 0.0}
    assert suffix_rate(["Dr. A. 😃\n"], SMILE, NOWHERE) == {"sentences": 1, "suffix_rate": 1.0}


@pytest.mark.parametrize(
    ("text", "suffix", "n_sentences"),
    [
        ("一。 😃 二。", SMILE, 1),  # the smile might have come next
        ("一。 😃 二。 ", SMILE, 1),
        ("一。 😃 二。」\ufffd", SMILE, 1),  # two of its four bytes
        ("一。 (笑) 二。 (笑", " (笑)", 1),
        ("一。 😃 二。三", SMILE, 2),  # a sentence that began after 二。 tells that none came
        ("一。 😃 二。\n", SMILE, 2),
        ("一。 😃", SMILE, 1),
        ("一。 😃 二", SMILE, 1),
    ],
)
def test_a_sentence_whose_suffix_was_cut_off_does_not_count(text, suffix, n_sentences):
    assert count_sentences(without_cut_end(text, suffix), suffix)[0] == n_sentences


def test_a_suffix_that_repeats_itself_is_cut_off():
    assert count_sentences(without_cut_end("一。ｗｗｗ 二。ｗｗ", "ｗｗｗ"), "ｗｗｗ") == (1, 1)


def test_a_suffix_on_a_line_of_its_own_behind_lines_without_marks():
    text = "He left\n😃\n\nShe stayed\n😃\n\n"
    for end in range(len(text)):
        n_sentences, n_suffixed = count_sentences(without_cut_end(text[:end], "\n😃\n"), "\n😃\n", NOWHERE)
        assert n_sentences == n_suffixed == text[:end].count("😃")
