import pytest

from convert.errors import InputError
from convert.untrusted import read_object


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config.json: cannot be read \(Is a directory\)"):
        read_object(tmp_path / "config.json")
