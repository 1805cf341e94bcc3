"""`stellarbyte chat` without a terminal: a plain answer on stdout, or one line on stderr and status 1."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clients.terminal import CTRL_C, LIMIT_S, Terminal
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.server_process import ROOT, ServerProcess
from tests.terminal.command import Command, Result
from tests.terminal.failing_server import Prepared, answering, text_event


def piped(command: str) -> tuple[int, str, str]:
    """What a shell makes of a command; {chat} stands for `stellarbyte chat`."""
    chat = f"'{sys.executable}' -m stellarbyte.cli.main chat"
    result = subprocess.run(
        ["bash", "-c", command.format(chat=chat)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout, result.stderr


def test_a_question_by_pipe_or_as_argument_gets_the_answer_and_nothing_else(
    stellarbyte: Command, fake_server: ServerProcess, monkeypatch
) -> None:
    command = f"echo '**hello** you' | {{chat}} --url {fake_server.url}/v1/ --max-tokens 18"
    assert piped(command) == (0, "user\n**hello** you\n", "")
    monkeypatch.setenv("STELLARBYTE_URL", fake_server.url)
    given = stellarbyte("chat", "**hello** you", "--max-tokens", "30")
    assert given == Result(0, "user\n**hello** you\nassistant\nu\n", "")


def test_reasoning_is_not_in_a_pipe(stellarbyte: Command) -> None:
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm."}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    with answering(Prepared.stream(thought, text_event("Paris."), end)) as url:
        assert stellarbyte("chat", "hello", "--url", url) == Result(0, "Paris.\n", "")


def test_who_has_read_enough_may_leave(fake_server: ServerProcess) -> None:
    command = f"{{chat}} --url {fake_server.url} '{SLOW} {'x' * 50}' | head -c 10; exit ${{{{PIPESTATUS[0]}}}}"
    assert piped(command) == (141, f"user\n{SLOW}", "")


def test_bytes_that_are_no_utf_8_are_asked_as_replacement_signs(
    stellarbyte: Command, fake_server: ServerProcess, monkeypatch
) -> None:
    monkeypatch.setenv("STELLARBYTE_URL", fake_server.url)
    given = [*("--max-tokens", "21"), "--system", os.fsdecode(b"a\xff")]
    answer = Result(0, "system\na\ufffd\nuser\nb\ufffd\n", "")
    assert stellarbyte("chat", os.fsdecode(b"b\xff"), *given) == answer
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b\xff")))
    assert stellarbyte("chat", *given) == answer


def test_no_question_is_an_error(stellarbyte: Command, fake_server: ServerProcess, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    said = "error: The question is empty; give it as PROMPT or on standard input.\n"
    assert stellarbyte("chat", "--url", fake_server.url) == Result(1, "", said)


FAILURES = {
    "not found": (Prepared.error(404, "No such model."), "", "No such model."),
    "busy": (Prepared.error(429, "Too many requests.", Retry_After="7"), "", "Too many requests. Try again in 7 s."),
    "draining": (Prepared.error(503, "Shutting down.", Retry_After="5"), "", "Shutting down. Try again in 5 s."),
    "proxy": (Prepared(502, "<html>"), "", "The answer from {url}/v1/chat/completions is 502 Bad Gateway."),
    "failed": (
        Prepared.stream(text_event("half"), {"error": {"message": "The engine died."}}),
        "half\n",
        "The answer broke off: The engine died.",
    ),
    "ended": (
        Prepared.stream(text_event("half")),
        "half\n",
        "The answer broke off: the server closed the stream early.",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_and_what_came_is_kept(stellarbyte: Command, name: str) -> None:
    prepared, came, said = FAILURES[name]
    with answering(prepared) as url:
        assert stellarbyte("chat", "--url", url, "hello") == Result(1, came, f"error: {said.format(url=url)}\n")


def test_an_unknown_model_is_named_with_those_there_are(stellarbyte: Command, fake_server: ServerProcess) -> None:
    said = "error: This server has no model or adapter 'other'; it has fake.\n"
    assert stellarbyte("chat", "--url", fake_server.url, "--model", "other", "hello") == Result(1, "", said)


def test_a_scale_without_an_adapter_is_refused(stellarbyte: Command, fake_server: ServerProcess) -> None:
    said = "error: --adapter-scale needs an adapter; give its name as --model.\n"
    assert stellarbyte("chat", "--url", fake_server.url, "--adapter-scale", "2", "hello") == Result(1, "", said)


def test_the_first_ctrl_c_ends_it_while_the_server_is_silent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT_S)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Terminal("chat", "hello", "--url", url, home=tmp_path) as terminal:
            connection, _ = silent.accept()
            with connection:
                terminal.type(CTRL_C)
                assert terminal.wait_end() == 130
    assert terminal.text == "^Cinterrupted"


def test_the_first_ctrl_c_ends_an_answer(fake_server: ServerProcess, tmp_path: Path) -> None:
    with Terminal("chat", f"{SLOW} please", "--url", fake_server.url, home=tmp_path) as terminal:
        terminal.wait_for("^assistant").type(CTRL_C)
        assert terminal.wait_end() == 130
    assert terminal.text.endswith("interrupted") and "Traceback" not in terminal.text
