import pytest

from jaxprefix import load_model, load_tokenizer
from tests.base_folders import GOLDEN_BASE, make_base_folder


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(GOLDEN_BASE)


@pytest.fixture(scope="session")
def golden_model():
    return load_model(GOLDEN_BASE)


@pytest.fixture(scope="session", params=[True, False], ids=["parallel", "sequential"])
def base_folder(request, tmp_path_factory):
    return make_base_folder(tmp_path_factory.mktemp("base") / "tiny", use_parallel_residual=request.param)


@pytest.fixture(scope="session")
def model(base_folder):
    return load_model(base_folder)
