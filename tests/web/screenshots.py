"""Pictures of the pages as they are with the demo model: both themes, side by side, on a phone, the status page.

python -m tests.web.screenshots [--adapter-dir DIR] FOLDER
"""

import argparse
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.clients.chromium import FLAGS, find_chromium
from tests.support.servers.server_process import REAL, ServerProcess, running

QUESTION = "What is the capital of France?"
CODE_QUESTION = "Write a Python function that reverses a string."
LIMIT_MS = 120_000
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    parser.add_argument("--adapter-dir", help="adapters of the demo model, such as those of examples/adapters")
    arguments = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("there is no Chromium or Chrome on this machine")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=LIMIT_MS)
    adapters = sorted(path.name for path in Path(arguments.adapter_dir or "/nowhere").glob("*") if path.is_dir())
    flags = ["--lora-modules", *(f"{name}={arguments.adapter_dir}/{name}" for name in adapters)] if adapters else []
    with running(REAL, *flags) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for theme in ("light", "dark"):
            _take_all(browser, server, arguments.folder, theme)
        browser.close()
    print(f"wrote {arguments.folder}")


def _take_all(browser: Browser, server: ServerProcess, folder: Path, theme: str) -> None:
    def open_(path: str, **context: object) -> Page:
        context = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US", "color_scheme": theme} | context
        page = browser.new_context(**context).new_page()
        settings = '{"system": "", "texts": {"temperature": "0", "max_tokens": "150"}}'
        page.add_init_script(f"sessionStorage['stellarbyte.settings'] ??= '{settings}'")
        page.goto(server.url + path)
        expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
        return page

    def take(page: Page, name: str) -> None:
        page.wait_for_timeout(300)  # until nothing moves
        page.screenshot(path=folder / f"{name}{'' if theme == 'light' else '-dark'}.png")

    page = open_("/")
    take(page, "empty")
    page.click("#settings-toggle")
    page.click("#probabilities")
    _ask(page, QUESTION)
    page.click(".token >> nth=4")
    take(page, "probabilities")
    page.context.close()

    page = open_("/")
    _ask(page, CODE_QUESTION)
    take(page, "answer")
    status = page.context.new_page()
    status.goto(f"{server.url}/status")
    page.click("#compare")
    page.click("#compare")
    for _ in range(2):
        _ask(page, "Tell me a story about a lighthouse.", columns=3)
    expect(status.locator(".chart-card").first.locator("b")).to_have_text("0")
    take(status, "status")
    page.context.close()

    page = open_("/")
    count = min(3, max(2, page.locator("option[value]").count() - 2))  # of models; the two others are languages
    for number in range(1, count):
        page.click("#compare")
        expect(page.locator(".column")).to_have_count(number + 1)
    for question in (QUESTION, "Why is the sky blue?"):
        _ask(page, question, columns=count)
    page.mouse.move(0, 0)
    take(page, "compare")
    page.context.close()

    page = open_("/", **PHONE)
    _ask(page, CODE_QUESTION)
    take(page, "phone")
    page.click("#settings-toggle")
    take(page, "phone-settings")
    page.goto(f"{server.url}/status")
    take(page, "phone-status")
    page.context.close()

    page = open_("/", locale="zh-CN")
    take(page, "chinese")
    page.context.close()


def _ask(page: Page, question: str, columns: int = 1) -> None:
    done = page.locator(".answer[data-state=done]")
    count = done.count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    expect(done).to_have_count(count + columns)


if __name__ == "__main__":
    main()
