"""The server that trains for the tests of the page for fine-tuning, and a job of it."""

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.clients.chat_page import ADMIN_KEY, API_KEY
from tests.support.servers.server_process import TUNING, ServerProcess, running
from tests.support.tuning.chat_model import make_chat_model
from tests.support.tuning.chats import chats
from tests.support.tuning.tune_page import TRAINED_MS, call


@pytest.fixture(scope="package")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model with keys."""
    del browser  # without one nothing is started
    folder = tmp_path_factory.mktemp("tune")
    flags = ["--model", str(make_chat_model(folder / "model")), "--served-model-name", "tiny"]
    flags += ["--data-dir", str(folder / "data"), "--fine-tuning", "cpu"]
    with running(TUNING, *flags, "--api-key", API_KEY, "--admin-api-key", ADMIN_KEY) as server:
        yield server


@pytest.fixture
def tuned(server: ServerProcess) -> ServerProcess:
    """With a job of the operator, pirate, that has succeeded: that of the first test, unless it was not run."""

    def found() -> bool:
        jobs = call(server, "fine_tuning/jobs")["data"]
        return any(job["status"] == "succeeded" and job["user_provided_suffix"] == "pirate" for job in jobs)

    if not found():
        training, validation = (
            call(server, "files", files={"file": ("a.jsonl", chats(number)), "purpose": (None, "fine-tune")})["id"]
            for number in (8, 2)
        )
        files = {"training_file": training, "validation_file": validation}
        call(server, "fine_tuning/jobs", model="tiny", suffix="pirate", hyperparameters={"n_epochs": 1}, **files)
        deadline_s = time.monotonic() + TRAINED_MS / 1000
        while not found():
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
    return server
