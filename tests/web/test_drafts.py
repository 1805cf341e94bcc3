"""What somebody has typed is theirs: nothing that happens on the chat page takes it away before it is sent."""

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage, ask
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)
DRAFT = "a long and thoughtful edit"


@pytest.fixture
def page(open_page: OpenPage, echo_server: ServerProcess) -> Page:
    """With one question that is answered; the next answers never come."""
    page = open_page(echo_server).page
    ask(page, "first", max_tokens=5)
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.route("**/v1/chat/completions", lambda _: None)
    return page


def write_edit(page: Page) -> Locator:
    page.locator(".question .edit").last.click()
    area = page.get_by_role("textbox", name="Edit the question")
    area.fill(DRAFT)
    return area


def show_everything_anew(page: Page) -> None:
    page.click("#probabilities")
    page.select_option("#language", "zh")
    page.select_option("#language", "en")


def test_an_edit_waits_while_its_question_is_being_answered(page: Page) -> None:
    """It was gone: the page did not ask it, as the column was busy, and showed the old question in its place."""
    area = write_edit(page)
    page.click(".regenerate")
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)
    area.press("Enter")
    expect(page.locator(".editor .problem")).to_contain_text("This question is being answered.")
    show_everything_anew(page)
    expect(area).to_have_value(DRAFT)
    page.click("#stop")
    with page.expect_request("**/v1/chat/completions") as sent:
        area.press("Enter")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": DRAFT}]
    expect(page.locator(".bubble")).to_have_text([DRAFT])


@pytest.mark.slow
def test_an_edit_does_not_take_the_place_of_a_later_question(page: Page) -> None:
    area = write_edit(page)
    page.fill("#question", "second")
    page.press("#question", "Enter")
    area.press("Enter")
    expect(page.locator(".editor .problem")).to_contain_text("Another question has been asked since")
    page.click("#stop")
    expect(page.locator(".bubble")).to_have_text(["second"])
    area.press("Enter")
    show_everything_anew(page)
    expect(area).to_have_value(DRAFT)
    area.press("Escape")
    expect(page.locator(".bubble")).to_have_text(["first", "second"])


@pytest.mark.slow
def test_an_edit_stays_when_a_setting_is_wrong(page: Page) -> None:
    area = write_edit(page)
    page.click("#settings-toggle")
    page.fill("#sampling-temperature", "hot")
    area.press("Enter")
    expect(page.locator(".editor .problem")).to_contain_text("A sampling field is not valid")
    expect(page.locator("#sampling-temperature")).to_be_focused()
    show_everything_anew(page)
    expect(area).to_have_value(DRAFT)


def test_the_next_question_stays_until_it_is_sent(page: Page) -> None:
    page.click(".regenerate")
    page.fill("#question", DRAFT)
    page.press("#question", "Enter")
    expect(page.locator(".bubble")).to_have_text(["first"])
    page.keyboard.press("Escape")
    page.get_by_label("Model or adapter").select_option(index=0)
    expect(page.locator("#question")).to_have_value(DRAFT)
    page.reload()
    expect(page.locator("#question")).to_have_value(DRAFT)
    page.click("#new-chat")
    page.click(".example >> nth=0")
    expect(page.locator(".bubble")).to_have_text(["What is the capital of France?"])
    expect(page.locator("#question")).to_have_value(DRAFT)


@pytest.mark.slow
def test_an_answer_stays_if_another_try_is_stopped_before_it_has_any(page: Page) -> None:
    before = page.locator(".answer .markdown").inner_text()
    page.click(".regenerate")
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)
    page.click("#stop")
    expect(page.locator(".answer[data-state=done] .markdown")).to_have_text(before, use_inner_text=True)
