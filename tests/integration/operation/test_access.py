"""Every route with no key, a wrong one, a user's and the operator's: the answers are those of one table."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from stellarbyte_server.access.rules import Access, allows, rules_of
from tests.support.application import make_app
from tests.support.servers.server_process import FAKE, ServerProcess, running

USER_KEYS = ("user-key-of-ann", "user-key-of-bob")
ADMIN_KEY = "key-of-the-operator"

# Written out once more: a row that changes in the server must be changed here, too.
ROUTES = {
    ("POST", "/v1/completions"): "user",
    ("POST", "/v1/chat/completions"): "user",
    ("POST", "/v1/responses"): "user",
    ("POST", "/v1/messages"): "user",
    ("POST", "/v1/messages/count_tokens"): "user",
    ("POST", "/v1/embeddings"): "user",
    ("POST", "/v1/score"): "user",
    ("POST", "/score"): "user",
    ("POST", "/v1/rerank"): "user",
    ("POST", "/v2/rerank"): "user",
    ("POST", "/rerank"): "user",
    ("POST", "/v1/completions/render"): "user",
    ("POST", "/v1/chat/completions/render"): "user",
    ("POST", "/tokenize"): "user",
    ("POST", "/detokenize"): "user",
    ("POST", "/v1/files"): "user",
    ("GET", "/v1/files"): "user",
    ("GET", "/v1/files/{file_id}"): "user",
    ("DELETE", "/v1/files/{file_id}"): "user",
    ("GET", "/v1/files/{file_id}/content"): "user",
    ("POST", "/v1/batches"): "user",
    ("GET", "/v1/batches"): "user",
    ("GET", "/v1/batches/{batch_id}"): "user",
    ("POST", "/v1/batches/{batch_id}/cancel"): "user",
    ("POST", "/v1/fine_tuning/jobs"): "user",
    ("GET", "/v1/fine_tuning/jobs"): "user",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): "user",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): "user",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): "user",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): "user",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/publish"): "admin",
    ("POST", "/v1/fine_tuning/files/check"): "user",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): "user",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): "user",
    ("POST", "/v1/feedback"): "user",
    ("GET", "/v1/feedback"): "admin",
    ("DELETE", "/v1/feedback/{feedback_id}"): "admin",
    ("DELETE", "/v1/models/{name:path}"): "user",
    ("GET", "/v1/models"): "user",
    ("GET", "/v1/models/{name:path}"): "user",
    ("GET", "/v1/adapters"): "user",
    ("POST", "/v1/load_lora_adapter"): "admin",
    ("POST", "/v1/unload_lora_adapter"): "admin",
    ("GET", "/v1/adapters/{name:path}/versions"): "admin",
    ("POST", "/v1/adapters/{name:path}/rollback"): "admin",
    ("POST", "/v1/adapters/{name:path}/split"): "admin",
    ("GET", "/health"): "open",
    ("GET", "/ready"): "open",
    ("GET", "/version"): "open",
    ("GET", "/metrics"): "open",
    ("GET", "/openapi.json"): "user",
    ("GET", "/docs"): "user",
    ("GET", "/docs/static/{path:path}"): "user",
    ("GET", "/"): "open",
    ("GET", "/status"): "open",
    ("GET", "/tune"): "open",
    ("GET", "/web/{path:path}"): "open",
}
ROUTES |= {("HEAD", path): access for (method, path), access in ROUTES.items() if method == "GET"}
GIVEN = {"no": None, "wrong": "wrong-key", "user": USER_KEYS[1], "admin": ADMIN_KEY}
# What each kind of route says to each kind of key; 0: anything but 401 and 403.
ANSWERS = {
    "open": {"no": 0, "wrong": 0, "user": 0, "admin": 0},
    "user": {"no": 401, "wrong": 401, "user": 0, "admin": 0},
    "admin": {"no": 401, "wrong": 401, "user": 403, "admin": 0},
}


@pytest.fixture(scope="module", params=["1", "2"])
def guarded(fake_model: str, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    flags = ["--api-key", *USER_KEYS, "--admin-api-key", ADMIN_KEY, "--http-workers", request.param]
    with running(FAKE, "--model", fake_model, *flags) as server:
        yield server
        for key in (*USER_KEYS, ADMIN_KEY, "wrong-key"):
            assert key not in server.log()


def call(server: ServerProcess, method: str, path: str, key: str | None, **options: object) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    path = path.replace("{name:path}", "fake").replace("{path:path}", "swagger-ui.css")
    if method == "POST":
        options = {"json": {"model": "fake", "prompt": "hi", "max_tokens": 1}} | options
    return httpx.request(method, server.url + path, headers=headers, timeout=30, **options)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_route_is_for_whom_the_table_says(guarded: ServerProcess, method: str, path: str) -> None:
    for kind, key in GIVEN.items():
        answer = call(guarded, method, path, key)
        wanted = ANSWERS[ROUTES[method, path]][kind]
        assert answer.status_code < 500
        if not wanted:
            assert answer.status_code not in (401, 403), (kind, answer.text)
            continue
        assert answer.status_code == wanted, (kind, answer.text)
        assert answer.headers["x-request-id"]
        if wanted == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            kinds = {401: ("authentication_error", "invalid_api_key"), 403: ("permission_error", None)}
            error = answer.json()["error"]
            assert error["type"] == kinds[wanted][0]
            assert path.startswith("/v1/messages") or error["code"] == kinds[wanted][1]


def test_nothing_else_is_served_and_nothing_said_of_it_without_a_key(guarded: ServerProcess) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in ("/", "/v1", "/no/such", "/redoc", "/docs/oauth2-redirect", *{path for _, path in ROUTES}):
            if (method, path) in ROUTES or (method == "TRACE" and path.endswith("}")):
                continue
            if "open" not in {ROUTES.get((other, path)) for other in ("GET", "HEAD", "POST")} or method != "GET":
                assert call(guarded, method, path, None, json=None).status_code == 401, (method, path)
            assert call(guarded, method, path, USER_KEYS[0], json=None).status_code in (404, 405), (method, path)


def test_the_log_names_the_key_and_not_what_it_is(guarded: ServerProcess) -> None:
    assert call(guarded, "POST", "/v1/completions", USER_KEYS[0]).status_code == 200
    assert call(guarded, "POST", "/v1/completions", ADMIN_KEY).status_code == 200
    deadline_s = time.monotonic() + 60
    while "key=api-key-1" not in guarded.log() or "key=admin" not in guarded.log():
        assert time.monotonic() < deadline_s  # a request's line comes after its last byte
        time.sleep(0.05)


def test_without_keys_users_routes_are_open_to_any_key(fake_server: ServerProcess) -> None:
    for key in (None, "unused"):
        for (method, path), access in ROUTES.items():
            if access != "admin":
                assert call(fake_server, method, path, key).status_code not in (401, 403)


def test_without_keys_nobody_is_an_operator_and_the_server_says_how_to_become_one(
    fake_model: str, tmp_path: Path
) -> None:
    flags = ["--model", fake_model, "--adapter-dir", str(tmp_path)]
    body = {"lora_name": "x", "lora_path": "x"}
    for option, status in ((), 403), (("--allow-local-admin",), 400):  # the fake engine has no adapters
        with running(FAKE, *flags, *option) as server:
            answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body)
            assert answer.status_code == status
            hints = [answer.json()["error"]["message"], server.log()]
            assert all(("--allow-local-admin" in hint) == (status == 403) for hint in hints)


def test_behind_a_published_port_a_rebound_name_reads_and_runs_nothing(fake_model: str) -> None:
    flags = ["--host", "0.0.0.0", "--admin-api-key", ADMIN_KEY, "--allowed-host", "llm.example"]
    with running(FAKE, "--model", fake_model, *flags) as server:
        for host, status in (("127.0.0.1", 200), ("10.1.2.3:80", 200), ("llm.example", 200), ("evil.test", 403)):
            headers = {"Host": host, "Origin": f"http://{host}"}
            body = {"model": "fake", "prompt": "hi", "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == status
            for path in ("/v1/models", "/metrics", "/health", "/"):
                assert httpx.get(server.url + path, headers=headers).status_code == status, path


@pytest.fixture
def app() -> FastAPI:
    return make_app()


def test_the_application_has_the_routes_of_the_table(app: FastAPI) -> None:
    declared = {route: access.value for route, access in rules_of(app).items()}
    assert declared | {route: access for route, access in ROUTES.items() if route[0] == "HEAD"} == ROUTES


def test_an_application_with_a_route_that_declares_no_rule_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    router = APIRouter()
    router.get("/v1/secrets")(lambda: None)
    monkeypatch.setattr("stellarbyte_server.http.app.ROUTERS", (router,))
    with pytest.raises(AssertionError, match="/v1/secrets"):
        make_app()


def test_a_route_without_a_rule_of_its_own_is_refused(app: FastAPI) -> None:
    async def endpoint() -> None: ...

    @allows(Access.OPEN)
    async def declared() -> None: ...

    for add in (
        lambda: app.add_api_route("/v1/secrets", endpoint),
        lambda: app.add_route("/v1/secrets", endpoint),
        lambda: app.add_api_websocket_route("/v1/secrets", endpoint),
        lambda: app.mount("/v1/secrets", FastAPI()),
        lambda: app.add_api_route("/health", endpoint, methods=["POST"]),
        lambda: app.add_api_route("/health", declared, methods=["GET"]),  # where there is one already
        lambda: app.add_api_websocket_route("/v1/secrets", declared),
    ):
        kept = list(app.router.routes)
        add()
        with pytest.raises(AssertionError, match=r"/v1/secrets|/health"):
            rules_of(app)
        app.router.routes[:] = kept
    rules_of(app)


def test_other_origins_may_call_only_when_they_are_named(fake_model: str, fake_server: ServerProcess) -> None:
    preflight = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    refused = httpx.options(f"{fake_server.url}/v1/completions", headers=preflight)
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers
    flags = ["--api-key", "user", "--cors-origin", "https://chat.example", "http://localhost:3000"]
    with running(FAKE, "--model", fake_model, *flags) as server:
        allowed = httpx.options(f"{server.url}/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = httpx.options(f"{server.url}/v1/completions", headers=preflight | {"Origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        assert other.json()["error"]["message"] == "Disallowed CORS origin; see --cors-origin."
        body = {"model": "fake", "prompt": "hi", "max_tokens": 1}
        user = {"Authorization": "Bearer user"}
        for key, path, wanted in (
            (user, "/v1/completions", 200),
            ({}, "/v1/completions", 401),
            (user, "/no/such", 404),
            (user, "/v1/load_lora_adapter", 403),
        ):
            for origin, shown in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
                answer = httpx.post(server.url + path, json=body, headers=key | {"Origin": origin})
                assert answer.status_code == wanted
                assert answer.headers.get("access-control-allow-origin") == shown
            assert (
                "X-Request-Id"
                in httpx.post(server.url + path, json=body, headers=key | {"Origin": "http://localhost:3000"}).headers[
                    "access-control-expose-headers"
                ]
            )


def test_an_unexpected_failure_has_the_headers_of_cors_too() -> None:
    from fastapi.testclient import TestClient

    with TestClient(make_app(cors_origin=("*",)), base_url="http://127.0.0.1") as client:
        answer = client.get("/v1/models", headers={"Origin": "https://chat.example"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert answer.headers["access-control-allow-origin"] == "*" and answer.headers["x-request-id"]
