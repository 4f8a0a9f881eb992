import pytest

from tests.base_folders import GOLDEN_BASE
from torch_ref.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def reference_tokenizer():
    return load_tokenizer(GOLDEN_BASE)
