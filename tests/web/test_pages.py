"""Both pages for everybody: in Chinese, on phones, in both themes, by keyboard, for screen readers."""

import json
import math
import re

import pytest
from playwright.sync_api import Page, expect

from tests.support.cases import each_value_once, some
from tests.support.clients.chat_page import ADMIN_KEY, API_KEY, LIMIT_MS, OpenPage
from tests.support.clients.looks import OUTSIDE, serious_violations
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)
BOTH = {"key": API_KEY, "admin-key": ADMIN_KEY}
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True}
MARKDOWN = (
    "# A\n\n- **b** `c`\n\n> d\n\n| e | f |\n|---|---|\n| 1 | 2 |\n\n```js\nlet x;\n```\n\n[g](https://x.example)"
)
TOKENS = [
    {"token": text, "logprob": math.log((i + 0.5) / 10), "bytes": list(text.encode()), "top_logprobs": []}
    for i, text in enumerate(("The", " capital", " of", " France", " is", " Paris", ",", " of", " course", "."))
]


def fill(page: Page, path: str) -> None:
    """Let a page show all that it can: an answer, as Markdown or as tokens, that was cut off; or an adapter."""
    if path == "/status":
        page.fill("#adapter-name", "customer-support-v2")
        page.fill("#adapter-path", "red")
        page.check("#in-place")
        page.click("#load-button")
        expect(page.locator("#outcome")).to_contain_text("customer-support-v2")
        return
    choice = {"delta": {"content": MARKDOWN}, "logprobs": {"content": TOKENS}, "finish_reason": None}
    event = f"data: {json.dumps({'choices': [choice]})}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=event))
    expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
    page.fill("#question", "Hi")
    page.press("#question", "Enter")
    expect(page.locator(".failure")).to_be_visible()
    page.click("#settings-toggle")


@pytest.mark.parametrize(("path", "theme"), each_value_once(["/", "/status"], ["dark", "light"]))
def test_axe_finds_nothing_serious(open_page: OpenPage, guarded_server: ServerProcess, path: str, theme: str) -> None:
    page = open_page(guarded_server, path, BOTH, color_scheme=theme, bypass_csp=True).page  # axe is a script of its own
    fill(page, path)
    assert serious_violations(page) == []
    if path == "/":
        page.click("#probabilities")
        page.hover(".token >> nth=3")
        expect(page.locator("#token-card")).to_be_visible()
        assert serious_violations(page) == []


@pytest.mark.parametrize("theme", some(["light", "dark"], 0))
def test_axe_finds_nothing_serious_side_by_side_on_a_phone(
    open_page: OpenPage, guarded_server: ServerProcess, theme: str
) -> None:
    page = open_page(guarded_server, "/", BOTH, color_scheme=theme, bypass_csp=True, **PHONE).page
    fill(page, "/")
    page.click("#settings-close")
    page.click("#compare")
    page.fill("#question", "Hi")
    page.press("#question", "Enter")
    expect(page.locator(".failure")).to_have_count(3)
    assert serious_violations(page) == []
    page.click("#probabilities")
    assert serious_violations(page) == []


@pytest.mark.parametrize("path", ["/", "/status"])
def test_a_phone_needs_no_scrolling_sideways(open_page: OpenPage, guarded_server: ServerProcess, path: str) -> None:
    page = open_page(guarded_server, path, BOTH, **PHONE).page
    fill(page, path)
    if path == "/":
        expect(page.locator("main")).to_have_attribute("inert", "")
    for language in ("en", "zh"):
        page.select_option("#language", language)
        for width in (320, 360):
            page.set_viewport_size({"width": width, "height": 640})
            assert_fits(page, width)
    if path == "/status":
        return
    page.click("#settings-close")
    for count in (2, 3):
        page.click("#compare")
        expect(page.locator(".column")).to_have_count(count)
    for language in ("en", "zh"):
        page.select_option("#language", language)
        for width in (320, 360):
            page.set_viewport_size({"width": width, "height": 640})
            for _ in range(2):
                page.click("#probabilities")
                assert_fits(page, width)


def assert_fits(page: Page, width: int) -> None:
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    assert page.evaluate(OUTSIDE, width) == []
    rows = page.locator(".composer-row, .bar").evaluate_all("(all) => all.map((one) => one.clientHeight)")
    assert max(rows) < 60  # in one line each


def test_the_language_is_the_browsers_until_another_is_chosen(
    open_page: OpenPage, guarded_server: ServerProcess
) -> None:
    page = open_page(guarded_server, "/", BOTH, locale="zh-CN").page
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("#connection")).to_have_text("就绪")
    expect(page.get_by_label("你的问题")).to_be_focused()
    expect(page.locator(".empty h2")).to_have_text("想了解什么？")
    page.click("#settings-toggle")
    page.fill("#sampling-temperature", "5")
    expect(page.locator("#sampling-temperature-problem")).to_have_text("必须在 0 到 2 之间。")
    page.fill("#sampling-temperature", "")
    page.get_by_role("link", name="状态").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("服务器状态")
    expect(page.locator(".chart-card h2").first).to_have_text("生成的词元")
    english = re.compile(r"[A-Za-z]{4,}")
    known = re.compile(r"StellarByte|English|adapter|tiny|customer-support|red|blue|dir|\b[0-9a-f]{8}\b")
    assert english.findall(known.sub("", page.locator("main").inner_text())) == []
    page.get_by_label("语言").select_option("en")
    expect(page.get_by_role("heading", level=1)).to_have_text("Server status")
    page.get_by_role("link", name="Chat").click()
    expect(page.locator(".empty h2")).to_have_text("What would you like to know?")


def test_the_theme_is_the_systems_until_another_is_chosen(open_page: OpenPage, guarded_server: ServerProcess) -> None:
    page = open_page(guarded_server, "/", BOTH, color_scheme="dark").page
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(15, 18, 25)"
    page.get_by_role("button", name="Use the light theme").click()
    assert page.evaluate(background) == "rgb(246, 247, 250)"
    page.reload()
    assert page.evaluate(background) == "rgb(246, 247, 250)"
    expect(page.get_by_role("button", name="Use the dark theme")).to_be_visible()


@pytest.mark.slow
def test_everything_is_reached_by_keyboard(open_page: OpenPage, guarded_server: ServerProcess) -> None:
    page = open_page(guarded_server, "/", BOTH, reduced_motion="reduce").page
    expect(page.locator("#connection")).to_have_text("Ready")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    expect(page.get_by_label("Your question")).to_have_value("first\nsecond")
    expect(page.locator(".question")).to_have_count(0)
    page.get_by_role("link", name="Skip to the question").press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"settings-toggle", "theme", "language", "model", "example"} <= reached
    page.locator("#settings-toggle").press("Enter")
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.get_by_label("System prompt").press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
