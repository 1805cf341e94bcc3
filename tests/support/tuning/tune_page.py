"""What the tests of the page for fine-tuning share: examples, and calls of its server."""

from typing import Any

import httpx
from playwright.sync_api import Page, expect

from tests.support.clients.chat_page import ADMIN_KEY
from tests.support.servers.server_process import ServerProcess

TRAINED_MS = 120_000  # for a job of some dozen steps, on a busy machine
OPERATOR = {"key": ADMIN_KEY}
PAIRS = "\n\n".join(f"q{index}?\naye aye {index % 3}" for index in range(40))


def call(server: ServerProcess, path: str, key: str = ADMIN_KEY, **body: Any) -> dict[str, Any]:
    """POST with fields, else GET."""
    method = "POST" if body else "GET"
    headers = {"Authorization": f"Bearer {key}"}
    form: Any = body if "files" in body else ({"json": body} if body else {})
    answer = httpx.request(method, f"{server.url}/v1/{path}", headers=headers, timeout=60, **form)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def paste(page: Page, text: str) -> None:
    """As from the clipboard, all at once."""
    expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
    page.locator("#examples").focus()
    page.locator("#examples").select_text()
    page.keyboard.insert_text(text)
