"""An answer as its tokens: text for those who listen, tokens one by one for whoever asks, and a card that goes away."""

import json
import math

import pytest
from playwright.sync_api import Page, Route, expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)
TEXT = "# Answer\n\n- It is **Paris**."


def token(text: str, chance: float, data: bytes | None = None) -> dict[str, object]:
    return {"token": text, "logprob": math.log(chance), "bytes": list(text.encode() if data is None else data)}


TOKENS = [token("# Answer", 0.9), token("\n\n- It", 0.75), token(" is", 0.5), token(" **Paris**.", 0.25)]
OTHERS = [token(" was", 0.3), token("\ufffd", 0.1, b"\xe4"), token("\ufffd", 0.05, b"\xe5")]


def answer(tokens: list[dict[str, object]], text: str) -> str:
    content = [one | {"top_logprobs": [one, *OTHERS]} for one in tokens]
    chunks = [
        {"choices": [{"delta": {"content": text}, "logprobs": {"content": content}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def show_tokens(page: Page, body: str) -> None:
    def fulfill(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfill)
    expect(page.locator("#connection")).to_have_text("Ready")
    page.click("#probabilities")
    page.fill("#question", "Where?")
    page.press("#question", "Enter")
    expect(page.locator(".answer[data-state=done] .tokens")).to_be_visible()


@pytest.fixture
def page(open_page: OpenPage, echo_server: ServerProcess) -> Page:
    page = open_page(echo_server).page
    show_tokens(page, answer(TOKENS, TEXT))
    return page


def test_whoever_listens_hears_the_answer_and_then_tokens_one_by_one(page: Page) -> None:
    """Markdown's marks were read out, and all that a token's card shows was for the eyes only."""
    assert page.locator("#announcer").inner_text().strip() == "echo has answered: Answer It is Paris."
    expect(page.get_by_role("article", name="echo")).to_match_aria_snapshot("""
        - article "echo":
          - paragraph: Answer It is Paris.
          - listbox "Tokens of the answer; arrow keys go from one to the next":
            - option /^# Answer, probability 90%; alternatives. was 30%, .+ 10%, .+ 5%$/
            - option /^- It, probability 75%/
            - option /^is, probability 50%/
            - option /Paris.*, probability 25%/
    """)
    page.get_by_role("listbox").focus()
    expect(page.locator("#token-card")).to_be_visible()
    expect(page.locator("#token-card .card-row")).to_have_count(4)  # two of them have the same text, and other bytes
    assert "Alternatives" not in page.locator("body").aria_snapshot()


@pytest.mark.parametrize("button", ["#probabilities", "#new-chat"])
def test_the_card_goes_when_its_token_does(page: Page, button: str) -> None:
    """It stayed over whatever came next, until the pointer was moved."""
    page.locator(".token").nth(2).hover()
    expect(page.locator("#token-card")).to_be_visible()
    page.press(button, "Enter")
    expect(page.locator(".token")).to_have_count(0)
    expect(page.locator("#token-card")).to_be_hidden()


@pytest.mark.slow
def test_arrow_keys_bring_tokens_into_sight_with_their_card(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    show_tokens(page, answer([token(f"{i}\n", 0.5) for i in range(100)], "long"))
    page.get_by_role("listbox").focus()
    for key, row in (("Home", "0\\n"), ("End", "99\\n"), ("ArrowLeft", "98\\n"), ("ArrowLeft", "97\\n")):
        page.keyboard.press(key)
        expect(page.locator(".token.active")).to_be_in_viewport()
        expect(page.locator("#token-card .chosen code")).to_have_text(row)
        beside = page.locator(".token.active").bounding_box()
        card = page.locator("#token-card").bounding_box()
        assert (
            abs(card["y"] - beside["y"] - beside["height"]) < 20 or abs(card["y"] + card["height"] - beside["y"]) < 20
        )


@pytest.mark.slow
def test_where_somebody_reads_stays_in_sight(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    show_tokens(page, answer([token("word ", 0.5) for i in range(100)], "\n\n".join("word" for _ in range(100))))
    page.click("#probabilities")
    thread = page.locator(".thread")
    thread.evaluate("(thread) => { thread.scrollTop = 200; }")
    page.select_option("#language", "zh")
    assert thread.evaluate("(thread) => thread.scrollTop") == 200
    page.click("#compare")
    assert thread.first.evaluate("(thread) => thread.scrollTop") == 200
