"""Output that nobody reads any more, or that lies on a full disk."""

import os

from jaxprefix.screen import Heedless


def test_what_cannot_be_written_is_discarded_and_everything_else_is_as_before(tmp_path):
    with (tmp_path / "log").open("w") as file:
        print("a", file=Heedless(file), flush=True)
        assert (Heedless(file).fileno(), Heedless(file).isatty()) == (file.fileno(), False)
    assert (tmp_path / "log").read_text() == "a\n"

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w", buffering=1) as full:
        for stream in (pipe, full):
            for _ in range(2):
                print("a", file=Heedless(stream), flush=True)
