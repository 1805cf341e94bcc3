"""The pages' files as the server sends them: known ones only, under a strict policy, and not twice."""

from importlib.resources import files

import httpx
import pytest
from fastapi.testclient import TestClient

from stellarbyte_server.api.contract.objects import ErrorBody
from tests.support.application import make_app

NAMES = sorted(entry.name for entry in files("stellarbyte_web").iterdir() if not entry.name.startswith("__"))
PATHS = {"index.html": "/", "tune.html": "/tune", "status.html": "/status"} | {
    name: f"/web/{name}" for name in NAMES if not name.endswith(".html")
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(make_app(api_key=("a-key",)), base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_served_to_anybody_as_what_it_is(client: TestClient, name: str) -> None:
    answer = client.get(PATHS[name])
    assert answer.status_code == 200
    assert answer.content == files("stellarbyte_web").joinpath(name).read_bytes()
    assert answer.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    assert client.head(PATHS[name]).headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize("path", PATHS.values())
def test_every_file_has_the_policy(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again: httpx.Response = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag and again.headers["content-security-policy"]
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/web/chat.js").headers["etag"] != tag


def test_pages_work_below_a_path_that_a_proxy_takes_away_or_leaves() -> None:
    client = TestClient(make_app(root_path="/llm"), base_url="http://127.0.0.1", root_path="/llm")
    for path in PATHS.values():
        assert client.get(path).status_code == client.get(f"/llm{path}").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "types.d.ts",
        "index.html",
        "status.html",
        "",
        "no.js",
        "../types.d.ts",
        "%2e%2e/types.d.ts",
        "a/chat.js",
    ],
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/web/{name}")
    assert answer.status_code in (401, 404)  # a path that leaves /web is another route, which needs a key
    ErrorBody.model_validate_json(answer.content)
