"""Who may load and unload adapters, by how the server was started and what a request carries."""

import asyncio
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from server.api.errors import ApiError
from server.auth import require_admin

JSON = {"content-type": "application/json; charset=utf-8", "host": "127.0.0.1:8000"}


def status(host: str, key: str | None, headers: dict[str, str]) -> int:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    service = SimpleNamespace(settings=SimpleNamespace(host=host, admin_api_key=key))
    try:
        asyncio.run(require_admin(Request({"type": "http", "headers": raw}), service))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_without_a_key_the_loopback_may(host: str) -> None:
    assert status(host, None, JSON) == 200
    assert status(host, None, JSON | {"host": "localhost:1"}) == 200
    assert status(host, None, JSON | {"host": "[::1]:8000"}) == 200
    assert status(host, None, JSON | {"host": "localhost"}) == 200
    for name in ("evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test:80", "", "evil.test:127.0.0.1"):
        assert status(host, None, JSON | {"host": name}) == 403
    assert status(host, None, JSON | {"x-forwarded-for": "10.0.0.1"}) == 403
    assert status(host, None, JSON | {"content-type": "text/plain"}) == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "server.example"])
def test_without_a_key_nobody_may_where_others_can_connect(host: str) -> None:
    assert status(host, None, JSON) == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_with_a_key_who_has_it_may(host: str) -> None:
    assert status(host, "sesame", JSON | {"authorization": "Bearer sesame", "host": "any.where"}) == 200
    assert status(host, "sesame", JSON | {"authorization": "bearer sesame"}) == 200
    for wrong in ("", "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame", "sesame", "Bearer sésame"):
        assert status(host, "sesame", JSON | {"authorization": wrong}) == 401
    assert status(host, "sesame", JSON) == 401
