"""Servers that are talked to from terminals, each started once for all tests here."""

from collections.abc import Iterator

import pytest

from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, running
from tests.terminal.command import Adapted, Command


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STELLARBYTE_URL", "STELLARBYTE_API_KEY", "STELLARBYTE_ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stellarbyte(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("models") / "fake"))


@pytest.fixture(scope="session")
def fake_server(fake_model: str) -> Iterator[ServerProcess]:
    """Answers repeat the conversation, as the template writes it, without end."""
    with running(FAKE, "--model", fake_model) as server:
        yield server


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    folder = tmp_path_factory.mktemp("adapted")
    known = KnownModel.make(folder)
    for seed in (0, 1):
        known.add_adapter(folder / "adapters" / f"a{seed}", seed)
    flags = ["--model", str(known.folder), "--adapter-dir", str(folder / "adapters"), "--allow-local-admin"]
    with running(REAL, *flags) as server:
        yield Adapted(server, folder / "adapters")
