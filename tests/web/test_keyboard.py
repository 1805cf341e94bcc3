"""Both pages by keyboard alone: one order of focus, which is always seen, and is never lost by what a key does."""

import re

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.support.clients.chat_page import ADMIN_KEY, API_KEY, LIMIT_MS, OpenPage, ask
from tests.support.clients.looks import FOCUSED
from tests.support.servers.server_process import ServerProcess

expect.set_options(timeout=LIMIT_MS)
BOTH = {"key": API_KEY, "admin-key": ADMIN_KEY}
ORDERS = {
    "/": [
        *("skip", "brand", "Chat", "Status", "language", "theme", "settings-toggle"),
        *("model", "scale-slider", "scale-number", "thread", "example", "example", "example", "example"),
        *("question", "new-chat", "compare", "probabilities"),
    ],
    "/status": [
        *("skip", "brand", "Chat", "Status", "language", "theme"),
        *("table-frame", "unload", "adapter-name", "adapter-path", "in-place", "load-button", "key", "admin-key"),
    ],
}


@pytest.fixture
def adapter_server(guarded_server: ServerProcess) -> ServerProcess:
    """Serves the adapter red, and no other."""
    with httpx.Client(base_url=guarded_server.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}) as client:
        for entry in client.get("/v1/adapters").json()["data"]:
            client.post("/v1/unload_lora_adapter", json={"lora_name": entry["id"]})
        client.post("/v1/load_lora_adapter", json={"lora_name": "red", "lora_path": "red"}).raise_for_status()
    return guarded_server


def tab_to(page: Page, element_id: str, key: str = "Tab") -> None:
    for _ in range(30):
        if page.evaluate("document.activeElement.id") == element_id:
            return
        page.keyboard.press(key)
    raise AssertionError(f"{element_id} is not reached by {key}")


@pytest.mark.parametrize("path", ORDERS)
def test_the_focus_goes_through_the_page_once_and_is_always_seen(
    open_page: OpenPage, adapter_server: ServerProcess, path: str
) -> None:
    page = open_page(adapter_server, path, BOTH, reduced_motion="reduce").page
    expect(page.locator("#connection")).to_have_text("Ready")
    if path == "/":
        page.get_by_label("Model or adapter").select_option("red")
    else:
        expect(page.get_by_role("button", name="Unload red")).to_be_visible()
    page.focus(".skip")
    page.keyboard.press("Shift+Tab")  # as if nothing had had the focus yet
    found = []
    for _ in ORDERS[path]:
        page.keyboard.press("Tab")
        found.append(page.evaluate(FOCUSED))
    names = ["unload" if one["name"] == "Unload" else one["name"] for one in found]
    assert names == ORDERS[path]
    assert [one["name"] for one in found if not one["isSeen"]] == []


def test_a_chat_with_an_adapter_needs_no_pointer(open_page: OpenPage, adapter_server: ServerProcess) -> None:
    page = open_page(adapter_server, "/", BOTH).page
    expect(page.locator("#connection")).to_have_text("Ready")
    page.locator("#settings-toggle").press("Enter")
    tab_to(page, "sampling-max_tokens")
    page.keyboard.type("4")
    page.keyboard.press("Escape")
    expect(page.locator("#settings-toggle")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Model or adapter")).to_have_value("red")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".scale-number")).to_have_value("1.05")
    tab_to(page, "question")
    page.keyboard.type("Hi")
    tab_to(page, "send")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Space")
    assert (sent.value.post_data_json["model"], sent.value.post_data_json["adapter_scale"]) == ("red", 1.05)
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.keyboard.press("Shift+Tab")  # to the answer, whose last button is Regenerate
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Regenerate"


@pytest.mark.slow
def test_columns_are_added_and_removed_without_a_pointer(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    expect(page.locator("#connection")).to_have_text("Ready")
    tab_to(page, "compare")
    for count in (2, 3):
        page.keyboard.press("Enter")
        expect(page.locator(".column")).to_have_count(count)
        expect(page.locator("#compare")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#compare")).to_be_disabled()  # there is no room for a fifth
    expect(page.locator("#question")).to_be_focused()
    page.get_by_role("button", name="Remove this column").last.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".column")).to_have_count(3)
    expect(page.locator("#question")).to_be_focused()


@pytest.mark.slow
def test_the_focus_stays_when_an_answer_begins_and_ends(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    ask(page, "!slow words", max_tokens=40)
    tab_to(page, "stop")
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    expect(page.locator("#question")).to_be_focused()  # what had the focus is gone
    for way in ("Regenerate", "Edit the question"):
        page.get_by_role("button", name=way).focus()
        page.keyboard.press("Enter")
        if way == "Edit the question":
            page.keyboard.type("!slow others ")
            page.keyboard.press("Enter")
        expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)
        expect(page.locator("#question")).to_be_focused()
        tab_to(page, "stop")
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator("#question")).to_be_focused()


@pytest.mark.slow
def test_an_edit_that_is_left_gives_the_focus_back(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    ask(page, "old", max_tokens=5)
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.get_by_role("button", name="Edit the question").press("Enter")
    expect(page.get_by_role("textbox", name="Edit the question")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit the question")).to_be_focused()


def test_an_enter_or_escape_that_ends_a_composition_does_nothing_else(
    open_page: OpenPage, echo_server: ServerProcess
) -> None:
    """Both choose or leave what an input method offers, as for Chinese."""
    page = open_page(echo_server).page
    press = """(area, key) => area.dispatchEvent(
      new KeyboardEvent("keydown", { key, isComposing: true, bubbles: true, cancelable: true }))"""
    page.route("**/v1/chat/completions", lambda _: None)
    page.fill("#question", "ni hao")
    page.locator("#question").evaluate(press, "Enter")
    expect(page.locator(".question")).to_have_count(0)
    ask(page, "ni hao")
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)
    page.locator("#question").evaluate(press, "Escape")
    page.click("#settings-toggle")
    page.locator("#system").evaluate(press, "Escape")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator(".answer[data-state=streaming]")).to_have_count(1)


@pytest.mark.slow
def test_the_status_page_keeps_the_focus_where_it_was(open_page: OpenPage, adapter_server: ServerProcess) -> None:
    page = open_page(adapter_server, "/status", BOTH).page
    page.fill("#adapter-name", "blue")
    page.fill("#adapter-path", "blue")
    page.keyboard.press("Enter")
    expect(page.locator("#outcome")).to_contain_text("blue is loaded")
    expect(page.locator("#adapter-path")).to_be_focused()
    page.fill("#adapter-name", "red-2")
    page.locator("#load-button").press("Enter")
    expect(page.locator("#outcome")).to_contain_text("red-2 is loaded")
    expect(page.locator("#load-button")).to_be_focused()
    unload = page.get_by_role("button", name=re.compile("Unload blue"))
    unload.press("Enter")
    expect(unload).to_have_accessible_name("Sure? Unload blue")
    with httpx.Client(base_url=adapter_server.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}) as client:
        again = {"lora_name": "blue-2", "lora_path": "blue"}
        client.post("/v1/load_lora_adapter", json=again).raise_for_status()
    expect(page.get_by_role("button", name="Unload blue-2")).to_be_visible()  # all rows are new
    unload = page.get_by_role("button", name=re.compile("Unload blue$"))
    expect(unload).to_have_accessible_name("Sure? Unload blue")
    expect(unload).to_be_focused()
    page.keyboard.press("Tab")
    expect(unload).to_have_accessible_name("Unload blue")


@pytest.mark.slow
def test_a_copy_button_says_so_and_then_is_as_before(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server, permissions=["clipboard-read", "clipboard-write"]).page
    page.clock.install()
    page.reload()
    question = "```\n1\n```"
    ask(page, question, max_tokens=len(f"user\n{question}\n"))
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    copy = page.locator(".answer .copy")
    for _ in range(2):  # pressed again while it says so, it went on to say so
        copy.press("Enter")
        expect(copy).to_have_text("Copied")
    page.clock.fast_forward(1500)
    expect(copy).to_have_text("Copy")
    expect(copy).to_be_focused()
