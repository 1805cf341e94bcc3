"""The chat page with the demo model, as its users have it: asks, streams, stops, compares, shows probabilities."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage
from tests.support.servers.server_process import ServerProcess

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
expect.set_options(timeout=LIMIT_MS)
# How long the answer's text is, each time that it changes before the answer is finished.
NOTE_TEXTS = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const text = document.querySelector(".answer[data-state=streaming] .markdown")?.textContent;
    if (text !== undefined && text.length !== window.lengths.at(-1)) window.lengths.push(text.length);
  }).observe(document.body, { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture
def page(open_page: OpenPage, demo_server: ServerProcess) -> Page:
    """With answers that are always the same, and not long."""
    page = open_page(demo_server).page
    expect(page.locator("#connection")).to_have_text("Ready")
    page.click("#settings-toggle")
    page.fill("#sampling-temperature", "0")
    page.fill("#sampling-max_tokens", "40")
    page.click("#settings-close")
    return page


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def finished(page: Page, count: int) -> None:
    expect(page.locator(".answer[data-state=done]")).to_have_count(count)


def test_an_answer_streams_and_is_kept_when_the_page_is_loaded_again(page: Page) -> None:
    page.evaluate(NOTE_TEXTS)
    ask(page, "Tell a long story.")
    finished(page, 1)
    text = page.locator(".answer .markdown")
    lengths = page.evaluate("window.lengths")
    assert len(lengths) > 5 and lengths == sorted(lengths)
    assert 0 < lengths[1] < len(text.inner_text())
    strip = page.locator(".answer .strip")
    expect(strip).to_contain_text(MODEL)
    expect(strip.locator(".rate")).to_have_text(re.compile(r"[\d.]+ tok/s"))
    expect(strip.locator(".first-token")).to_have_text(re.compile(r"first token [\d,]+ ms"))
    expect(strip.locator(".counts")).to_have_text(re.compile(r"\d+ → 40 tokens"))
    expect(strip.locator(".cached")).to_have_text(re.compile(r"\d+ cached"))
    expect(page.locator(".note")).to_have_text("Cut at the token limit.")
    expect(page.locator("#announcer")).to_contain_text(f"{MODEL} has answered")
    whole = text.inner_text()
    page.reload()
    expect(text).to_have_text(whole, use_inner_text=True)
    page.click("#new-chat")
    expect(page.locator(".answer")).to_have_count(0)


def test_a_conversation_goes_on_and_its_last_question_can_be_edited_and_answered_again(page: Page) -> None:
    ask(page, QUESTION)
    finished(page, 1)
    expect(page.locator(".answer .markdown")).to_have_text("The capital of France is Paris.")
    page.click(".regenerate")
    finished(page, 1)
    expect(page.locator(".answer .markdown")).to_have_text("The capital of France is Paris.")
    ask(page, "And of Italy?")
    finished(page, 2)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator(".question .edit").last.click()
        page.get_by_role("textbox", name="Edit the question").fill("And of Spain?")
        page.keyboard.press("Enter")
    contents = [message["content"] for message in sent.value.post_data_json["messages"]]
    assert contents == [QUESTION, "The capital of France is Paris.", "And of Spain?"]
    finished(page, 2)
    expect(page.locator(".bubble")).to_have_text([QUESTION, "And of Spain?"])


def test_two_columns_answer_at_once_each_by_its_own_model_and_scale(page: Page) -> None:
    page.click("#compare")
    models = page.get_by_label("Model or adapter")
    expect(models).to_have_count(2)
    assert [models.nth(i).input_value() for i in range(2)] == [MODEL, "noise"]
    columns = page.locator(".column")
    expect(columns.nth(0).locator(".scale")).to_be_hidden()
    ask(page, QUESTION)
    finished(page, 2)
    answers = columns.locator(".answer .markdown")
    assert answers.nth(0).inner_text() == "The capital of France is Paris."
    assert answers.nth(1).inner_text() != answers.nth(0).inner_text()
    # Without strength the adapter's answer is the model's.
    columns.nth(1).locator(".scale-slider").fill("0")
    with page.expect_request("**/v1/chat/completions") as sent:
        columns.nth(1).locator(".regenerate").click()
    assert sent.value.post_data_json["adapter_scale"] == 0 and sent.value.post_data_json["model"] == "noise"
    finished(page, 2)
    expect(answers.nth(1)).to_have_text("The capital of France is Paris.")
    columns.nth(1).locator(".scale-number").fill("9")
    expect(columns.nth(1).locator(".scale-number")).to_have_attribute("aria-invalid", "true")
    # Each column has its own conversation; one that is removed takes it away.
    columns.nth(0).get_by_label("Remove this column").click()
    expect(columns).to_have_count(1)
    expect(page.get_by_label("Model or adapter")).to_have_value("noise")
    # The other way round: a column changes its adapter.
    page.get_by_label("Model or adapter").select_option(MODEL)
    expect(page.locator(".scale")).to_be_hidden()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click(".regenerate")
    assert sent.value.post_data_json["model"] == MODEL and "adapter_scale" not in sent.value.post_data_json


def test_probabilities_are_shown_by_pointer_and_by_keyboard(page: Page) -> None:
    page.click("#probabilities")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, QUESTION)
    assert sent.value.post_data_json["logprobs"] is True and sent.value.post_data_json["top_logprobs"] == 5
    finished(page, 1)
    tokens = page.get_by_role("listbox", name="Tokens of the answer").get_by_role("option")
    assert "".join(tokens.all_text_contents()) == "The capital of France is Paris."
    card = page.locator("#token-card")
    expect(card).to_be_hidden()
    page.get_by_text(" Paris", exact=True).hover()
    expect(card).to_be_visible()
    expect(card.locator(".card-row")).to_have_count(5)
    expect(card.locator(".chosen code")).to_have_text("␣Paris")
    page.mouse.move(0, 0)
    expect(card).to_be_hidden()
    page.get_by_role("listbox", name="Tokens of the answer").press("Home")
    expect(card.locator(".chosen code")).to_have_text("The")
    page.keyboard.press("ArrowRight")
    expect(card.locator(".chosen code")).to_have_text("␣capital")
    active = page.get_by_role("listbox", name="Tokens of the answer").get_attribute("aria-activedescendant")
    expect(page.locator(f"#{active}")).to_have_attribute("aria-label", re.compile(r"capital, probability \d+(\.\d)?%"))
    page.click("#probabilities")
    expect(page.locator(".answer .markdown")).to_have_text("The capital of France is Paris.")


def test_only_fields_that_were_set_are_sent_and_wrong_ones_are_told(page: Page) -> None:
    page.click("#settings-toggle")
    page.fill("#sampling-temperature", "hot")
    expect(page.locator("#sampling-temperature-problem")).to_have_text("This must be a number.")
    ask(page, QUESTION)
    expect(page.locator("#composer-problem")).to_be_visible()
    expect(page.locator("#sampling-temperature")).to_be_focused()
    expect(page.locator(".question")).to_have_count(0)
    page.fill("#sampling-temperature", "0")
    page.fill("#sampling-stop", "Paris")
    page.fill("#system", "Answer in one sentence.")
    page.select_option("#sampling-context_overflow", "slide")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.press("#question", "Enter")
    assert sent.value.post_data_json == {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 40,
        "stop": ["Paris"],
        "context_overflow": "slide",
        "stream_options": {"include_usage": True},
        "stream": True,
    }
    finished(page, 1)
    assert "Paris" not in page.locator(".answer .markdown").inner_text()
    page.click("#reset")
    expect(page.locator("#sampling-stop")).to_have_value("")
