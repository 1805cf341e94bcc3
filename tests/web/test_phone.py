"""The chat page where columns lie one below the other: it stays with the one that somebody looks at."""

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage, ask
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True}
TALL = "\n".join(f"line {i}" for i in range(40))


def two_columns(open_page: OpenPage, server: ServerProcess) -> tuple[Page, Locator, Locator]:
    page = open_page(server, **PHONE).page
    expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
    page.click("#compare")
    columns = page.locator(".column")
    expect(columns).to_have_count(2)
    return page, columns.nth(0), columns.nth(1)


def ask_both(page: Page, question: str, max_tokens: int) -> None:
    done = page.locator(".answer[data-state=done]")
    count = done.count()
    ask(page, question, max_tokens)
    expect(done).to_have_count(count + 2)


@pytest.mark.slow
def test_a_new_question_stays_with_the_column_that_is_looked_at(
    open_page: OpenPage, echo_server: ServerProcess
) -> None:
    """Each column scrolled its own answer into view, so that the last one always won."""
    page, first, second = two_columns(open_page, echo_server)
    ask_both(page, TALL, max_tokens=300)
    expect(first.locator(".answer .strip").last).to_be_in_viewport()
    expect(second).not_to_be_in_viewport()
    ask_both(page, "to the first", max_tokens=20)
    expect(first.locator(".question").last).to_be_in_viewport()
    expect(second.locator(".question").last).not_to_be_in_viewport()
    page.locator("#columns").evaluate("(columns) => { columns.scrollTop = columns.scrollHeight; }")
    ask_both(page, "to the second", max_tokens=20)
    expect(second.locator(".question").last).to_be_in_viewport()
    expect(first.locator(".question").last).not_to_be_in_viewport()
    page.click("#probabilities")  # shows everything anew
    expect(second.locator(".question").last).to_be_in_viewport()


@pytest.mark.slow
def test_an_answer_is_followed_while_those_above_it_grow(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page, first, second = two_columns(open_page, echo_server)
    ask_both(page, TALL, max_tokens=300)
    page.locator("#columns").evaluate("(columns) => { columns.scrollTop = columns.scrollHeight; }")
    ask_both(page, f"!slow\n{TALL}", max_tokens=95)
    expect(first.locator(".answer .markdown").last).to_contain_text("line 10")
    expect(second.locator(".answer .strip").last).to_be_in_viewport()
    expect(first.locator(".answer .strip").last).not_to_be_in_viewport()


def test_a_column_that_is_added_is_seen(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server, **PHONE).page
    ask(page, TALL, max_tokens=300)
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.click("#compare")
    expect(page.get_by_label("Model or adapter").nth(1)).to_be_in_viewport()


def test_the_page_begins_at_its_top(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server, **{"viewport": {"width": 320, "height": 480}, "has_touch": True}).page
    expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
    expect(page.locator(".empty img")).to_be_in_viewport()
    page.click("#new-chat")
    expect(page.locator(".empty img")).to_be_in_viewport()
