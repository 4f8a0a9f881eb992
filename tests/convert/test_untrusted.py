import pytest

from convert.errors import InputError
from convert.prefix import read_prefix
from convert.torch_files import load_torch
from convert.untrusted import member, read_object
from convert.weights import read_safetensors
from jaxprefix import load_tokenizer


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config.json: cannot be read \(Is a directory\)"):
        read_object(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", read_safetensors),
        ("pytorch_model.bin", load_torch),
        ("adapter_model.safetensors", read_prefix),
        ("smile.weight", read_prefix),
        ("spiece.model", lambda path: load_tokenizer(path.parent)),
        ("tokenizer.json", lambda path: load_tokenizer(path.parent)),
    ],
)
def test_a_pointer_of_git_lfs_is_told_as_such(tmp_path, name, read):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match=f"{name}: is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        read(tmp_path / name)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "\\ud800"}')
    with pytest.raises(InputError, match=r"config.json: not valid JSON"):
        read_object(tmp_path / "config.json")


def test_only_a_snapshots_links_lead_to_blobs(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").touch()
    for parent in ("snapshots", "models"):
        (tmp_path / parent / "base").mkdir(parents=True)
        (tmp_path / parent / "base" / "config.json").symlink_to("../../blobs/secret")
    assert member(tmp_path / "snapshots" / "base", "config.json").is_file()
    with pytest.raises(InputError, match=r"points outside its folder, to .*secret"):
        member(tmp_path / "models" / "base", "config.json")


def test_of_many_problems_some_are_told_and_the_rest_counted():
    lines = str(InputError.all("x:", [f"problem {n}" for n in range(45)])).split("\n  - ")
    assert len(lines) == 42
    assert lines[-2:] == ["problem 39", "and 5 more"]
    assert "more" not in str(InputError.all("x:", ["problem"] * 40))
