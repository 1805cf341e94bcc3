"""Servers that the integration tests talk to, each started once for all tests."""

from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stellarbyte.checkpoint.source import resolve_model
from tests.support.models.references import PROMPTS, Reference, transformers_answers
from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.harmony_server import make_model_folder as make_harmony_folder
from tests.support.servers.reasoning_server import make_model_folder as make_thinker_folder
from tests.support.servers.server_process import FAKE, HARMONY, REAL, REASONING, ServerProcess, running


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server as users start it, with the demo model; the first start converts it."""
    with running(REAL, "--data-dir", str(tmp_path_factory.mktemp("stored"))) as server:
        yield server


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("models") / "fake"))


@pytest.fixture(scope="session")
def fake_server(fake_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real HTTP process in front of the fake engine, which repeats prompts."""
    stored = ["--data-dir", str(tmp_path_factory.mktemp("stored")), "--max-file-bytes", "1000000"]
    bounds = ["--max-body-bytes", "100000", *stored]
    with running(FAKE, "--model", fake_model, *bounds, "--allow-local-admin") as server:
        yield server


@pytest.fixture(scope="session")
def reasoning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The model `thinker`, which repeats the last message, marks of reasoning included."""
    folder = make_thinker_folder(tmp_path_factory.mktemp("models") / "thinker")
    with running(REASONING, "--model", str(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def harmony_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The model `oss`, which writes the last message as its own messages, marks of channels included."""
    folder = make_harmony_folder(tmp_path_factory.mktemp("models") / "oss")
    with running(HARMONY, "--model", str(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve_model("demo"))


@pytest.fixture(scope="session")
def references(tokenizer: PreTrainedTokenizerFast, pytestconfig: pytest.Config) -> list[Reference]:
    """transformers' own answers to `references.PROMPTS`: 64 tokens to each with --slow, fewer to some without."""
    if pytestconfig.getoption("--slow"):
        return transformers_answers(tokenizer, PROMPTS, 64)
    return transformers_answers(tokenizer, PROMPTS[:8], 24)
