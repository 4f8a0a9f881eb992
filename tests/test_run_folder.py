import re

import pytest

from convert.errors import InputError
from jaxprefix.run_folder import only_writer, open_run_folder
from tests.runs import run_config


def test_a_file_in_the_place_of_the_run(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(InputError, match=re.escape("run: cannot be written (File exists)")):
        open_run_folder(run_config(tmp_path), base={})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/run", "file: cannot be written (Not a directory)"),
        ("n" * 250, ".lock: cannot be written (File name too long)"),
    ],
)
def test_a_lock_that_cannot_be_made(tmp_path, name, message):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=re.escape(message)), only_writer(tmp_path / name):
        pass
