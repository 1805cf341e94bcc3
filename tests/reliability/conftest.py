"""The model that reliability tests load: tiny, so that what is measured is everything around it."""

import pytest

from stellarbyte.checkpoint.convert import convert
from tests.support.models.hugging_face import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return str(convert(tiny_llama(folder / "llama"), folder / "tiny"))
