"""`jaxprefix generate`: what it is told, what it prints where, what it refuses."""

import io
import json
import os
import re
import subprocess
import sys
import types
from unittest.mock import Mock

import pytest

from convert.errors import InputError
from jaxprefix.cli import main
from jaxprefix.decode import BatchTiming
from jaxprefix.generation import _print_timings, _typed_lines
from jaxprefix.inference import read_prompts
from tests.command_line import BASE, GREEDY, PREFIX, assert_fails


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "cannot be read as a file of prompts (No such"), ("blank.txt", "holds no prompt")],
)
def test_prompt_file_without_prompts(capsys, tmp_path, name, message):
    (tmp_path / "blank.txt").write_text("\n\n")
    assert_fails(capsys, ["generate", *BASE, "--prompt_file", str(tmp_path / name)], f"{tmp_path / name}: {message}")


def test_prefix_length_that_disagrees(capsys):
    command = ["generate", *BASE, *PREFIX, "--prompt", "a", "--prefix_seq_len", "20"]
    assert_fails(capsys, command, "has prefix length 10, not --prefix_seq_len 20")


def test_generate_tells_the_timing_of_every_batch(capsys):
    assert main(["generate", *BASE, *PREFIX, "--prompt", "a", "b", "c", *GREEDY, "--batch_size", "2", "--timing"]) == 0
    found = re.findall(
        r"^(\d) rows, (\d+) tokens in [\d.]+ s: ([\d.]+) tokens/s$", capsys.readouterr().err, re.MULTILINE
    )
    assert [int(n_rows) for n_rows, _, _ in found] == [2, 1]
    assert all(float(speed) > 0 for _, _, speed in found)
    assert main(["generate", *BASE, *PREFIX, "--prompt", "a", *GREEDY, "--timing", "--compare"]) == 0
    found = re.findall(r"^(.*): 1 rows, .* tokens/s$", capsys.readouterr().err, re.MULTILINE)
    assert found == ["continuation", "continuation without prefix"]
    _print_timings({"continuation": [BatchTiming(2, 12, 3.0)]})
    assert capsys.readouterr().err == "2 rows, 12 tokens in 3.00 s: 4.0 tokens/s\n"


def test_generate_compares_as_text_and_json(capsys):
    prompts = ["--prompt", "朝の市場は", "猫が二匹"]
    assert main(["generate", *BASE, *PREFIX, *prompts, *GREEDY, "--compare"]) == 0
    text = capsys.readouterr().out
    assert main(["generate", *BASE, *PREFIX, *prompts, *GREEDY, "--compare", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == prompts[1:]
    assert main(["generate", *BASE, *PREFIX, *prompts, *GREEDY]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [r["prompt"] + r["continuation"] for r in records]
    assert "tokens/s" not in told.err
    for record in records:
        assert record["continuation"] != record["continuation_without_prefix"]
        assert f"with prefix:    {record['prompt']}{record['continuation']}" in text
        assert f"without prefix: {record['prompt']}{record['continuation_without_prefix']}" in text


def test_the_prompt_loop_answers_line_by_line():
    command = [sys.executable, "-m", "jaxprefix", "generate", *BASE, *PREFIX, *GREEDY]
    lines = "\r\n".join(["朝の", "朝" * 600, "\udcff", "🦀猫が"]).encode(errors="surrogateescape")
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in locales of other names than C.UTF-8
    result = subprocess.run(command, input=lines, capture_output=True, check=True, env=strict)
    made, told = result.stdout.decode(), result.stderr.decode()
    assert [line[:2] for line in made.splitlines()] == ["朝の", "🦀猫"]
    assert "\r" not in made
    assert told.count("WARNING: 1 prompt(s) hold text unknown to the tokenizer") == 1
    too_long = "error: a prefix of 10 plus 608 tokens (--max_output_len and the longest prompt of 600) exceeds"
    assert re.search(re.escape(too_long) + " .* 512 positions; the text begins with '朝{40}'", told)
    assert r"error: not a valid text: '\udcff'" in told


def in_a_shell(redirected, *arguments, before="", **environment):
    """Run the command as a shell does that closes or redirects its streams."""
    command = ["bash", "-c", f'{before} "$@" {redirected}', "-", sys.executable, "-m", "jaxprefix", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


def test_json_is_json_in_every_encoding():
    arguments = ["generate", *BASE, *PREFIX, "--prompt", "朝😃", *GREEDY, "--json"]
    made = [in_a_shell("", *arguments, PYTHONIOENCODING=name).stdout.decode(name) for name in ("euc_jp", "utf-8")]
    assert json.loads(made[0]) == json.loads(made[1])
    assert "\\ud83d\\ude03" in made[0]
    assert "😃" in made[1]


def test_a_closed_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert_fails(
        capsys, ["generate", *BASE], "neither --prompt nor --prompt_file is given, and standard input is closed"
    )


def test_a_closed_error_stream():
    result = in_a_shell("2>&-", "generate", *BASE, "--prompt", "🦀", *GREEDY, "--json")
    assert list(json.loads(result.stdout)) == ["prompt", "continuation"], "no warning in front"


def test_a_full_disk_that_the_output_is_on(capsys, monkeypatch):
    arguments = ["generate", *BASE, "--prompt", "朝", *GREEDY]
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(arguments) == 1
    expected = "error: standard output cannot be written (No space left on device)\n"
    assert capsys.readouterr().err == expected
    result = in_a_shell("> /dev/full", *arguments)
    assert result.returncode == 1
    assert result.stderr.decode() == expected, "nor does Python complain at its end"


@pytest.mark.parametrize(
    ("before", "redirected", "why"),
    [("", "> /dev/full", "No space left on device"), ("ulimit -f 0;", '> "$FILE"', "File too large")],
)
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_what_needs_no_model_has_its_errors_too(before, redirected, why, arguments, tmp_path):
    result = in_a_shell(redirected, *arguments, before=before, FILE=str(tmp_path / "file"))
    assert result.returncode == 1
    assert result.stderr.decode() == f"error: standard output cannot be written ({why})\n"


def test_prompts_with_unknown_tokens_are_warned_of(capsys):
    assert main(["generate", *BASE, "--prompt", "🦀", "朝の", *GREEDY]) == 0
    assert "WARNING: 1 prompt(s) hold text unknown to the tokenizer" in capsys.readouterr().err


def test_the_prompt_loop_samples_as_a_file_of_its_lines_does(tmp_path):
    (tmp_path / "prompts.txt").write_text("朝の\n朝の\n朝の")
    command = [sys.executable, "-m", "jaxprefix", "generate", *BASE, *PREFIX, "--max_output_len", "12"]
    listed = subprocess.run(
        [*command, "--prompt_file", tmp_path / "prompts.txt"], capture_output=True, text=True, check=True
    )
    typed = subprocess.run(command, input="朝の\n朝の\n朝の", capture_output=True, text=True, check=True)
    assert typed.stdout == listed.stdout
    assert len(set(typed.stdout.splitlines())) == 3


def test_a_prompt_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeff朝の\n\n \n猫が\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["朝の", "猫が"]


def test_prompts_in_json_lines(tmp_path):
    """As training data has them: a prompt may have several lines."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "朝の\\n市場", "completion": "は"}\n\n{"prompt": ""}\n')
    assert read_prompts(path) == ["朝の\n市場", ""]
    for line, problem in (
        ('{"text": "朝の"}', "line 2: has no `prompt`"),
        ("朝の", "line 2: not a line of JSON"),
        ('{"prompt": 3}', "line 2: `prompt` must be a string, found int"),
    ):
        path.write_text('{"prompt": "朝の"}\n' + line)
        with pytest.raises(InputError, match=problem):
            read_prompts(path)


def test_a_prompt_file_that_is_none(tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "nowhere", "No such file or directory")):
        with pytest.raises(InputError, match=rf"cannot be read as a file of prompts \({reason}\)"):
            read_prompts(path)
    (tmp_path / "prompts.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"prompts.txt: is not UTF-8 \(invalid start byte at byte 3\)"):
        read_prompts(tmp_path / "prompts.txt")


def test_prompts_end_with_their_lines_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("朝の\u2028市場\x0c\r\n猫が\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["朝の\u2028市場\x0c", "猫が"]


def test_generate_does_as_it_is_told(monkeypatch, capsys):
    seen = {}

    def fake_stream(model, tokenizer, prompts, prefix, seed, batch_size, decode, *_):
        seen.update(dtype=model.embed.weight.dtype.name, seed=seed, batch_size=batch_size, top_k=decode.top_k)
        return iter(["。"])

    monkeypatch.setattr("jaxprefix.generation.stream", fake_stream)
    flags = ["--dtype", "bfloat16", "--seed", "7", "--batch_size", "2", "--top_k", "3"]
    assert main(["generate", *BASE, "--prompt", "朝の", *flags, "--json"]) == 0
    assert seen == {"dtype": "bfloat16", "seed": 7, "batch_size": 2, "top_k": 3}
    assert capsys.readouterr().out == '{"prompt": "朝の", "continuation": "。"}\n'  # readable, not \u671d


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_terminal_is_asked_for_lines_until_ctrl_d_or_ctrl_c(monkeypatch, capsys, shown, end):
    """The sign goes to standard error when the answers go into a file."""
    asked = Mock(side_effect=["朝の", end])
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: shown)
    assert list(_typed_lines()) == ["朝の"]
    assert [call.args for call in asked.call_args_list] == [("> " if shown else "",)] * 2
    told = "Type the beginning of a text; Ctrl-D ends.\n"
    assert capsys.readouterr() == ("", told if shown else f"{told}> > ")


def test_an_answer_is_out_before_the_next_is_made(monkeypatch):
    """Whoever reads the output through a pipe types the next line after it."""
    out, seen = io.BytesIO(), []

    def fake_stream(*_):
        for made in "。", "！":
            seen.append(out.getvalue().decode())
            yield made

    monkeypatch.setattr("jaxprefix.generation.stream", fake_stream)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8"))
    assert main(["generate", *BASE, "--prompt", "朝の", "猫が"]) == 0
    assert seen == ["", "朝の。\n"]
