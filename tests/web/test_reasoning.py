"""The reasoning of a model, folded above its answer; the model repeats what it is asked."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage, ask
from tests.support.servers.reasoning_server import make_model_folder
from tests.support.servers.server_process import REASONING, ServerProcess, running

expect.set_options(timeout=LIMIT_MS)
ASKED = "<think>\nFirst <b>this</b>, then that.\n</think>\n\nIt is **Paris**."


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    del browser  # without one nothing is started
    with running(REASONING, "--model", str(make_model_folder(tmp_path_factory.mktemp("web") / "thinker"))) as server:
        yield server


def test_reasoning_is_folded_above_the_answer_and_opened_from_the_keyboard(
    open_page: OpenPage, server: ServerProcess
) -> None:
    page = open_page(server).page
    ask(page, ASKED)
    answer = page.locator(".answer[data-state=done]")
    expect(answer.locator("strong")).to_have_text("Paris")
    assert "think" not in answer.locator(".markdown").inner_text()
    fold, text = answer.locator("details.reasoning"), answer.locator(".reasoning-text")
    expect(fold.locator("summary")).to_have_text("Reasoning")
    expect(text).to_be_hidden()
    fold.locator("summary").press("Enter")
    expect(text).to_be_visible()
    assert text.inner_text().strip() == "First <b>this</b>, then that."  # as text, not as marks
    page.reload()
    expect(page.locator(".answer details.reasoning summary")).to_be_visible()


def test_an_answer_without_reasoning_has_no_fold(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server).page
    ask(page, "just an answer")
    expect(page.locator(".answer[data-state=done]")).to_contain_text("just an answer")
    expect(page.locator(".answer details.reasoning")).to_be_hidden()
