"""A browser for the tests of the pages, and the servers that they are of. Whatever a page does, it is watched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.source import resolve_model
from tests.support.clients.chat_page import ADMIN_KEY, API_KEY, OpenPage, WatchedPage
from tests.support.clients.chromium import FLAGS, find_chromium
from tests.support.models.adapters import write_adapter
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, running


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium or Chrome on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a path of a server in a browser without any past; the test fails for anything that is wrong there."""
    opened: list[WatchedPage] = []

    def open_(
        server: ServerProcess, path: str = "/", keys: dict[str, str] | None = None, **context: object
    ) -> WatchedPage:
        page = browser.new_context(
            **{"locale": "en-US", "viewport": {"width": 1280, "height": 800}} | context
        ).new_page()
        for name, key in (keys or {}).items():
            page.add_init_script(f"sessionStorage.setItem('stellarbyte.{name}', '{key}')")
        watched = WatchedPage(page, server.url)
        opened.append(watched)
        page.goto(server.url + path)
        return watched

    yield open_
    for watched in opened:
        watched.page.context.close()
    assert [wrong for watched in opened for wrong in watched.wrong] == []


@pytest.fixture(scope="package")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("web") / "echo"))


@pytest.fixture(scope="package")
def echo_server(browser: Browser, echo_model: str) -> Iterator[ServerProcess]:
    """The real HTTP process before an engine that repeats what it is asked, slowly if that has !slow in it."""
    del browser  # without one nothing is started
    with running(FAKE, "--model", echo_model) as server:
        yield server


@pytest.fixture(scope="package")
def guarded_server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model with keys, and adapters that can be loaded: red, blue."""
    del browser  # without one nothing is started
    folder = tmp_path_factory.mktemp("web")
    tiny = convert(tiny_llama(folder / "llama"), folder / "tiny")
    for seed, name in enumerate(("red", "blue")):
        write_adapter(folder / "adapters" / name, load_model(tiny), seed)
    keys = ["--api-key", API_KEY, "--admin-api-key", ADMIN_KEY]
    with running(REAL, "--model", str(tiny), "--adapter-dir", str(folder / "adapters"), *keys) as server:
        yield server


@pytest.fixture(scope="package")
def demo_server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model with an adapter, noise, that makes its answers others."""
    del browser  # without one nothing is started
    folder = tmp_path_factory.mktemp("web")
    noise = write_adapter(folder / "noise", load_model(Path(resolve_model("demo"))), seed=7, rank=1)
    with running(REAL, "--lora-modules", f"noise={noise}", "--max-num-seqs", "4") as server:
        yield server
