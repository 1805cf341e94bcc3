"""The status page: adapters are loaded, replaced and unloaded there, and its charts get points."""

import re

from playwright.sync_api import Page, expect

from tests.support.clients.chat_page import ADMIN_KEY, API_KEY, LIMIT_MS, OpenPage
from tests.support.servers.server_process import FAKE, ServerProcess, running

expect.set_options(timeout=LIMIT_MS)
BOTH = {"key": API_KEY, "admin-key": ADMIN_KEY}


def load(page: Page, name: str, path: str, in_place: bool = False) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Path").fill(path)
    page.get_by_label("Replace an adapter").set_checked(in_place)
    page.get_by_role("button", name="Load", exact=True).click()


def test_adapters_are_loaded_replaced_and_unloaded(open_page: OpenPage, guarded_server: ServerProcess) -> None:
    watched = open_page(guarded_server, "/status", BOTH)
    page = watched.page
    expect(page.locator("#connection")).to_have_text("Ready")
    expect(page.locator("#version")).to_have_text(re.compile(r"\d+\.\d+"))
    expect(page.locator("#model")).to_have_text("tiny")
    load(page, "mine", "red")
    expect(page.locator("#outcome")).to_contain_text("mine is loaded:")
    row = page.get_by_role("row", name=re.compile("^mine"))
    expect(row).to_contain_text("ready")
    before = row.locator(".hash").inner_text()
    watched.expected = ["status of 400"]
    load(page, "mine", "blue")
    expect(page.locator("#outcome .bad")).to_contain_text("The server refused the request.")
    load(page, "mine", "blue", in_place=True)
    expect(page.locator("#outcome")).to_contain_text("mine is loaded:")
    expect(row.locator(".hash")).to_have_count(1)  # while it is loaded, both versions may be shown
    expect(row.locator(".hash")).not_to_have_text(before)
    load(page, "", "")
    expect(page.locator("#adapter-name-problem")).to_have_text("The adapter needs a name.")
    expect(page.locator("#adapter-path-problem")).to_have_text("The adapter needs a path.")
    unload = page.get_by_role("button", name="Unload mine")
    unload.click()
    expect(unload).to_have_text("Sure?")
    unload.click()
    expect(page.locator("#outcome")).to_contain_text("mine is unloaded:")
    expect(row).to_have_count(0)


def test_without_the_admin_key_nothing_is_loaded(open_page: OpenPage, guarded_server: ServerProcess) -> None:
    watched = open_page(guarded_server, "/status")
    watched.expected = ["status of 40[13]"]
    page = watched.page
    expect(page.locator("#banner")).to_contain_text("This server needs an API key.")
    page.get_by_label("API key").fill(API_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_be_empty()
    page.get_by_label("Admin key").fill(API_KEY)
    load(page, "mine", "red")
    expect(page.locator("#outcome")).to_contain_text("This key may not do that.")
    page.get_by_label("Admin key").fill("")
    load(page, "mine", "red")
    expect(page.locator("#outcome")).to_contain_text("The server needs a valid API key.")


def test_charts_get_a_point_each_second_and_pause_while_nobody_looks(
    open_page: OpenPage, echo_server: ServerProcess
) -> None:
    page = open_page(echo_server, "/status").page
    lines = page.locator(".line")
    expect(lines).to_have_count(4)  # tokens; running, waiting; cache
    for i in range(4):
        expect(lines.nth(i)).to_have_attribute("d", re.compile(r"^M[\d.]+ [\d.]+L[\d.]+ [\d.]+"))
    chat = page.context.new_page()
    chat.goto(echo_server.url)
    chat.fill("#question", "!slow words")
    expect(chat.locator("#send")).to_be_enabled()
    chat.press("#question", "Enter")
    expect(page.locator(".chart-card").nth(1)).to_contain_text("1 running")
    expect(page.locator(".chart-card").nth(0).locator("b")).to_have_text(re.compile(r"^[1-9]"))
    expect(page.locator(".chart").nth(1)).to_have_attribute("aria-label", re.compile("^Requests: 1 running"))
    chat.close()
    expect(page.locator(".chart-card").nth(1)).to_contain_text("0 running")
    width = page.locator(".chart").nth(1).bounding_box()["width"]
    page.locator(".chart").nth(1).hover(position={"x": width - 2, "y": 40})
    expect(page.locator(".chart-readout").nth(1)).to_have_text("0 running · 0 waiting")
    page.evaluate("""() => {
      Object.defineProperty(document, "hidden", { value: true, configurable: true });
      performance.clearResourceTimings();
    }""")
    page.wait_for_timeout(3500)  # three rounds or more, if there were any
    asked = page.evaluate("performance.getEntriesByType('resource').map(({ name }) => new URL(name).pathname)")
    assert asked.count("/metrics") <= 1  # one that was on its way
    with page.expect_response("**/metrics"):
        page.evaluate("delete document.hidden")


def test_a_server_that_ends_is_told(open_page: OpenPage, echo_model: str) -> None:
    with running(FAKE, "--model", echo_model) as server:
        watched = open_page(server, "/status")
        watched.expected = [r"net::ERR_"]
        expect(watched.page.locator("#connection")).to_have_text("Ready")
    expect(watched.page.locator("#connection")).to_have_text("Not reachable")
    expect(watched.page.locator("#banner")).to_contain_text("The server does not answer.")
