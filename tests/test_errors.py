"""docs/errors.md tells every message that the code has, each with a test that exists."""

import ast

import pytest

from tests.errors import PAGE, ROOT, Module, all_messages, cell, named_tests, page, recorded_tests, triggered

SOURCE = """
class SaveError(RunError): pass

def read(path):
    where = f"{path}: cannot be read"
    raise InputError(f"{where} ({reason(error)!r:>9})")

def check(config):
    problems = [f"--{name} must be positive" for name in NAMES]
    problems.append("--a excludes --b")
    problems += size_problems(config)
    raise InputError.all("train:", problems)

def size_problems(config):
    return [f"{config.n} is too {'much' if config.n else 'little, and that is no number'}"]

def save():
    def fail():
        raise SaveError(advice())
    return fail

def advice():
    return "the disk is full: " + "make room"
"""
FOUND = {
    ("{path}: cannot be read ({reason(error)})", 2),
    ("train:", 2),
    ("--{name} must be positive", 2),
    ("--a excludes --b", 2),
    ("{config.n} is too {…}", 2),
    ("the disk is full: make room", 1),
}


def test_messages_are_found_whatever_way_they_are_made():
    assert {(message.text, message.exit_code) for message in Module("a.py", SOURCE).messages()} == FOUND


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a: cannot be read ('no')", "raise InputError(f", {"{path}: cannot be read ({reason(error)})"}),
        ("train:\n  - --n must be positive", "InputError.all", {"train:", "--{name} must be positive"}),
        ("train:\n  - 9 is too much", "InputError.all", {"train:", "{config.n} is too {…}"}),
        ("train:\n  - something else", "InputError.all", {"train:"}),
        ("train:\n  - b is told by another file", "InputError.all", {"train:", "{b} is told by another file"}),
    ],
)
def test_an_error_is_told_by_where_it_is_made_and_its_problems_by_their_words(text, words, expected):
    line = next(number for number, line in enumerate(SOURCE.split("\n"), start=1) if words in line)
    elsewhere = 'def some_problems(b):\n    return [f"{b} is told by another file"]'
    messages = [*Module("a.py", SOURCE).messages(), *Module("b.py", elsewhere).messages()]
    assert {message.text for message in triggered(messages, "a.py", text, line)} == expected


def test_the_test_that_triggers_the_fewest_messages_is_named(tmp_path):
    lines = ['{"test": "t.py::a[x]", "messages": [["m", "one"]]}', '{"test": "t.py::b", "messages": []}']
    lines += ['{"test": "t.py::c", "messages": [["m", "one"], ["m", "two"]]}']
    (tmp_path / "record").write_text("\n".join(lines))
    tests, ran = recorded_tests([tmp_path / "record"])
    assert tests == {("m", "one"): "t.py::a", ("m", "two"): "t.py::c"}
    assert ran == {"t.py::a", "t.py::b", "t.py::c"}


def test_the_page_is_what_the_code_gives():
    assert PAGE.read_text(encoding="utf-8") == page(all_messages(), named_tests()), "see CONTRIBUTING.md"


def test_every_message_names_a_test_that_exists():
    tests = named_tests()
    assert [key for message in all_messages() if (key := (message.module, cell(message.text))) not in tests] == []
    for test in set(tests.values()):
        path, *names = test.split("::")
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for name in names:
            found = [node for node in body if getattr(node, "name", None) == name]
            assert found, test
            body = found[0].body
