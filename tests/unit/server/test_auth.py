"""Who may call what, by how the server was started and what a request carries; without an application behind."""

import asyncio
import json
from typing import Any

import pytest

from server.auth import Gate
from server.keys import Keyring
from server.settings import EngineSettings, ServerSettings

JSON = {"content-type": "application/json; charset=utf-8", "host": "127.0.0.1:8000"}
LOAD = "/v1/load_lora_adapter"


def answer(
    headers: dict[str, str] | list[tuple[str, str]],
    *,
    path: str = LOAD,
    method: str = "POST",
    host: str = "127.0.0.1",
    **keys: Any,
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and error of what the gate says; status 200 when it lets the request through."""
    settings = ServerSettings(engine=EngineSettings(model="m"), host=host, **keys)
    sent: list[dict[str, Any]] = []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {}}'})

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
        "state": {},
    }
    asyncio.run(Gate(through, Keyring(settings), host, settings.cors_origin)(scope, None, send))
    start, body = sent
    return (
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        json.loads(body["body"])["error"],
    )


def status(headers: Any, **options: Any) -> int:
    return answer(headers, **options)[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_without_a_key_the_loopback_may(host: str) -> None:
    for name in ("127.0.0.1:8000", "localhost:1", "[::1]:8000", "LocalHost", "127.0.0.5:8000"):
        assert status(JSON | {"host": name}, host=host) == 200
    assert status(JSON | {"x-forwarded-for": "10.0.0.1"}, host=host) == 403
    assert status(JSON | {"content-type": "text/plain"}, host=host) == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "server.example"])
def test_without_a_key_nobody_may_where_others_can_connect(host: str) -> None:
    assert status(JSON, host=host) == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_with_a_key_who_has_it_may(host: str) -> None:
    options = {"host": host, "admin_api_key": "sesame"}
    assert status(JSON | {"authorization": "Bearer sesame", "host": "any.where"}, **options) == 200
    assert status(JSON | {"authorization": "bearer sesame"}, **options) == 200
    for wrong in ("", "sesame", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame!", "Basic sesame", "Bearer \xff"):
        code, headers, error = answer(JSON | {"authorization": wrong}, **options)
        assert (code, headers["www-authenticate"]) == (401, "Bearer")
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert "sesame" not in error["message"]
    assert status(JSON, **options) == 401
    twice = [*JSON.items(), ("authorization", "Bearer wrong"), ("authorization", "Bearer sesame")]
    assert status(twice, **options) == 401
    assert status(JSON | {"authorization": "Bearer sesame", "content-type": "text/plain"}, **options) == 400


def test_users_keys_alone_open_no_route_of_the_operator() -> None:
    assert status(JSON | {"authorization": "Bearer user"}, api_key=("user",)) == 403
    assert status(JSON, api_key=("user",)) == 403
    assert status(JSON | {"authorization": "Bearer user"}, api_key=("user",), admin_api_key="sesame") == 403


def test_the_admin_key_alone_leaves_the_users_routes_open() -> None:
    assert status(JSON, path="/v1/models", method="GET", admin_api_key="sesame") == 200


@pytest.mark.parametrize(
    "host",
    ["evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test:80", "", "evil.test:127.0.0.1", "[::1", "0.0.0.0",
     "127.0.0.1:8000:9", "localhost@evil.test", "localhost,evil.test"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"), [("POST", LOAD), ("POST", "/v1/completions"), ("GET", "/health"), ("GET", "/no/such/route")]
)
def test_a_name_made_to_point_here_opens_nothing(host: str, method: str, path: str) -> None:
    """DNS rebinding: a page of evil.test, which now is 127.0.0.1, is no page of another origin for the browser."""
    code, _, error = answer(JSON | {"host": host}, method=method, path=path)
    assert code == 403 and "host name" in error["message"]
    assert status([("content-type", "application/json")], method=method, path=path) == 403
    assert status([*JSON.items(), ("host", "evil.test")], method=method, path=path) == 403
    for keys in ({"api_key": ("user",)}, {"admin_api_key": "boss"}):
        assert "host name" not in answer(JSON | {"host": host}, method=method, path=path, **keys)[2].get("message", "")


@pytest.mark.parametrize("origin", ["https://evil.test", "http://evil.test:8000", "null", "http://127.0.0.1.evil.test"])
def test_without_keys_no_page_of_another_origin_makes_the_model_run(origin: str) -> None:
    """A page may send text/plain anywhere without asking, and only cannot read the answer."""
    page = {"host": "127.0.0.1:8000", "content-type": "text/plain", "origin": origin}
    code, _, error = answer(page, path="/v1/completions")
    assert code == 403 and "--cors-origin" in error["message"]
    assert status(page | {"host": "10.0.0.7:8000"}, path="/v1/completions", host="0.0.0.0") == 403
    for allowed in ("*", origin):
        assert status(page, path="/v1/completions", cors_origin=(allowed,)) == 200
    keys = {"api_key": ("user",)}
    assert status(page | {"authorization": "Bearer user"}, path="/v1/completions", **keys) == 200  # what no page knows


def test_the_servers_own_page_may_use_it_under_any_name_it_is_reached_by() -> None:
    own = {"host": "10.0.0.7:8000", "origin": "http://10.0.0.7:8000"}
    assert status(own, path="/v1/completions", host="0.0.0.0") == 200
    assert status(own | {"origin": "http://10.0.0.7:9000"}, path="/v1/completions", host="0.0.0.0") == 403


def test_a_page_that_cors_allows_is_still_no_operator() -> None:
    options = {"cors_origin": ("https://chat.example",)}
    assert status(JSON | {"origin": "https://chat.example"}, path="/v1/completions", **options) == 200
    assert status(JSON | {"origin": "https://chat.example"}, **options) == 403
    assert status(JSON | {"origin": "null"}, **options) == 403
    assert status(JSON | {"origin": "http://localhost:8000"}, **options) == 200


def test_what_is_in_no_row_is_refused_after_the_key_was_asked_for() -> None:
    keys = {"api_key": ("user",)}
    user = JSON | {"authorization": "Bearer user"}
    assert status(JSON, path="/no/such", **keys) == 401
    assert status(user, path="/no/such", **keys) == 404
    code, headers, _ = answer(user, path="/v1/models", method="DELETE", **keys)
    assert (code, headers["allow"]) == (405, "GET")
    assert status(JSON, path="/v1/models", method="OPTIONS", **keys) == 401
    for path in (
        "/health/",
        "//health",
        "/HEALTH",
        "/health\n",
        "/health;x",
        "/docs/static/../../health",
        "/v1/models\n",
    ):
        assert status(JSON, path=path, method="GET", **keys) == 401, path
