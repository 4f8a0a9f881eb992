"""The table of error messages: found in the code, each with a test that was seen to trigger it, docs/errors.md.

python -m pytest --record-errors FILE tests/…      notes which test triggers which message
python -m tests.errors FILE …                      writes the table from the code and from such files

A test that the page names for a message stays there unless it ran without triggering the message.
"""

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest

from convert.errors import InputError, PlainError, RunError
from jaxprefix.run.orbax_errors import SaveError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- the tables below are written by python -m tests.errors -->\n", "<!-- end of the tables -->\n"
EXIT_CODES = {error.__name__: error.exit_code for error in (InputError, RunError, SaveError)}
LONGEST_PLACEHOLDER = 24
NO_TEST = "**none**"

Part = str | ast.expr
"""A piece of a message: words, or what is filled in."""
Key = tuple[str, str]
"""A message's file and text."""


class Message(NamedTuple):
    """An error message in the code."""

    module: str
    text: str
    exit_code: int
    lines: range
    """Where the file makes it; only to find it by."""
    pattern: re.Pattern[str]
    is_problem: bool
    """Whether it is one line of an error that lists several problems."""

    @property
    def key(self) -> Key:
        return self.module, self.text


def all_messages() -> list[Message]:
    """Every message of the packages, in the order of the files."""
    paths = [path for package in ("convert", "jaxprefix") for path in sorted((ROOT / package).rglob("*.py"))]
    return [
        message
        for path in paths
        for message in Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")).messages()
    ]


class Module:
    """A file's functions, and the messages of the errors that they make."""

    def __init__(self, name: str, source: str):
        self.name = name
        nodes = list(ast.walk(ast.parse(source)))
        self.functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        self.by_name = {function.name: function for function in self.functions}
        self.exit_codes = dict(EXIT_CODES)
        for node in nodes:
            for base in map(ast.unparse, node.bases if isinstance(node, ast.ClassDef) else ()):
                if base in EXIT_CODES:
                    self.exit_codes[node.name] = EXIT_CODES[base]

    def messages(self) -> Iterator[Message]:
        for function in self.functions:
            nodes = list(_own_nodes(function))
            texts = _texts_by_name(nodes)
            lists, code = {"problems"}, EXIT_CODES["InputError"]
            for node in nodes:
                if not isinstance(node, ast.Call):
                    continue
                error, _, method = ast.unparse(node.func).partition(".")
                if error in self.exit_codes and method in ("", "all"):
                    code = self.exit_codes[error]
                    lists |= {ast.unparse(argument) for argument in node.args[1:]}
                    yield self._message(node, node.args[0], texts, code)
            for expression in _added_to(lists, function, nodes):
                yield self._message(expression, expression, texts, code, is_problem=True)

    def _message(
        self, node: ast.expr, expression: ast.expr, texts: dict[str, ast.expr], exit_code: int, is_problem: bool = False
    ) -> Message:
        parts = list(self._parts(expression, texts))
        text = "".join(part if isinstance(part, str) else _placeholder(part) for part in parts)
        pattern = "".join(re.escape(part) if isinstance(part, str) else ".*" for part in parts)
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        return Message(self.name, text, exit_code, lines, re.compile(pattern, re.DOTALL), is_problem)

    def _parts(self, expression: ast.expr, texts: dict[str, ast.expr]) -> Iterator[Part]:
        """Take a text apart, through variables of the same function and functions of the same file."""
        match expression:
            case ast.Constant(value=str(words)):
                yield words
            case ast.JoinedStr(values=values):
                for value in values:
                    yield from self._parts(value, texts)
            case ast.FormattedValue(value=value) if not isinstance(value, ast.Call):
                yield from self._parts(value, texts)
            case ast.FormattedValue(value=value):
                yield value
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                yield from (*self._parts(left, texts), *self._parts(right, texts))
            case ast.Name(id=name) if name in texts:
                yield from self._parts(texts[name], texts)
            case ast.Call(func=ast.Name(id=name)) if name in self.by_name:
                nodes = list(_own_nodes(self.by_name[name]))
                returned = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
                yield from self._parts(returned[-1], _texts_by_name(nodes))
            case _:
                yield expression


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """All nodes of a function in their order, without those of functions inside it."""
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            waiting += reversed(list(ast.iter_child_nodes(node)))


def _texts_by_name(nodes: list[ast.AST]) -> dict[str, ast.expr]:
    """The variables that are set once, to a text."""
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {
        target.id: value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target, value in [(node.targets[0], node.value)]
        if isinstance(target, ast.Name) and isinstance(value, ast.JoinedStr) and names.count(target.id) == 1
    }


def _added_to(lists: set[str], function: ast.FunctionDef, nodes: list[ast.AST]) -> Iterator[ast.expr]:
    """Every expression that a function adds to one of the lists; so is what a `…_problems` function returns."""
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in lists:
                yield from _elements(value)
            case ast.AugAssign(target=ast.Name(id=name), value=value) if name in lists:
                yield from _elements(value)
            case ast.Return(value=ast.expr() as value) if function.name.endswith("_problems"):
                yield from _elements(value)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]) if name in lists:
                yield value


def _elements(value: ast.expr) -> list[ast.expr]:
    match value:
        case ast.ListComp(elt=element):
            return [element]
        case ast.List(elts=elements):
            return elements
    return []


def _placeholder(expression: ast.expr) -> str:
    text = ast.unparse(expression).removeprefix("self.")
    return f"{{{text}}}" if len(text) <= LONGEST_PLACEHOLDER else "{…}"


class Recorder:
    """A pytest plugin: writes one line of JSON for every test, with the messages of the errors made in it."""

    def __init__(self, path: Path):
        self._path = path
        self._messages = all_messages()
        self._seen: set[Key] = set()
        self._init = PlainError.__init__

        def note_and_init(error: PlainError, message: str) -> None:
            self._note(message, sys._getframe(1))
            self._init(error, message)

        PlainError.__init__ = note_and_init  # type: ignore[method-assign]

    def pytest_unconfigure(self) -> None:
        PlainError.__init__ = self._init  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._seen.clear()
        result = yield
        line = json.dumps({"test": item.nodeid, "messages": sorted(self._seen)})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return result

    def _note(self, text: str, frame: FrameType | None) -> None:
        while frame and frame.f_globals["__name__"] == PlainError.__module__:
            frame = frame.f_back
        if frame is None or not Path(frame.f_code.co_filename).is_relative_to(ROOT):
            return
        module = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
        self._seen |= {message.key for message in triggered(self._messages, module, text, frame.f_lineno)}


def triggered(messages: Iterable[Message], module: str, text: str, line: int) -> Iterator[Message]:
    """Yield the messages that make up an error's text: the one made in a line of a file, and its problems.

    Problems are recognised by their words, first among the file's own, then among all; of several patterns that fit,
    the longest are taken.
    """
    here = [message for message in messages if message.module == module]
    yield from (message for message in here if line in message.lines and not message.is_problem)
    for told in text.split("\n  - ")[1:]:
        fitting = _problems_that_fit(here, told) or _problems_that_fit(messages, told)
        most = max((len(problem.pattern.pattern) for problem in fitting), default=0)
        yield from (problem for problem in fitting if len(problem.pattern.pattern) == most)


def _problems_that_fit(messages: Iterable[Message], told: str) -> list[Message]:
    return [message for message in messages if message.is_problem and message.pattern.fullmatch(told)]


def recorded_tests(paths: Iterable[Path]) -> tuple[dict[Key, str], set[str]]:
    """Return the test to name for each message, and all tests that ran: from the files of a Recorder.

    Of several tests, the one that triggers the fewest messages is named: it says most about each.
    """
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: (len(line["messages"]), line["test"]), reverse=True)
    tests = {(module, text): _function(line["test"]) for line in lines for module, text in line["messages"]}
    return tests, {_function(line["test"]) for line in lines}


def _function(test: str) -> str:
    """A test without its parameters."""
    return test.partition("[")[0]


def named_tests() -> dict[Key, str]:
    """Return the test that the page names for each message, whose text is as `cell` gives it."""
    tests, module = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            module = line.removeprefix("## ")
        elif line.startswith("| `"):
            text, _, test = line.removeprefix("| ").removesuffix(" |").rsplit(" | ", 2)
            tests[module, text] = test.strip("`")
    return {message: test for message, test in tests.items() if test != NO_TEST}


def cell(text: str) -> str:
    """A message as a cell of a Markdown table."""
    text = text.replace("|", r"\|").replace("\n", " ")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page(messages: list[Message], tests: dict[Key, str]) -> str:
    """The page with its tables made again, one for each file; `tests` goes by file and cell."""
    lines: list[str] = []
    for module in dict.fromkeys(message.module for message in messages):
        lines += [f"## {module}\n", "| message | exit code | test |", "| --- | ---: | --- |"]
        here = [message for message in messages if message.module == module]
        for text, exit_code in dict.fromkeys((cell(message.text), message.exit_code) for message in here):
            test = tests.get((module, text))
            lines.append(f"| {text} | {exit_code} | {f'`{test}`' if test else NO_TEST} |")
        lines.append("")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return "\n".join([before + BEGIN, *lines, END + rest.split(END)[1]])


def main(paths: list[str]) -> int:
    """Write the page; return 1 when a message has no test."""
    messages = all_messages()
    seen, ran = recorded_tests(map(Path, paths))
    tests = {(module, cell(text)): test for (module, text), test in seen.items()}
    tests |= {key: test for key, test in named_tests().items() if test not in ran}
    PAGE.write_text(page(messages, tests), encoding="utf-8")
    keys = dict.fromkeys((message.module, cell(message.text)) for message in messages)
    untested = [key for key in keys if key not in tests]
    for module, text in untested:
        print(f"no test: {module}: {text}")
    print(f"{len(keys)} messages, {len(keys) - len(untested)} with a test")
    return 1 if untested else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
