"""Output that nobody reads any more, or that lies on a full disk."""

import os
import sys
import types
from unittest.mock import Mock

from convert.errors import RunError
from jaxprefix.machine.hosts import end_at_once
from jaxprefix.machine.screen import UnfailingStream, escape_unknown, tell
from jaxprefix.run.log import RunLog


def test_what_cannot_be_written_is_discarded_and_everything_else_is_as_before(tmp_path):
    with (tmp_path / "log").open("w") as file:
        print("a", file=UnfailingStream(file), flush=True)
        assert (UnfailingStream(file).fileno(), UnfailingStream(file).isatty()) == (file.fileno(), False)
        with_two_methods = types.SimpleNamespace(write=file.write, flush=file.flush)
        print("b", file=UnfailingStream(UnfailingStream(with_two_methods)), flush=True)
        refusing = types.SimpleNamespace(write=Mock(side_effect=OSError), flush=lambda: None)
        print("c", file=UnfailingStream(refusing), flush=True)
        file.close()  # by the program itself
        print("c", file=UnfailingStream(file), flush=True)
    assert (tmp_path / "log").read_text() == "a\nb\n"

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w", buffering=1) as full:
        for stream in (pipe, full):
            for _ in range(2):
                print("a", file=UnfailingStream(stream), flush=True)


def test_what_the_encoding_does_not_have_is_escaped(tmp_path):
    with (tmp_path / "log").open("w", encoding="latin-1") as file:
        escape_unknown(file)
        print("très 😃", file=file)
    assert (tmp_path / "log").read_text(encoding="latin-1") == "très \\U0001f603\n"
    escape_unknown(None)  # closed before the program began


def test_a_reader_that_is_slow_gets_what_comes_later():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb", buffering=0) as slow, open(writer, "w", buffering=1) as pipe:
        for _ in range(20):
            print("a" * 10_000, file=UnfailingStream(pipe), flush=True)
        slow.read(2**20)  # all that the pipe holds
        print("the end", file=UnfailingStream(pipe), flush=True)
        assert slow.read(2**20).endswith(b"the end\n")


def test_a_stream_that_was_closed_before(monkeypatch, capsys):
    """As of a daemon that calls `train`."""
    monkeypatch.setattr(sys, "stderr", None)
    with RunLog(None, n_updates=1, from_step=0, to_evaluate=False, quiet=False) as log:
        log.line("a")
    tell("a")
    UnfailingStream(None).flush()
    assert capsys.readouterr().out == ""


def test_a_process_is_ended_though_nobody_reads_why(monkeypatch):
    monkeypatch.setattr(os, "_exit", ended := Mock())
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        end_at_once(RunError("a"))
    ended.assert_called_once_with(1)


def test_a_suffix_or_path_stands_as_it_is(capsys):
    with RunLog(None, n_updates=1, from_step=0, to_evaluate=False, quiet=False) as log:
        log.line("the suffix ' :smile:' in [bold]data[/bold]")
    assert capsys.readouterr().err.endswith(" the suffix ' :smile:' in [bold]data[/bold]\n")


def test_what_the_system_has_closed_takes_no_other_files_place(tmp_path):
    number = os.open(os.devnull, os.O_WRONLY)
    with open(number, "w", buffering=1, closefd=False) as stream:
        os.close(number)
        for _ in range(2):
            print("a", file=UnfailingStream(stream), flush=True)
        with (tmp_path / "other").open("w") as other:
            assert other.fileno() != number
    os.close(number)
