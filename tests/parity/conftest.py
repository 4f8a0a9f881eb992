import pytest

from tests.base_folders import GOLDEN_BASE, make_base_folder
from torch_ref.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def reference_tokenizer():
    return load_tokenizer(GOLDEN_BASE)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    return make_base_folder(tmp_path_factory.mktemp("base") / "gpt2", model_type="gpt2")
