"""The chat page when something fails, or wants to do harm: it says what is wrong, and shows it as text."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Route, expect

from tests.support.cases import some
from tests.support.clients.chat_page import API_KEY, GONE_IN_CONSOLE, LIMIT_MS, STATUS_IN_CONSOLE, OpenPage, ask
from tests.support.servers.server_process import FAKE, ServerProcess, running

expect.set_options(timeout=LIMIT_MS)


@pytest.mark.parametrize("way", some(["button", "Escape"], 1))
def test_an_answer_can_be_stopped_and_what_came_is_kept(
    open_page: OpenPage, echo_server: ServerProcess, way: str
) -> None:
    page = open_page(echo_server).page
    ask(page, "!slow words")
    expect(page.locator(".answer .markdown")).to_have_text(re.compile(r"words"))
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.locator(".answer .markdown")).to_have_text(re.compile(r"words"))
    expect(page.locator(".counts")).to_have_text(re.compile(r"^≥ \d+ tokens$"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    with page.expect_response(f"{echo_server.url}/metrics"):
        page.goto(f"{echo_server.url}/status")
    expect(page.locator(".value-0").nth(1)).to_have_text("0 running")


def test_a_server_that_ends_and_comes_back_is_told_and_asked_again(open_page: OpenPage, echo_model: str) -> None:
    with running(FAKE, "--model", echo_model) as first:
        watched = open_page(first)
        watched.expected = [GONE_IN_CONSOLE]
        page = watched.page
        ask(page, "!slow words", max_tokens=40)
        expect(page.locator(".answer .markdown")).to_have_text(re.compile(r"user"))
        first.process.kill()
        first.wait()
    expect(page.locator(".failure")).to_contain_text("The connection broke before the answer was complete.")
    expect(page.locator("#banner")).to_contain_text("The server does not answer.")
    expect(page.locator("#connection")).to_have_text("Not reachable")
    page.click(".failure .retry")
    expect(page.locator(".failure")).to_contain_text("The server could not be reached.")
    second = ServerProcess(FAKE, "--model", echo_model, port=first.port)
    try:
        expect(page.locator("#banner")).to_contain_text("The server is back.")
        expect(page.locator("#connection")).to_have_text("Ready")
        page.get_by_role("alert").get_by_role("button", name="Try again").click()
        expect(page.locator(".answer[data-state=done]")).to_have_count(1)
        expect(page.locator("#banner")).to_be_empty()
    finally:
        second.stop()


def test_a_server_with_keys_asks_for_one_and_says_when_it_is_wrong(
    open_page: OpenPage, guarded_server: ServerProcess
) -> None:
    watched = open_page(guarded_server)
    watched.expected = [STATUS_IN_CONSOLE]
    page = watched.page
    expect(page.locator("#banner")).to_contain_text("This server needs an API key.")
    expect(page.locator("#connection")).to_have_text("Key needed")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_have_text("Key needed")
    page.get_by_label("API key").fill("ключ")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_contain_text("ASCII")
    page.get_by_label("API key").fill(API_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_be_empty()
    ask(page, "Hi", max_tokens=5)
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    assert page.evaluate("[localStorage.length, sessionStorage['stellarbyte.key']]") == [0, API_KEY]


ERRORS = {  # what the page says, headers, and the buttons that may help
    400: ("The server refused the request.", {}, []),
    401: ("The server needs a valid API key.", {}, ["Enter a key", "Try again"]),
    403: ("This key may not do that.", {}, []),
    404: ("This model or adapter is no longer served.", {}, []),
    429: ("Try again in 7 s.", {"Retry-After": "7"}, ["Try again"]),
    500: ("The server failed to answer.", {}, ["Try again"]),
    503: ("The server cannot answer at the moment.", {"Retry-After": "5"}, ["Try again"]),
}


def test_an_answer_that_comes_late_does_not_count(open_page: OpenPage, guarded_server: ServerProcess) -> None:
    """The refusal of a first key came after the second one's answer, and the page asked for a key that it had."""
    watched = open_page(guarded_server)
    watched.expected = [STATUS_IN_CONSOLE]
    page = watched.page
    late: list[Route] = []
    page.route("**/v1/models", lambda route: late.append(route) if not late else route.continue_())
    page.get_by_role("button", name="Enter a key").click()
    with page.expect_request("**/v1/models"):
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
    page.get_by_label("API key").fill(API_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_have_text("Ready")
    with page.expect_response("**/v1/models"):
        late[0].continue_()
    expect(page.locator("#connection")).to_have_text("Ready")
    expect(page.locator("#banner")).to_be_empty()


@pytest.mark.parametrize("status", some(list(ERRORS), 0))
def test_each_refusal_is_told_in_a_sentence(open_page: OpenPage, echo_server: ServerProcess, status: int) -> None:
    watched = open_page(echo_server)
    watched.expected = [STATUS_IN_CONSOLE]
    page = watched.page
    sentence, headers, buttons = ERRORS[status]
    error = {"message": "The server's own words.", "type": "x", "param": None, "code": None}
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, json={"error": error})
    )
    ask(page, "Hi")
    expect(page.locator(".failure")).to_contain_text(sentence)
    expect(page.locator(".failure .detail")).to_have_text("The server's own words.")
    expect(page.locator(".failure button")).to_have_text(buttons)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()  # for whoever has changed what was wrong


def test_an_error_in_the_middle_of_an_answer_is_told(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    begun = 'data: {"choices": [{"delta": {"content": "Half an"}, "finish_reason": null}]}\n\n'
    failed = (
        'data: {"error": {"message": "The engine failed.", "type": "server_error", "param": null, "code": null}}\n\n'
    )

    def fail(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=begun + failed)

    page.route("**/v1/chat/completions", fail)
    ask(page, "Hi")
    expect(page.locator(".answer .markdown")).to_have_text("Half an")
    expect(page.locator(".failure")).to_contain_text("The server failed to answer.")
    expect(page.locator(".failure .detail")).to_have_text("The engine failed.")


MALICIOUS = """
<script>document.title = "owned"; fetch("http://127.0.0.1:9/script")</script>
<img src="http://127.0.0.1:9/beacon.png" onerror="document.title='owned'"> <svg onload="document.title='owned'">
![beacon](http://127.0.0.1:9/picture.png) [![x](http://127.0.0.1:9/i.png)](javascript:document.title='owned')
[js](javascript:document.title='owned') [data](data:text/html,<script>1</script>) <javascript:alert(1)>
[js2](java\tscript:alert(1)) [js3]( &#106;avascript:alert(1)) [vb](vbscript:x) [own](/v1/load_lora_adapter)
<style>body { display: none }</style> <iframe src="http://127.0.0.1:9/frame"></iframe> <base href="http://127.0.0.1:9/">
<form action="http://127.0.0.1:9/"><button>go</button></form> <a href="javascript:1" onclick="alert(1)">a</a>
```html onload=alert(1) "><script>
</code></pre><script>document.title = "owned"</script>
```
| <script>alert(1)</script> | ![b](http://127.0.0.1:9/cell.png) |
|---|---|
| <b>x</b> | \u202eevil\u0000 |

"""


def test_an_answer_that_wants_to_do_harm_is_text(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server).page
    prompt = f"user\n{MALICIOUS.strip()}\nassistant\n"
    ask(page, MALICIOUS, max_tokens=len(prompt.encode()))
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    answer = page.locator(".answer .markdown")
    expect(answer).to_contain_text("<script>document.title")
    assert page.title() == "StellarByte"
    harmful = "script, style, img, svg, iframe, object, embed, form, base, input, link, meta, video, audio"
    assert answer.locator(harmful).count() == 0
    expect(answer.locator("table")).to_have_count(1)
    links = answer.locator("a")
    assert {links.nth(i).get_attribute("href").partition("//")[0] for i in range(links.count())} == {"http:"}
    assert {links.nth(i).get_attribute("rel") for i in range(links.count())} == {"noopener noreferrer"}
    names = answer.locator("*").evaluate_all("(all) => all.flatMap((one) => one.getAttributeNames())")
    assert set(names) <= {"href", "rel", "target", "class", "type", "tabindex"}


def test_a_page_never_loads_what_an_answer_names(open_page: OpenPage, echo_server: ServerProcess) -> None:
    """If our own code made such elements after all, the policy would stop them before anything is sent."""
    watched = open_page(echo_server)
    watched.expected = [r"Content Security Policy", r"TrustedHTML", r"another origin: http://127.0.0.1:9/"]
    outcomes = watched.page.evaluate(
        """async () => {
          const outcomes = [];
          try { document.body.innerHTML = "<b>x</b>"; outcomes.push("html"); } catch { outcomes.push("no html"); }
          const image = new Image();
          image.src = "http://127.0.0.1:9/beacon.png";
          await new Promise((done) => { image.onerror = image.onload = done; });
          outcomes.push(image.naturalWidth);
          await fetch("http://127.0.0.1:9/").catch(() => outcomes.push("no fetch"));
          return outcomes;
        }"""
    )
    assert outcomes == ["no html", 0, "no fetch"]


@pytest.fixture
def markdown_page(open_page: OpenPage, echo_server: ServerProcess) -> Iterator[Page]:
    yield open_page(echo_server).page


SAMPLE = """# Title

Text with **bold**, `code` and a [link](https://x.example).
It goes on
***
1. one

   ```python
   print("hi")

   # still code
   ```
2. two
   > quote
lazy

| a | b |
|---|--:|
| 1 | 2 |
- x
- y

    indented
Setext
------
Words
| no |
|- table

Words
| c |
|-|
| d |
~~~
unclosed **fence**
"""


def test_text_that_grows_ends_as_if_it_had_come_at_once(markdown_page: Page) -> None:
    different = markdown_page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("./web/markdown.js");
          const grown = document.createElement("div");
          const view = new MarkdownView(grown, "Copy");
          const different = [];
          for (let length = 1; length <= text.length; length += 1) {
            view.update(text.slice(0, length));
            const whole = document.createElement("div");
            new MarkdownView(whole, "Copy").update(text.slice(0, length));
            if (grown.innerHTML !== whole.innerHTML) different.push([length, grown.innerHTML, whole.innerHTML]);
          }
          view.update("other");
          if (grown.innerHTML !== "<p>other</p>") different.push(grown.innerHTML);
          return different;
        }""",
        SAMPLE,
    )
    assert different == []


def test_code_can_be_copied(open_page: OpenPage, echo_server: ServerProcess) -> None:
    page = open_page(echo_server, permissions=["clipboard-read", "clipboard-write"]).page
    question = "```python\nprint(1)\n```"
    ask(page, question, max_tokens=len(f"user\n{question}\n".encode()))
    expect(page.locator(".answer .language")).to_have_text("python")
    expect(page.locator(".answer[data-state=done]")).to_have_count(1)
    page.locator(".answer .copy").click()
    expect(page.locator(".answer .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)\n"
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.locator(".copy-answer.done")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").startswith("user\n```python")
