"""A server that takes requests and then does nothing: both pages say so, stop waiting, and see it come back."""

import os
import re
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.clients.chat_page import GONE_IN_CONSOLE, LIMIT_MS, STATUS_IN_CONSOLE, OpenPage, ask
from tests.support.servers.server_process import FAKE, ServerProcess, running

expect.set_options(timeout=LIMIT_MS)
SILENT = re.compile(r"^Nothing has come for \d+ s\. The server may be busy, or may hang; Stop ends the wait\.$")


@pytest.fixture(scope="module")
def own_server(browser: Browser, echo_model: str) -> Iterator[ServerProcess]:
    """A server that only these tests ask, so that it may be halted."""
    del browser  # without one nothing is started
    with running(FAKE, "--model", echo_model) as server:
        yield server


@pytest.fixture
def page(open_page: OpenPage, own_server: ServerProcess) -> Iterator[Page]:
    """Its clock can be put forward; its server, if it was halted, goes on at the end."""
    watched = open_page(own_server)
    watched.expected = [GONE_IN_CONSOLE, STATUS_IN_CONSOLE]
    watched.page.clock.install()
    watched.page.reload()
    yield watched.page
    os.kill(own_server.process.pid, signal.SIGCONT)


def let_time_pass(page: Page) -> None:
    """Ten seconds without anything; again if a piece of the answer was still on its way."""
    for _ in range(10):
        page.clock.fast_forward(10_000)
        if page.locator(".note").inner_text() != "":
            return


def test_a_stream_that_stands_still_is_told_and_can_be_stopped(page: Page, own_server: ServerProcess) -> None:
    ask(page, "!slow words")
    expect(page.locator(".answer .markdown")).to_contain_text("words")
    status = page.context.new_page()
    status.goto(f"{own_server.url}/status")
    expect(status.locator("#connection")).to_have_text("Ready")
    page.bring_to_front()
    os.kill(own_server.process.pid, signal.SIGSTOP)
    let_time_pass(page)
    expect(page.locator(".note")).to_have_text(SILENT)
    expect(page.locator("#announcer")).to_contain_text("Nothing has come for 10 s.")
    for _ in range(15):  # seconds of both pages; what they only read may take five of them
        page.clock.fast_forward(1_000)
    expect(page.locator("#banner")).to_contain_text("The server does not answer.")
    expect(page.locator("#connection")).to_have_text("Not reachable")
    expect(status.locator("#banner")).to_contain_text("The server does not answer.")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.locator(".answer[data-state=stopped] .markdown")).to_contain_text("words")
    os.kill(own_server.process.pid, signal.SIGCONT)
    expect(page.locator("#banner")).to_contain_text("The server is back.")
    expect(status.locator("#connection")).to_have_text("Ready")


def test_a_request_that_is_never_answered_is_told_and_can_be_stopped(page: Page, own_server: ServerProcess) -> None:
    expect(page.locator("#connection")).to_have_text("Ready")
    os.kill(own_server.process.pid, signal.SIGSTOP)
    ask(page, "Hi")
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)
    let_time_pass(page)
    expect(page.locator(".note")).to_have_text(SILENT)
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_an_engine_that_stands_still_is_told_with_the_servers_reason(page: Page) -> None:
    """The server itself answers, and the stream stays open: only its health tells that nothing will come."""
    page.route(
        "**/ready",
        lambda route: route.fulfill(status=503, json={"error": {"message": "The engine makes no progress."}}),
    )
    page.route("**/v1/chat/completions", lambda _: None)
    expect(page.locator("#connection")).to_have_text("Ready")
    ask(page, "Hi")
    let_time_pass(page)
    expect(page.locator("#banner")).to_contain_text("The server is not ready: The engine makes no progress.")
    expect(page.locator("#connection")).to_have_text("Not ready")
