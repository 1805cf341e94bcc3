"""The page for fine-tuning: from pasted examples to a model that is live under a name, and back."""

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.support.clients.chat_page import ADMIN_KEY, API_KEY, LIMIT_MS, OpenPage
from tests.support.clients.looks import FOCUSED, OUTSIDE, serious_violations
from tests.support.servers.server_process import ServerProcess
from tests.support.tuning.tune_page import OPERATOR, PAIRS, TRAINED_MS, call, paste

pytest.importorskip("accelerate")
expect.set_options(timeout=LIMIT_MS)
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True}
CHECKED = {  # what the server finds in two examples, one of them held out; in the first test it does
    "examples": 1,
    "validation_examples": 1,
    "hyperparameters": {"n_epochs": 25},
    "steps": 25,
    "tokens": 500,
    "memory": 2**26,
    "seconds": 90.0,
    "problems": [],
}


def answers(page: Page) -> list[str]:
    expect(page.locator("#ask")).to_be_visible()
    return page.locator("#answers .answer[data-state=done] .markdown").all_inner_texts()


def test_examples_become_a_model_that_is_live_and_goes_back(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server, "/", OPERATOR).page
    page.get_by_role("link", name="Tune").click()
    paste(page, PAIRS)
    expect(page.locator("#read-summary")).to_have_text("Examples read: 40. Pairs in blocks.")
    expect(page.locator("#read .chat").nth(1)).to_have_text("Questionq1?Answeraye aye 1")
    page.get_by_label("Name", exact=True).fill("pirate")
    page.get_by_label("Epochs").fill("10")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#check-result")).to_contain_text("Checked: 36 to learn. 4 held out.", timeout=TRAINED_MS)
    expect(page.locator("#check-result")).to_contain_text(re.compile(r"Steps: 45, epochs: 10, tokens: [\d,]+\."))

    page.get_by_role("button", name="Start training").click()
    view = page.locator("#job .job")
    expect(view.locator(".badge")).to_have_text("training", timeout=TRAINED_MS)
    expect(view.locator("path.line").first).to_have_attribute("d", re.compile("^M.*L"), timeout=TRAINED_MS)
    page.reload()  # everything is the server's
    expect(view.locator(".badge")).to_have_text(re.compile("training|succeeded"))  # which may be over by now
    expect(page.locator("#examples")).to_have_value(PAIRS)
    expect(view.locator(".badge")).to_have_text("succeeded", timeout=TRAINED_MS)
    expect(view.locator(".hint")).to_contain_text("Step 45 of 45.")

    job = call(server, "fine_tuning/jobs?limit=1")["data"][0]
    events = call(server, f"fine_tuning/jobs/{job['id']}/events?limit=100")["data"]
    steps = {each["data"]["step"] for each in events if each["data"] and "train_loss" in each["data"]}
    drawn = view.locator("path.line").first.get_attribute("d")
    assert drawn is not None and drawn.count("L") + 1 == len(steps) == 45
    valid, base = job["losses"]["valid"], job["losses"]["base_valid"]
    label = f"Validation loss: {base:.3f} without the adapter, {valid:.3f} with it."
    expect(view.get_by_role("img")).to_have_attribute("aria-label", re.compile(re.escape(label)))

    page.get_by_label("Your question").fill("q1?")
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#answers .answer[data-state=done]")).to_have_count(2)
    without, new = answers(page)
    assert new.startswith("aye aye") and not without.startswith("aye aye")

    checkpoint = call(server, f"fine_tuning/jobs/{job['id']}/checkpoints")["data"][-1]["id"]
    call(server, f"fine_tuning/jobs/{job['id']}/publish", name="pirate", checkpoint=checkpoint)
    expect(page.get_by_label("Name for requests")).to_have_value("pirate")
    page.get_by_role("button", name="Make it live").click()
    expect(page.locator("#live-outcome")).to_contain_text("pirate is live.")
    rows = page.locator("#history tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text(re.compile(r"^2.*live.*100%"))
    page.get_by_label("Third column").select_option("pirate")
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#answers .answer[data-state=done]")).to_have_count(3)
    assert answers(page)[1:] == [new, new]  # also under the name

    rows.nth(1).get_by_role("button", name="Go to version 1").click()
    expect(page.locator("#live-outcome")).to_contain_text("pirate is version 1 again.")
    expect(rows.nth(1)).to_contain_text("live")
    assert call(server, "adapters/pirate/versions")["current"] == 1
    page.get_by_label("Share of callers").fill("25")
    page.get_by_role("button", name="Make it live").click()
    expect(rows.first).to_contain_text("25%")
    assert sorted(call(server, "adapters/pirate/versions")["shares"].values()) == [0.25, 0.75]


def test_each_bad_line_is_named_by_the_page_or_by_the_server(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server, "/tune", OPERATOR).page
    good, no_answer, strange = (
        json.dumps({"messages": [{"role": "user", "content": "q"}, *rest], **more})
        for rest, more in (
            ([{"role": "assistant", "content": "a"}], {}),
            ([], {}),
            ([{"role": "assistant", "content": "a"}], {"mood": "good"}),
        )
    )
    paste(page, f"{good}\n\n{no_answer}\nbad\n")
    problems = page.locator("#examples-problem li")
    last = "Line 3: The last message must be the assistant's answer."
    expect(problems).to_have_text([last, "Line 4: This is not valid JSON. Each line must be one example."])
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#check-result")).to_have_text("Some lines cannot be used. Correct or remove them first.")
    expect(page.locator("#examples")).to_be_focused()
    paste(page, "\n\n".join([good] * 6 + [strange] + [good] * 5))  # every second line is empty, and one is held out
    page.get_by_label("Held out, %").fill("10")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#check-result li")).to_have_text(re.compile("^Line 13: .*'mood' is unknown"))
    paste(page, "a,b\nc,d")
    expect(page.locator("#read-summary")).to_have_text("Examples read: 2. Comma-separated.")
    page.get_by_label("Epochs").fill("99")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#epochs-problem")).to_have_text("This must be from 1 to 50.")


def test_settings_that_cannot_be_are_named(open_page: OpenPage, server: ServerProcess) -> None:
    watched = open_page(server, "/tune", {"key": API_KEY})
    watched.expected = ["status of 403"]
    page = watched.page
    paste(page, "q\na\n\nr\nb")
    page.locator("#more summary").click()
    page.get_by_label("For callers").fill("25")
    page.get_by_text("Count the answers").click()
    page.locator("#more summary").click()
    page.get_by_label("Held out, %").fill("0")
    start = page.get_by_role("button", name="Start training")
    start.click()
    expect(page.get_by_label("Make it live as")).to_be_focused()  # where it was folded away
    expect(page.locator("#publish-name-problem")).to_contain_text("A name has 1 to 128 letters")
    page.keyboard.type("crew")
    start.click()
    expect(page.locator("#exact-problem")).to_have_text("This needs examples held out.")
    page.get_by_label("Held out, %").fill("50")
    start.click()
    expect(page.locator("#check-result")).to_contain_text("This key may not do that.")
    expect(page.locator("#exact-problem")).to_be_empty()
    page.reload()
    expect(page.get_by_label("Make it live as")).to_have_value("crew")
    expect(page.get_by_label("Count the answers")).to_be_checked()


def test_a_file_is_dropped_or_opened(open_page: OpenPage, server: ServerProcess) -> None:
    page = open_page(server, "/tune", OPERATOR).page
    expect(page.locator("#connection")).to_have_attribute("data-condition", "ready")
    content = b"a, b\tc\nd\te\n"
    page.locator("#file").set_input_files({"name": "x.tsv", "mimeType": "text/plain", "buffer": content})
    expect(page.locator("#read-summary")).to_have_text("Examples read: 2. Tab-separated.")
    page.locator("#drop").evaluate("""(card) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File(["q\\n\\nq"], "x.csv"));
      card.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
    }""")
    expect(page.locator("#examples-problem li").first).to_have_text(
        "Line 1: There must be two columns: question and answer."
    )


def test_a_key_sees_its_own_jobs_and_is_told_what_it_may_not(open_page: OpenPage, tuned: ServerProcess) -> None:
    watched = open_page(tuned, "/tune")
    watched.expected = ["status of 40[13]"]
    page = watched.page
    expect(page.locator("#banner")).to_contain_text("This server needs an API key.")
    page.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(API_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#jobs")).to_have_text("No jobs yet.")
    page.get_by_label("API key").fill(ADMIN_KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#jobs")).to_contain_text("pirate")
    page.get_by_label("Admin key").fill(API_KEY)
    page.get_by_role("button", name="Make it live").click()
    expect(page.locator("#live-outcome .bad")).to_contain_text("This key may not do that.")


def test_the_page_is_linked_only_where_jobs_can_run(
    open_page: OpenPage, server: ServerProcess, echo_server: ServerProcess
) -> None:
    page = open_page(server, "/status", OPERATOR).page
    expect(page.get_by_role("link", name="Tune")).to_be_visible()
    watched = open_page(echo_server)
    watched.expected = ["status of 400"]
    expect(watched.page.get_by_role("link", name="Status")).to_be_visible()
    expect(watched.page.get_by_role("link", name="Tune")).to_be_hidden()
    watched.page.goto(f"{echo_server.url}/tune")
    expect(watched.page.locator("#banner")).to_contain_text("the server was started without --fine-tuning.")


def test_a_job_is_started_and_cancelled_by_keyboard(open_page: OpenPage, tuned: ServerProcess) -> None:
    page = open_page(tuned, "/tune", OPERATOR).page
    expect(page.locator("#jobs")).to_contain_text("pirate")
    order = ["skip", "brand", "Chat", "Tune", "Status", "language", "theme"]
    order += ["examples", "format", "open", "read", "suffix", "held", "epochs", "more-title", "check", "start"]
    paste(page, PAIRS)
    expect(page.locator("#read")).to_be_visible()
    page.locator(".skip").focus()
    page.keyboard.press("Shift+Tab")  # as if nothing had had the focus yet
    found = []
    for _ in order:
        page.keyboard.press("Tab")
        found.append(page.evaluate(FOCUSED))
        page.keyboard.insert_text({"suffix": "keys", "epochs": "50"}.get(found[-1]["name"], ""))
    assert [one["name"] for one in found] == order
    assert [one["name"] for one in found if not one["isSeen"]] == []
    page.keyboard.press("Enter")
    expect(page.locator("#job .job-state b")).to_have_text("keys")
    page.get_by_role("button", name="Pause", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#job .badge")).to_have_text("paused")
    expect(page.get_by_role("button", name="Resume", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Pause", exact=True)).to_be_focused()
    page.get_by_role("button", name="Cancel the job").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#job .badge")).to_have_text("cancelled")
    expect(page.locator("#job summary")).to_be_focused()  # its button is gone
    expect(page.locator("#announcer")).to_have_text("keys: cancelled")
    stored = [file["id"] for file in call(tuned, "files")["data"]]
    page.get_by_role("button", name="Delete the files").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Delete the files Sure?")).to_be_focused()
    page.keyboard.press("Tab")  # it forgets
    expect(page.get_by_role("button", name="Delete the files", exact=True)).to_be_visible()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert [file["id"] for file in call(tuned, "files")["data"]] == stored
    page.keyboard.press("Enter")
    expect(page.locator("#job [role=status]")).to_have_text("The files are deleted.")
    expect(page.get_by_role("button", name=re.compile("^Delete"))).to_have_count(0)
    expect(page.locator("#job summary")).to_be_focused()
    cancelled = call(tuned, "fine_tuning/jobs?limit=1")["data"][0]
    own = {cancelled["training_file"], cancelled["validation_file"]}
    assert {file["id"] for file in call(tuned, "files")["data"]} == set(stored) - own
    page.get_by_role("button", name=re.compile("^pirate")).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#job .job-state b")).to_have_text(re.compile("^ft:tiny:pirate:"))
    page.get_by_label("Your question").fill("q1?")
    reached: list[str] = []  # without an id: the history, if a test published one
    while reached[-1:] != ["admin-key"] and len(reached) < 20:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [each for each in reached if each] == [
        "other",
        "ask",
        "live-name",
        "live-share",
        "publish",
        "key",
        "admin-key",
    ]


def test_everything_is_said_in_chinese(open_page: OpenPage, tuned: ServerProcess) -> None:
    page = open_page(tuned, "/tune", OPERATOR, locale="zh-CN").page
    paste(page, "你好？\n好。\n\n谁？")
    expect(page.get_by_role("heading", level=1)).to_have_text("微调")
    expect(page.locator("#read-summary")).to_have_text("已读取 1 个示例。空行分隔的问答对。")
    expect(page.locator("#examples-problem li")).to_have_text("第 4 行：缺少回答。")
    paste(page, "你好？\n好。\n\n谁？\n我。")
    page.route("**/files/check", lambda route: route.fulfill(json=CHECKED))
    page.get_by_role("button", name="检查").click()
    expect(page.locator("#check-result")).to_contain_text("检查通过：1 个示例用于学习。")
    page.locator("#more summary").click()
    page.get_by_role("button", name=re.compile("^pirate")).click()
    expect(page.locator("#job .hint")).to_contain_text("训练损失：起初")
    expect(page.get_by_role("button", name="删除文件")).to_be_visible()
    expect(page.get_by_role("heading", name="上线")).to_be_visible()
    known = re.compile(r"ft:tiny:\S+|JSON|Lines|pirate|keys|tiny|\b[0-9a-f]{8}\b")  # the last: a version's content hash
    shown = known.sub("", page.locator("main").inner_text())
    assert re.findall(r"[A-Za-z]{4,}", shown) == []
    page.get_by_label("语言").select_option("en")
    expect(page.locator("#job .hint")).to_contain_text("Training loss:")
    expect(page.locator("#check-result")).to_contain_text("Checked: 1 to learn.")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways_and_axe_finds_nothing_serious(
    open_page: OpenPage, tuned: ServerProcess, theme: str
) -> None:
    page = open_page(tuned, "/tune", OPERATOR, color_scheme=theme, bypass_csp=True, **PHONE).page
    paste(page, f"{PAIRS}\n\nbad")
    page.get_by_role("button", name="Check").click()
    page.locator("#more summary").click()
    page.get_by_role("button", name=re.compile("^pirate")).click()
    expect(page.get_by_role("button", name="Delete the files")).to_be_visible()
    page.get_by_label("Your question").fill("q1?")
    page.get_by_role("button", name="Ask all").click()
    expect(page.locator("#answers .answer[data-state=done]")).to_have_count(2)
    for language in ("en", "zh"):
        page.select_option("#language", language)
        for width in (320, 360):
            page.set_viewport_size({"width": width, "height": 640})
            assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
            assert page.evaluate(OUTSIDE, width) == []
            frame = page.locator("#job .result .table-frame")
            assert frame.evaluate("(frame) => frame.scrollWidth - frame.clientWidth") <= 0
            assert page.locator(".bar").evaluate("(bar) => bar.clientHeight") < 60
    assert serious_violations(page) == []
