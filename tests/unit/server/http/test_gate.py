"""Who may call what, by how the server was started and what a request carries; without an application behind."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.api.caller import require_publishing
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.http.gate import AtAdminAddress, Gate
from tests.support.application import route_table

JSON = {"content-type": "application/json; charset=utf-8", "host": "127.0.0.1:8000"}
LOAD = "/v1/load_lora_adapter"


def answer(
    headers: dict[str, str] | list[tuple[str, str]],
    *,
    path: str = LOAD,
    method: str = "POST",
    host: str = "127.0.0.1",
    at_admin_address: bool = False,
    publishes: bool = False,
    **options: Any,
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and error of what the gate says; status 200 when it lets the request through."""
    settings = ServerSettings(engine=EngineSettings(model="m"), host=host, **options)
    sent: list[dict[str, Any]] = []

    async def through(scope: Any, receive: Any, send: Any) -> None:
        if publishes:
            try:
                require_publishing(SimpleNamespace(scope=scope))  # type: ignore[arg-type]
            except ApiError as error:
                await error.answer(scope, receive, send)
                return
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
    gate = Gate(through, route_table(), Keyring(settings), settings)
    asyncio.run((AtAdminAddress(gate) if at_admin_address else gate)(scope, None, send))
    start, body = sent
    return (
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        json.loads(body["body"])["error"],
    )


def status(headers: Any, **options: Any) -> int:
    return answer(headers, **options)[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_this_machines_programs_are_operators_only_if_the_server_was_told_so(host: str) -> None:
    for name in ("127.0.0.1:8000", "localhost:1", "[::1]:8000", "LocalHost", "127.0.0.5:8000"):
        assert status(JSON | {"host": name}, host=host, allow_local_admin=True) == 200
        code, _, error = answer(JSON | {"host": name}, host=host)
        assert code == 403 and "--allow-local-admin" in error["message"] and "--admin-api-key" in error["message"]
    for forwarded in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"):
        assert status(JSON | {forwarded: "10.0.0.1"}, host=host, allow_local_admin=True) == 403
    assert status(JSON | {"content-type": "text/plain"}, host=host, allow_local_admin=True) == 400
    named = {"allow_local_admin": True, "allowed_host": ("llm.example",)}
    assert status(JSON | {"host": "llm.example"}, host=host, **named) == 403
    assert status(JSON | {"host": "llm.example"}, host=host, path="/v1/completions", **named) == 200


def test_a_proxy_on_this_machine_with_default_settings_makes_nobody_an_operator() -> None:
    """nginx with nothing but `proxy_pass http://127.0.0.1:8000;` sends just this for whoever asks it."""
    through_nginx = {"host": "127.0.0.1:8000", "connection": "close", "content-type": "application/json"}
    assert status(through_nginx) == 403
    assert status(through_nginx, path="/v1/unload_lora_adapter") == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "server.example"])
def test_without_a_key_nobody_may_where_others_can_connect(host: str) -> None:
    assert status(JSON, host=host) == 403
    assert status(JSON, host=host, allow_local_admin=True) == 403


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


@pytest.mark.parametrize(
    ("headers", "options", "code"),
    [
        ({}, {}, 403),
        ({}, {"allow_local_admin": True}, 200),
        ({"x-forwarded-for": "10.0.0.1"}, {"allow_local_admin": True}, 403),
        ({"origin": "http://evil.example"}, {"allow_local_admin": True, "cors_origin": ("*",)}, 403),
        ({}, {"host": "0.0.0.0", "allow_local_admin": True}, 403),
        ({"authorization": "Bearer user"}, {"api_key": ("user",)}, 403),
        ({"authorization": "Bearer user"}, {"api_key": ("user",), "admin_api_key": "sesame"}, 403),
        ({"authorization": "Bearer sesame"}, {"api_key": ("user",), "admin_api_key": "sesame"}, 200),
        ({}, {"admin_api_key": "sesame"}, 401),
        ({"authorization": "Bearer user"}, {"api_key": ("user",), "at_admin_address": True}, 200),
    ],
)
def test_who_may_load_adapters_may_have_a_job_publish_one(
    headers: dict[str, str], options: dict[str, Any], code: int
) -> None:
    assert status(JSON | headers, **options) == code
    asked, _, error = answer(JSON | headers, path="/v1/fine_tuning/jobs", publishes=True, **options)
    assert asked == code
    assert code == 200 or error["message"].startswith("The field 'publish' needs the right to load adapters: ")
    assert status(JSON | headers, path="/v1/fine_tuning/jobs", **options) == 200  # a job alone


def test_users_keys_alone_open_no_route_of_the_operator() -> None:
    assert status(JSON | {"authorization": "Bearer user"}, api_key=("user",)) == 403
    assert status(JSON, api_key=("user",)) == 403
    assert status(JSON | {"authorization": "Bearer user"}, api_key=("user",), admin_api_key="sesame") == 403


def test_the_admin_key_alone_leaves_the_users_routes_open() -> None:
    assert status(JSON, path="/v1/models", method="GET", admin_api_key="sesame") == 200


NOT_OURS = ["evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test:80", "", "evil.test:127.0.0.1", "[::1",
            "127.0.0.1:8000:9", "localhost@evil.test", "localhost,evil.test", "2130706433", "0x7f.1"]  # fmt: skip
ANY_ROUTE = [("POST", LOAD), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/health"),
             ("GET", "/metrics"), ("GET", "/"), ("GET", "/no/such/route")]  # fmt: skip


@pytest.mark.parametrize("listening", ["127.0.0.1", "::1", "0.0.0.0", "::", "192.168.0.7"])
@pytest.mark.parametrize("keys", [{}, {"admin_api_key": "boss"}, {"allow_local_admin": True}])
@pytest.mark.parametrize("host", NOT_OURS)
def test_a_name_made_to_point_here_opens_nothing_that_needs_no_key(
    host: str, keys: dict[str, Any], listening: str
) -> None:
    """DNS rebinding: a page of evil.test, which now is this server, is no page of another origin for the browser."""
    page = JSON | {"origin": f"http://{host}"}
    for method, path in ANY_ROUTE:
        code, _, error = answer(page | {"host": host}, method=method, path=path, host=listening, **keys)
        assert code == 403 and "host name" in error["message"], (method, path)
        options = {"method": method, "path": path, "host": listening, **keys}
        assert status([("content-type", "application/json")], **options) == 403
        assert status([*JSON.items(), ("host", "evil.test")], **options) == 403


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0"])
def test_with_a_key_a_request_may_name_any_host(listening: str) -> None:
    elsewhere = JSON | {"host": "llm.example"}
    user = elsewhere | {"authorization": "Bearer user"}
    assert status(user, path="/v1/completions", host=listening, api_key=("user",)) == 200
    assert status(elsewhere, path="/v1/completions", host=listening, api_key=("user",)) == 401
    assert status(elsewhere, path="/metrics", method="GET", host=listening, api_key=("user",)) == 200  # scrapers
    boss = elsewhere | {"authorization": "Bearer boss"}
    assert status(boss, path="/v1/completions", host=listening, admin_api_key="boss") == 200


@pytest.mark.parametrize("listening", ["0.0.0.0", "::"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "192.168.0.7:8000", "[fe80::1]", "8.8.8.8"])
def test_a_container_is_reached_by_any_address_of_its_host(host: str, listening: str) -> None:
    for keys in ({}, {"admin_api_key": "boss"}):
        assert status(JSON | {"host": host}, path="/v1/completions", host=listening, **keys) == 200


def test_operators_name_further_hosts() -> None:
    named = {"path": "/v1/completions", "allowed_host": ("llm.example", "server", "10.0.0.7")}
    for listening in ("127.0.0.1", "0.0.0.0"):
        for host in ("llm.example", "LLM.example:443", "server:8000", "10.0.0.7"):
            assert status(JSON | {"host": host}, host=listening, **named) == 200
        assert status(JSON | {"host": "www.llm.example"}, host=listening, **named) == 403
    assert status(JSON | {"host": "box.lan:8000"}, path="/v1/completions", host="box.lan") == 200
    assert status(JSON | {"host": "192.168.0.7"}, path="/v1/completions") == 403, "loopback, so through a proxy"


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
    assert status(JSON | {"origin": "https://chat.example"}, allow_local_admin=True, **options) == 403
    assert status(JSON | {"origin": "null"}, allow_local_admin=True, **options) == 403
    assert status(JSON | {"origin": "http://localhost:8000"}, allow_local_admin=True, **options) == 200


def test_what_is_no_route_is_refused_after_the_key_was_asked_for() -> None:
    keys = {"api_key": ("user",)}
    user = JSON | {"authorization": "Bearer user"}
    assert status(JSON, path="/no/such", **keys) == 401
    assert status(user, path="/no/such", **keys) == 404
    code, headers, _ = answer(user, path="/v1/models", method="DELETE", **keys)
    assert (code, headers["allow"]) == (405, "GET, HEAD")
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


@pytest.mark.parametrize("given", ["sesame", " sesame "])
def test_a_key_may_come_as_x_api_key(given: str) -> None:
    options = {"admin_api_key": "sesame"}
    assert status(JSON | {"x-api-key": given}, **options) == 200
    for wrong in ("", "sesam", "Bearer sesame", "\xff"):
        code, headers, error = answer(JSON | {"x-api-key": wrong}, **options)
        assert (code, headers["www-authenticate"]) == (401, "Bearer") and "x-api-key" in error["message"]
    twice = [*JSON.items(), ("x-api-key", "sesame"), ("x-api-key", "sesame")]
    assert status(twice, **options) == 401
    assert status(JSON | {"x-api-key": "sesame", "authorization": "Bearer wrong"}, **options) == 200
    both = JSON | {"x-api-key": "sesame", "authorization": "Bearer user"}
    assert status(both, api_key=("user",), **options) == 403  # the key in Authorization is the one that counts


KEYS = [{}, {"api_key": ("user",)}, {"admin_api_key": "boss"}, {"api_key": ("user",), "admin_api_key": "boss"}]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("keys", KEYS)
def test_at_the_admin_address_local_programs_change_adapters_and_read_lists_without_a_key(
    keys: dict[str, Any], host: str
) -> None:
    there = {"at_admin_address": True, "host": host, **keys}
    for name in ("127.0.0.1:9000", "localhost:9000", "[::1]:9000"):
        assert status(JSON | {"host": name}, **there) == 200
        assert status({"host": name}, path="/v1/models", method="GET", **there) == 200
        assert status({"host": name}, path="/v1/adapters", method="GET", **there) == 200
        assert status({"host": name}, path="/health", method="GET", **there) == 200
    asks_for_key = "api_key" in keys
    assert status(JSON, path="/v1/completions", **there) == (401 if asks_for_key else 200)
    assert status(JSON | {"authorization": "Bearer user"}, path="/v1/completions", **there) == 200
    for header in ({"host": "evil.test"}, {"host": "10.0.0.1"}, {"origin": "http://evil.test"},
                   {"x-forwarded-for": "10.0.0.1"}):  # fmt: skip
        code, _, error = answer(JSON | header, **there)
        assert code == 403 and error["message"].startswith("At the address of --admin-listen")
        assert status(JSON | header, path="/v1/models", method="GET", **there) == 403
    assert status(JSON | {"content-type": "text/plain"}, **there) == 400
    assert status([*JSON.items(), ("host", "localhost")], **there) == 403
    assert status(JSON, path="/no/such", method="GET", **there) == 404


@pytest.mark.parametrize("keys", KEYS)
def test_the_admin_address_changes_nothing_at_the_public_one(keys: dict[str, Any]) -> None:
    assert status(JSON, admin_listen=("127.0.0.1", 9000), **keys) == (401 if "admin_api_key" in keys else 403)
