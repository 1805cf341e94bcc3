"""A page of the web client in a browser, watched for everything that goes wrong."""

import re
from collections.abc import Callable

from playwright.sync_api import ConsoleMessage, Page, Request, expect

# What the browser itself writes for an answer that is an error, or for none.
STATUS_IN_CONSOLE = r"Failed to load resource: the server responded with a status of (4\d\d|5\d\d)"


GONE_IN_CONSOLE = r"Failed to load resource: net::ERR_"


def ask(page: Page, question: str, max_tokens: int | None = None) -> None:
    if max_tokens is not None:
        if page.locator("#settings").is_hidden():
            page.click("#settings-toggle")
        page.fill("#sampling-max_tokens", str(max_tokens))
        page.click("#settings-close")
    expect(page.locator("#connection")).to_have_text("Ready")
    page.fill("#question", question)
    page.press("#question", "Enter")


API_KEY, ADMIN_KEY = "key-of-a-user", "key-of-the-operator"
LIMIT_MS = 20_000


OpenPage = Callable[..., "WatchedPage"]


class WatchedPage:
    """A page of one server, and everything that was wrong with it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.wrong: list[str] = []
        self.expected: list[str] = []  # patterns of what a test is about
        page.set_default_timeout(LIMIT_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._note(f"uncaught: {error}"))
        page.on("request", self._on_request)
        page.on("popup", lambda popup: self._note(f"a window opened: {popup.url}"))
        page.on("dialog", lambda dialog: self._note(f"a dialog: {dialog.message}"))

    def _note(self, what: str) -> None:
        if not any(re.search(pattern, what) for pattern in self.expected):
            self.wrong.append(what)

    def _on_console(self, message: ConsoleMessage) -> None:
        """Errors, and what the browser says of the content security policy."""
        if message.type in ("error", "warning"):
            self._note(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.url}/", "data:")):
            self._note(f"another origin: {request.url}")
