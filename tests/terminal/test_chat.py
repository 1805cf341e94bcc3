"""`stellarbyte chat` in a real terminal, with real servers: what a person types and sees."""

import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support.clients.terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, ENTER, ESCAPE, TAB, UP, Terminal
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.harmony_server import make_model_folder as make_harmony_model
from tests.support.servers.reasoning_server import make_model_folder as make_reasoning_model
from tests.support.servers.server_process import FAKE, HARMONY, REASONING, ServerProcess, free_port, running
from tests.terminal.command import Adapted

PROMPT = r"^❯$"  # an empty line waits for a question
FIGURES = r"\d+ tokens · (\S+ tokens/s · )?first after \S+ s · \d+ of \d+ prompt tokens cached"


@pytest.fixture
def chat(tmp_path: Path, fake_server: ServerProcess) -> Callable[..., Terminal]:
    """Starts a chat with the fake server unless another --url is given."""

    def start(*options: str, rows: int = 24, **environment: str) -> Terminal:
        url = [] if "--url" in options else ["--url", fake_server.url]
        return Terminal("chat", *url, *options, home=tmp_path, rows=rows, **environment)

    return start


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_question_is_answered_with_its_figures_and_the_conversation_goes_on(chat) -> None:
    with chat("--max-tokens", "18") as terminal:
        terminal.wait_for(PROMPT).type("Who are you?" + ENTER)
        terminal.wait_for(FIGURES).wait_for(PROMPT)
        assert "❯ Who are you?\n\nuser\nWho are you?\n\ncut off by length · 18 tokens · " in terminal.text
        terminal.type("And I?" + ENTER)
        terminal.wait_for(rf"(?s)And I\?.*{FIGURES}")
        assert terminal.text.count("user\nWho are you?") == 2  # the second answer repeats the first turn
        terminal.type("/usage" + ENTER)
        terminal.wait_for("2 answers, 36 tokens").wait_for(r"takes \d+ of the context's 2048 tokens")
        terminal.type("/exit" + ENTER)
        assert terminal.wait_end() == 0


def test_reasoning_is_shown_above_its_answer_and_counted(chat, tmp_path: Path) -> None:
    model = make_reasoning_model(tmp_path / "thinker")
    with running(REASONING, "--model", str(model)) as server, chat("--url", server.url) as terminal:
        terminal.wait_for(PROMPT).type("<think>Hm, which city?</think>Paris." + ENTER)
        terminal.wait_for(FIGURES).wait_for(PROMPT)
        assert "</think>Paris.\n\nHm, which city?\n\nParis.\n\n" in terminal.text


@pytest.mark.slow
def test_channels_are_shown_as_reasoning_and_answer(chat, tmp_path: Path) -> None:
    model = make_harmony_model(tmp_path / "oss")
    with running(HARMONY, "--model", str(model)) as server, chat("--url", server.url) as terminal:
        written = "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>final<|message|>Paris."
        terminal.wait_for(PROMPT).type(written + ENTER)
        terminal.wait_for(FIGURES).wait_for(PROMPT)
        assert "\n\nWhich city?\n\nParis.\n\n" in terminal.text


def test_ctrl_c_stops_the_answer_and_the_request_but_not_the_chat(chat, fake_server: ServerProcess) -> None:
    with chat("--no-history") as terminal:
        terminal.wait_for(PROMPT).type(f"{SLOW} please" + ENTER)
        terminal.wait_for("^assistant")
        assert fake_server.metric("vllm:num_requests_running") == 1
        terminal.type(ESCAPE + CTRL_C)
        terminal.wait_for("^stopped · first after").wait_for(PROMPT)
        wait_until(lambda: fake_server.metric("vllm:num_requests_running") == 0)
        assert f"❯ {SLOW} please\n\nuser\n{SLOW} please\nassistant" in terminal.text  # the part that had come
        terminal.type("a question")
        terminal.wait_for("❯ a question$").type(CTRL_C)  # Escape was no beginning of a key
        terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves").type(CTRL_C)
        assert terminal.wait_end() == 0
        assert "a question" not in terminal.text


@pytest.mark.slow
def test_what_is_typed_and_pasted_during_an_answer_is_one_question_also_after_ctrl_c(chat) -> None:
    with chat("--no-history", rows=60) as terminal:
        terminal.wait_for(PROMPT).type(f"{SLOW} please" + ENTER)
        terminal.wait_for("^assistant").type("typed ")
        terminal.paste(f"one\ntwo\n{'long ' * 1000}end")  # no terminal itself holds so much
        terminal.type(CTRL_C)
        terminal.wait_for(r"(?s)^stopped.*❯ typed one\n *… two\n *… long[^❯]*end\Z")  # and is not sent


@pytest.mark.slow
def test_ctrl_d_leaves_and_two_ctrl_c_with_a_key_between_do_not(chat) -> None:
    with chat() as terminal:
        terminal.wait_for(PROMPT).type(CTRL_C)
        terminal.wait_for("Ctrl-C again").type("word")
        terminal.wait_for("❯ word").type(CTRL_C)
        terminal.wait_for("Ctrl-C again").type(CTRL_D)
        assert terminal.wait_end() == 0


def test_adapters_and_scales_change_the_answer_and_the_file_says_who_answered(chat, adapted: Adapted, tmp_path) -> None:
    url, question = adapted.server.url, "the capital"

    def expected(model: str, **fields: object) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": model, **body, **fields}, timeout=30)
        return answer.json()["choices"][0]["message"]["content"]

    choices = [("", "tiny", None), ("/adapter a0", "a0", None), ("/scale 0.5", "a0", 0.5), ("/adapter a1", "a1", 0.5)]
    with chat("--url", url, "--temperature", "0", "--max-tokens", "12", "--quiet", "--plain") as terminal:
        for number, (command, model, scale) in enumerate(choices):
            if command:
                terminal.wait_for("❯$").type(command + ENTER)
                terminal.wait_for("from now on")
            terminal.type("/clear" + ENTER + question + ENTER)
            file = tmp_path / f"{number}.json"
            terminal.type(f"/save {file}{ENTER}")
            wait_until(lambda file=file: file.exists() and file.read_text().endswith("}\n"))
            saved = json.loads(file.read_text())
            answer = expected(model) if scale is None else expected(model, adapter_scale=scale)
            assert saved["messages"][1:] == [{"role": "assistant", "content": answer}]
            assert [(said["model"], said["adapter_scale"]) for said in saved["answers"]] == [(model, scale)]
        terminal.type("/adapter tiny" + ENTER)
        terminal.wait_for("tiny answers from now on").wait_for(PROMPT)
        terminal.type("/adapter none" + ENTER)
        terminal.wait_for("This server has no model or adapter 'none'; it has tiny, a0, a1.")
    assert len({expected("tiny"), expected("a0"), expected("a1"), expected("a0", adapter_scale=0.5)}) == 4


def test_commands_and_adapters_are_completed(chat, adapted: Adapted) -> None:
    with chat("--url", adapted.server.url) as terminal:
        terminal.wait_for("with 2 adapters").wait_for(PROMPT).type("/ad")
        terminal.wait_for("who answers").type(TAB)
        terminal.wait_for("❯ /adapter").type(ENTER + " a")
        terminal.wait_for(r"^ +a1 *$").type(TAB + TAB)
        terminal.wait_for("❯ /adapter a1").type(ENTER + ENTER)
        terminal.wait_for("a1 answers from now on").wait_for("^a1 ❯")
        terminal.type("/adapter" + ENTER)
        terminal.wait_for("● a1")


def test_conversations_are_saved_as_markdown_and_never_over_another_file(chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    file.write_text("precious")
    with chat("--max-tokens", "9", "--system", "Be brief.") as terminal:
        terminal.wait_for(PROMPT).type(f"/save {file}{ENTER}")
        terminal.wait_for("There is nothing to save yet")
        terminal.type(f"Hello{ENTER}")
        terminal.wait_for(FIGURES).type(f"/save {file}{ENTER}")
        terminal.wait_for("already exists; /save!")
        assert file.read_text() == "precious"
        terminal.type(f"/save! {file}{ENTER}")
        terminal.wait_for("Saved as")
        terminal.type(f"/save {tmp_path}/talk.txt{ENTER}")
        terminal.wait_for("must end in .md or .json")
    text = file.read_text()
    assert "## System\n\nBe brief.\n\n## Question\n\nHello\n\n## fake (cut off by length)\n\nsystem" in text


def test_settings_are_chosen_and_taken_back(chat) -> None:
    with chat() as terminal:
        terminal.wait_for(PROMPT).type("/set max_tokens 7" + ENTER + "Hello" + ENTER)
        terminal.wait_for(r"· 7 tokens ·").wait_for(PROMPT)
        terminal.type("/set temperature nan" + ENTER)
        terminal.wait_for("temperature must be a number; 'nan' is not.")
        terminal.type("/scale inf" + ENTER)
        terminal.wait_for("The scale must be a number from 0 to 8; 'inf' is not.")
        terminal.type("/set max_tokens many" + ENTER)
        terminal.wait_for("max_tokens must be a whole number; 'many' is not.")
        terminal.type("/set max_tokens" + ENTER + "/set temperature 9" + ENTER + "Hello" + ENTER)
        terminal.wait_for("max_tokens is the default again").wait_for("The field 'temperature'.*")
        terminal.type("/nothing" + ENTER)
        terminal.wait_for("There is no command /nothing")
        terminal.type("/scale" + ENTER)
        terminal.wait_for("/scale needs X")


@pytest.mark.slow
def test_questions_of_several_lines(chat) -> None:
    with chat("--max-tokens", "25") as terminal:
        terminal.wait_for(PROMPT).type("one\\" + ENTER + "two" + ALT_ENTER + "three")
        terminal.wait_for("three")
        terminal.paste("\nfour\nfive")
        terminal.wait_for("five")
        assert "user\none" not in terminal.text  # nothing was sent yet
        terminal.type(ENTER)
        terminal.wait_for("(?s)five.*user\none\ntwo\nthree\nfour\n").wait_for(FIGURES)
        assert terminal.text.count("first after") == 1


@pytest.mark.slow
def test_bytes_that_are_no_utf_8_are_asked_as_replacement_signs(chat) -> None:
    with chat("--max-tokens", "10") as terminal:
        terminal.wait_for(PROMPT).type(b"a\xffb" + ENTER.encode())
        terminal.wait_for("^user\na\ufffdb$").wait_for(FIGURES)


@pytest.mark.slow
def test_an_answer_higher_than_the_screen_is_there_once_and_in_order(chat) -> None:
    lines = [f"- step {number}" for number in range(30)]
    with chat("--max-tokens", "420", rows=10) as terminal:
        terminal.wait_for(PROMPT).paste("steps:\n\n" + "\n".join(lines))
        terminal.wait_for("step 29").type(ENTER)
        terminal.wait_for(FIGURES)
        answer = terminal.scrolled_text.partition("user\n")[2]
    assert re.findall(r"^ • (step \d+)$", answer, re.MULTILINE)[:30] == [line.removeprefix("- ") for line in lines]


def test_past_questions_are_kept_for_this_user_only_and_come_back(chat, tmp_path: Path) -> None:
    history = tmp_path / "state/stellarbyte/chat-history"
    history.parent.mkdir(parents=True)
    history.touch(mode=0o644)
    with chat("--max-tokens", "2") as terminal:
        terminal.wait_for(PROMPT).type("first question" + ENTER)
        terminal.wait_for(FIGURES).type(CTRL_D)
        assert terminal.wait_end() == 0
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with chat("--max-tokens", "2") as terminal:
        terminal.wait_for(PROMPT).type(UP)
        terminal.wait_for("❯ first question")
    with chat("--max-tokens", "2", "--no-history") as terminal:
        terminal.wait_for(PROMPT).type("secret question" + ENTER)
        terminal.wait_for(FIGURES).type(CTRL_D)
        assert terminal.wait_end() == 0
    assert "secret" not in history.read_text()


@pytest.mark.slow
def test_ctrl_r_searches_past_questions(chat) -> None:
    """Enter and Ctrl-C were once the question's own also in the line that searches."""
    with chat("--max-tokens", "2", "--quiet") as terminal:
        for number, question in enumerate(["first question", "second question"], start=1):
            terminal.wait_for(PROMPT).type(question + ENTER)
            terminal.wait_for(f"(?s)(cut off by length.*){{{number}}}^❯$")
        terminal.type("draft" + CTRL_R + "fir")
        terminal.wait_for("I-search backward: fir$").type(CTRL_C)
        terminal.wait_for("❯ draft$").type(CTRL_R + "fir")
        terminal.wait_for("I-search backward: fir$").type(ENTER)
        terminal.wait_for(r"❯ first question\Z").type(ENTER)  # until here it is found, not sent
        terminal.wait_for("(?s)(❯ first question\n\nus.*){2}")


def test_a_lost_connection_leaves_the_part_that_came_and_a_question_to_retry(chat, fake_model, tmp_path) -> None:
    server = ServerProcess(FAKE, "--model", fake_model)
    try:
        server.wait_ready()
        with chat("--url", server.url) as terminal:
            terminal.wait_for(PROMPT).type(f"{SLOW} please" + ENTER)
            terminal.wait_for("^assistant")
            terminal.type("/ret")
            server.process.kill()
            terminal.wait_for("was lost during the answer").wait_for("/retry asks again")
            assert re.search("^assistant", terminal.text, re.MULTILINE)
            terminal.wait_for("^❯ /ret$").type("ry" + ENTER)  # what was typed meanwhile disturbed nothing
            terminal.wait_for("cannot be reached").wait_for(PROMPT)
            terminal.type(f"/save {tmp_path}/part.json{ENTER}")
            terminal.wait_for("Saved as")
            saved = json.loads((tmp_path / "part.json").read_text())
            assert saved["answers"] == [{"model": "fake", "adapter_scale": None, "ending": "broken off"}]
            server.wait()
            server = ServerProcess(FAKE, "--model", fake_model, port=server.port)
            server.wait_ready()
            terminal.wait_for(PROMPT).type("/set max_tokens 20" + ENTER + "/retry" + ENTER)
            terminal.wait_for(r"· 20 tokens ·")
            terminal.wait_for(PROMPT)
            assert terminal.scrolled_text.count(f"user\n{SLOW} please\nas") == 2  # the lost answer and the new one
    finally:
        server.stop()


def test_keys_and_limits_are_told_in_one_sentence(chat, fake_model, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[me]\nkey = "sesame"\nrequests_per_minute = 1\n')
    keys.chmod(0o600)
    server = ServerProcess(FAKE, "--model", fake_model, "--keys", str(keys))
    try:
        server.wait_ready()
        with chat("--url", server.url) as terminal:
            assert terminal.wait_end() == 1
            (line,) = terminal.text.splitlines()
            assert line.startswith("error: The server needs one of its API keys; give it with --api-key")
        with chat("--url", server.url, "--max-tokens", "2", STELLARBYTE_API_KEY="sesame") as terminal:
            terminal.wait_for(PROMPT).type("Hello" + ENTER)
            terminal.wait_for(FIGURES).type("Hello again" + ENTER)
            terminal.wait_for(r"Try again in \d+ s\. /retry asks again\.").wait_for(PROMPT)
            os.kill(server.process.pid, signal.SIGTERM)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"http://127.0.0.1:{free_port()}", "cannot be reached"),
        ("nonsense", "must be a URL such as http://127.0.0.1:8000"),
    ],
    ids=["nobody", "nonsense"],
)
def test_without_a_server_one_line_says_so(chat, url: str, said: str) -> None:
    with chat("--url", url) as terminal:
        assert terminal.wait_end() == 1
        assert terminal.text.startswith("error: ") and said in terminal.text.replace("\n", "")
        assert "Traceback" not in terminal.text
