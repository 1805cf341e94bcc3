"""What stellarbyte_client says when a call fails: each test for the synchronous and the asynchronous client."""

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from stellarbyte_client import ConnectionFailed, ServerError, UnexpectedAnswer
from stellarbyte_client.errors import server_error
from tests.clients.either import Connect
from tests.clients.keys import ADMIN_KEY, LIMITED_KEY, USER_KEY
from tests.support.servers.server_process import ServerProcess, free_port
from tests.support.stubs.http_stub import Stub


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that takes one request; `answer` writes to its connection, until the client hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(2**16)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_a_wrong_key_is_refused(connect: Connect, adapter_server: ServerProcess) -> None:
    for wrong in (None, "key-wrong"):
        with pytest.raises(ServerError, match="API keys") as refused:
            connect(adapter_server.url, api_key=wrong).models()
        assert (refused.value.status, refused.value.type) == (401, "authentication_error")
        assert (refused.value.code, refused.value.param) == ("invalid_api_key", None)


def test_a_users_key_does_not_load_adapters(connect: Connect, adapter_server: ServerProcess) -> None:
    with pytest.raises(ServerError, match="admin-api-key") as refused:
        connect(adapter_server.url, api_key=USER_KEY).adapters.load("mine", "pirate")
    assert (refused.value.status, refused.value.type) == (403, "permission_error")


@pytest.mark.parametrize("argument", ["api_key", "admin_api_key"])
def test_the_operators_key_alone_is_enough(connect: Connect, adapter_server: ServerProcess, argument: str) -> None:
    client = connect(adapter_server.url, **{argument: ADMIN_KEY})
    client.adapters.load("mine", "pirate")
    assert "mine" in [model.id for model in client.models()]
    client.adapters.unload("mine")


def test_what_does_not_exist_is_named(client: Any) -> None:
    with pytest.raises(ServerError) as missing:
        client.adapters.unload("nobody")
    assert str(missing.value) == missing.value.message == "There is no adapter 'nobody'."
    assert (missing.value.status, missing.value.type) == (404, "not_found_error")
    assert (missing.value.code, missing.value.param) == ("adapter_not_found", "lora_name")
    assert missing.value.retry_after_s is None


def test_a_limit_says_when_to_try_again(adapter_server: ServerProcess) -> None:
    def complete() -> httpx.Response:
        return httpx.post(
            f"{adapter_server.url}/v1/completions",
            json={"model": "tiny", "prompt": "the", "max_tokens": 1},
            headers={"Authorization": f"Bearer {LIMITED_KEY}"},
        )

    assert complete().status_code == 200
    error = server_error(complete())
    assert (error.status, error.type, error.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 61


def test_no_server_at_the_address(connect: Connect) -> None:
    client = connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionFailed, match=rf"The server at {client.base_url} cannot be reached: .+\."):
        client.models()
    assert client.is_ready() is False


def test_a_server_that_does_not_answer_in_time(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1)
        with pytest.raises(ConnectionFailed, match=r"did not answer in time\."):
            client.version()


def test_a_server_whose_answer_never_ends(connect: Connect) -> None:
    """Each byte came in time, and the call went on for as long as there were more."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n")
        for _ in range(300):
            connection.sendall(b" ")
            time.sleep(0.01)

    with serving(drip) as url, pytest.raises(ConnectionFailed, match=r"did not answer in time\."):
        connect(url, timeout_s=0.2).version()


def test_what_the_connection_ended_with_is_told_in_one_sentence(connect: Connect) -> None:
    with serving(socket.socket.close) as url, pytest.raises(ConnectionFailed) as error:
        connect(url).version()
    assert re.fullmatch(rf"The server at {url} cannot be reached: [^.]+\.", str(error.value))


@pytest.mark.parametrize("body", ["<h1>It works!</h1>", '{"data": [{"id": 1}]}', "[]", ""])
def test_an_answer_of_something_else_is_not_taken_for_one_of_ours(connect: Connect, stub: Stub, body: str) -> None:
    stub.answer(body)
    with pytest.raises(UnexpectedAnswer, match=f"{stub.url}/v1/models is not that of a StellarByte server"):
        connect(stub.url).models()


def test_metrics_that_cannot_be_read(connect: Connect, stub: Stub) -> None:
    stub.answer("<h1>It works!</h1>")
    with pytest.raises(UnexpectedAnswer, match=f"{stub.url}/metrics"):
        connect(stub.url).metrics()


def test_an_error_without_an_error_object_has_its_status(connect: Connect, stub: Stub) -> None:
    stub.answer("<h1>Bad gateway</h1>", status=502, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")
    with pytest.raises(ServerError) as error:
        connect(stub.url).models()
    assert str(error.value) == f"The answer from {stub.url}/v1/models is 502 Bad Gateway."
    assert (error.value.status, error.value.type, error.value.retry_after_s) == (502, None, None)


def test_what_is_no_text_in_an_error_object_does_not_hide_its_message(connect: Connect, stub: Stub) -> None:
    """Other servers and proxies put the status there, as a number; the message was lost then."""
    stub.answer('{"error": {"message": "Too busy.", "type": {}, "param": ["model"], "code": 429}}', status=429)
    with pytest.raises(ServerError) as error:
        connect(stub.url).models()
    assert (error.value.message, error.value.status) == ("Too busy.", 429)
    assert (error.value.type, error.value.param, error.value.code) == (None, None, None)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_a_server_behind_it_is_not_ready(connect: Connect, stub: Stub, status: int) -> None:
    stub.answer("<h1>Nobody</h1>", status=status)
    assert connect(stub.url).is_ready() is False


@pytest.mark.parametrize("body", ["<h1>It works!</h1>", "{}", "[]"])
def test_something_else_is_neither_ready_nor_healthy(connect: Connect, stub: Stub, body: str) -> None:
    stub.answer(body)
    client = connect(stub.url)
    for ask in (client.is_ready, client.health):
        with pytest.raises(UnexpectedAnswer, match="is not that of a StellarByte server"):
            ask()
    stub.answers[:] = []
    stub.answer("<h1>Not here</h1>", status=404)
    with pytest.raises(ServerError, match="404"):
        client.is_ready()


# What clients are made with


@pytest.mark.parametrize("argument", ["api_key", "admin_api_key"])
@pytest.mark.parametrize("key", ["sesame\n", "open sesame", "sésame", "密钥"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(connect: Connect, argument: str, key: str) -> None:
    """It was told as a server that cannot be reached, with the key in the message."""
    with pytest.raises(ValueError, match=f"^{argument} must ") as error:
        connect(**{argument: key})
    assert key.strip() not in str(error.value)


def test_an_empty_key_is_none(connect: Connect, stub: Stub) -> None:
    stub.answer(json.dumps({"version": "1.0", "lora_name": "mine", "freed_bytes": 0}))
    connect(stub.url, api_key="", admin_api_key="").version()
    connect(stub.url, api_key="key", admin_api_key="").adapters.unload("mine")
    assert [asked.headers.get("authorization") for asked in stub.asked] == [None, "Bearer key"]


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf])
def test_a_time_out_that_is_none_is_refused_at_once(connect: Connect, timeout_s: float) -> None:
    with pytest.raises(ValueError, match=r"^timeout_s must be a number of seconds above 0; .* is not\.$"):
        connect(timeout_s=timeout_s)


def test_the_address_is_the_argument_or_the_variable_or_this_machine(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STELLARBYTE_URL", raising=False)
    assert connect().base_url == "http://127.0.0.1:8000"
    monkeypatch.setenv("STELLARBYTE_URL", "http://llm.example:9000/")
    assert connect().base_url == "http://llm.example:9000"
    assert connect("https://other.example").base_url == "https://other.example"


@pytest.mark.parametrize("wrong", ["127.0.0.1:8000", "localhost", "ftp://localhost", "http://", "http://a:b", ""])
def test_an_address_that_is_none_is_refused_at_once(connect: Connect, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"must be a URL such as http://127\.0\.0\.1:8000"):
        connect(wrong)


def test_a_server_behind_a_prefix_without_keys(connect: Connect, stub: Stub) -> None:
    stub.answer('{"version": "1.0"}')
    assert connect(f"{stub.url}/llm/").version() == "1.0"
    assert (stub.asked[0].method, stub.asked[0].path) == ("GET", "/llm/version")
    assert "authorization" not in stub.asked[0].headers
