"""The chat page when one thing comes between another: a refusal after an answer, an edit or Escape during one."""

import re

import pytest
from playwright.sync_api import expect

from tests.support.clients.chat_page import LIMIT_MS, STATUS_IN_CONSOLE, OpenPage, ask
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)


@pytest.mark.slow
def test_a_good_answer_stays_if_another_one_is_refused(open_page: OpenPage, echo_server: ServerProcess) -> None:
    watched = open_page(echo_server)
    watched.expected = [STATUS_IN_CONSOLE]
    page = watched.page
    ask(page, "precious", max_tokens=13)
    expect(page.locator(".answer[data-state=done]")).to_contain_text("precious")
    expect(page.locator("#announcer")).to_contain_text("precious")
    error = {"message": "Full.", "type": "x", "param": None, "code": None}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": error}))
    page.focus(".regenerate")
    page.keyboard.press("Enter")
    expect(page.locator("#composer-problem")).to_contain_text("Full.")
    expect(page.locator(".answer[data-state=done]")).to_contain_text("precious")
    expect(page.locator("#announcer")).to_have_text(re.compile("^Too many requests"))
    expect(page.locator("#question")).to_be_focused()


def test_escape_in_the_settings_closes_them_and_stops_nothing(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    page.route("**/v1/chat/completions", lambda _: None)
    ask(page, "Hi")
    page.click("#settings-toggle")
    page.focus("#system")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#settings-toggle")).to_be_focused()
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)


@pytest.mark.slow
def test_an_edit_leaves_a_column_alone_that_is_answering(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    ask(page, "old", max_tokens=5)
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.click("#compare")
    page.route("**/v1/chat/completions", lambda _: None)
    ask(page, "same")
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(2)
    page.click("#stop")
    expect(page.locator(".answer[data-state=stopped]")).to_have_count(2)
    page.locator(".column").nth(0).locator(".edit").last.click()
    page.locator(".column").nth(1).locator(".regenerate").click()
    page.locator(".editor textarea").fill("new")
    page.locator(".editor textarea").press("Enter")
    expect(page.locator(".column").nth(0).locator(".bubble")).to_have_text(["old", "new"])
    page.click("#stop")
    page.click("#compare")
    expect(page.locator(".column").nth(1).locator(".bubble")).to_have_text(["same"])
