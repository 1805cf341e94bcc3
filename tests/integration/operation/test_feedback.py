"""/v1/feedback on a real server with two HTTP processes: who may rate which answers, and what is stored of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.batches import line, results, start, wait
from tests.support.clients.openai_client import strict_client
from tests.support.documented_objects import conforms
from tests.support.servers.server_process import FAKE, ServerProcess, running

KEYS = """
[ann]
key = "key-of-ann"
[bob]
key = "key-of-bob"
"""
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "1 + 1?"}], "max_tokens": 12}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "fake", "input": "1 + 1?", "max_output_tokens": 12},
    "/v1/messages": {"model": "fake", "messages": CHAT["messages"], "max_tokens": 12},
    "/v1/completions": {"model": "fake", "prompt": "1 + 1?", "max_tokens": 6},
}


@pytest.fixture(scope="module")
def flags(fake_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("feedback")
    (folder / "keys.toml").write_text(KEYS)
    (folder / "keys.toml").chmod(0o600)
    keys = ["--keys", str(folder / "keys.toml"), "--admin-api-key", "key-of-admin"]
    return ["--model", fake_model, "--data-dir", str(folder / "data"), *keys, "--feedback", "--feedback-bytes", "4096"]


@pytest.fixture(scope="module")
def server(flags: list[str]) -> Iterator[ServerProcess]:
    with running(FAKE, *flags, "--http-workers", "2") as server:
        yield server


def call(server: ServerProcess, method: str, path: str, who: str = "ann", **body: Any) -> httpx.Response:
    """One request on a connection of its own, which any of the HTTP processes may get."""
    headers = {"Authorization": f"Bearer key-of-{who}", "Content-Type": "application/json"}
    content = json.dumps(body) if body else None
    return httpx.request(method, server.url + path, headers=headers, content=content, timeout=30)


def rate(server: ServerProcess, answer_id: str, who: str = "ann", **fields: Any) -> httpx.Response:
    return call(server, "POST", "/v1/feedback", who, id=answer_id, **{"rating": "bad"} | fields)


def listed(server: ServerProcess, query: str = "") -> list[dict[str, Any]]:
    page = call(server, "GET", f"/v1/feedback?limit=100{query}", "admin").raise_for_status().json()
    assert page["object"] == "list" and not page["has_more"]
    return page["data"]


def clear(server: ServerProcess) -> None:
    for each in listed(server):
        deleted = call(server, "DELETE", f"/v1/feedback/{each['id']}", "admin")
        assert deleted.json() == {"id": each["id"], "object": "feedback", "deleted": True}


def streamed_id(answer: httpx.Response) -> str:
    events = [json.loads(each[6:]) for each in answer.text.splitlines() if each.startswith("data: {")]
    first = events[0]
    return str(first.get("id") or first.get("message", first.get("response"))["id"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_what_was_asked_and_answered_is_stored_with_its_rating(server: ServerProcess, path: str, stream: bool) -> None:
    clear(server)
    asked = call(server, "POST", path, stream=stream, **PATHS[path]).raise_for_status()
    answer_id = streamed_id(asked) if stream else asked.json()["id"]
    given = rate(server, answer_id, answer="2", comment="Say it in digits.")
    assert given.status_code == 200, given.text
    (stored,) = listed(server)
    assert stored == given.json()
    assert conforms(httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer key-of-ann"}).json(),
                    "FeedbackObject", stored)  # fmt: skip
    shown = {name: stored[name] for name in ("answer_id", "rating", "answer", "comment", "created_by", "model")}
    assert shown == {
        "answer_id": answer_id,
        "rating": "bad",
        "answer": "2",
        "comment": "Say it in digits.",
        "created_by": "ann",
        "model": "fake",
    }
    if path == "/v1/completions":
        assert (stored["prompt"], stored["messages"], stored["choice"]["text"]) == ("1 + 1?", None, "1 + 1?")
    else:
        assert (stored["prompt"], stored["messages"]) == (None, CHAT["messages"])
        assert stored["choice"]["message"] == {"role": "assistant", "content": "user\n1 + 1?\n"}
    assert stored["choice"]["finish_reason"] == "length"


def test_each_of_several_answers_has_its_own_rating(server: ServerProcess) -> None:
    clear(server)
    body = {"model": "fake", "prompt": [[97, 98], [99, 100]], "n": 2, "max_tokens": 2}
    asked = call(server, "POST", "/v1/completions", **body).json()
    for index in range(4):
        assert rate(server, asked["id"], index=index, rating="good").status_code == 200
    stored = {each["index"]: (each["prompt"], each["choice"]["text"]) for each in listed(server, "&rating=good")}
    assert stored == {0: ("ab", "ab"), 1: ("ab", "ab"), 2: ("cd", "cd"), 3: ("cd", "cd")}
    refused = rate(server, asked["id"], index=4)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "The field 'index' must be less than 4, the number of answers."


def test_a_key_rates_its_own_answers_only_and_the_admin_reads_them(server: ServerProcess) -> None:
    answer_id = call(server, "POST", "/v1/chat/completions", **CHAT).json()["id"]
    unknown = "chatcmpl-" + "0" * 24
    for given, who in ((answer_id, "bob"), (answer_id, "admin"), (unknown, "ann")):
        refused = rate(server, given, who)
        assert refused.status_code == 404 and refused.json()["error"]["param"] == "id"
        assert refused.json()["error"]["message"] == (
            f"The answer '{given}' cannot be rated: this key has no such answer, or it is no longer kept."
        )
    for method, path in (("GET", "/v1/feedback"), ("DELETE", "/v1/feedback/feedback-1")):
        assert call(server, method, path, "ann").status_code == 403
    absent = call(server, "DELETE", "/v1/feedback/feedback-1", "admin")
    assert (absent.status_code, absent.json()["error"]["message"]) == (404, "The rating 'feedback-1' does not exist.")
    for body, param in (({"rating": "fine"}, "rating"), ({"id": "x"}, "id"), ({"stars": 5}, "stars")):
        refused = rate(server, answer_id, **body) if "id" not in body else rate(server, "x")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_client_can_refuse_and_batches_are_not_kept(server: ServerProcess) -> None:
    for path, body in PATHS.items():
        if path != "/v1/messages":  # which has no such field
            answer_id = call(server, "POST", path, store=False, **body).json()["id"]
            assert rate(server, answer_id).status_code == 404, path
    echoed = call(server, "POST", "/v1/completions", echo=True, **PATHS["/v1/completions"]).json()["id"]
    assert rate(server, echoed).status_code == 404
    with strict_client(server.url).with_options(api_key="key-of-ann") as client:
        batch = wait(client, start(client, line("r0", {"model": "fake", "prompt": "1 + 1?", "max_tokens": 2})).id)
        (answered,) = results(client, batch.output_file_id).values()
    assert rate(server, answered["response"]["body"]["id"]).status_code == 404


def test_ratings_have_a_limit_for_each_key(server: ServerProcess) -> None:
    clear(server)
    refused = None
    for _ in range(20):
        answer_id = call(server, "POST", "/v1/chat/completions", **CHAT).json()["id"]
        refused = rate(server, answer_id, comment="c" * 300)
        if refused.status_code != 200:
            break
    assert refused is not None and (refused.status_code, refused.json()["error"]["code"]) == (400, "storage_limit")
    assert "at most 4096 are allowed" in refused.json()["error"]["message"]
    other = call(server, "POST", "/v1/chat/completions", "bob", **CHAT).json()["id"]
    assert rate(server, other, "bob").status_code == 200
    clear(server)


def test_without_the_switch_nothing_is_kept(fake_server: ServerProcess) -> None:
    answer_id = httpx.post(f"{fake_server.url}/v1/chat/completions", json=CHAT, timeout=30).json()["id"]
    refused = httpx.post(f"{fake_server.url}/v1/feedback", json={"id": answer_id, "rating": "good"}, timeout=30)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "feedback_required"
    assert refused.json()["error"]["message"] == "Feedback is off because the server was started without --feedback."


def test_a_killed_server_knows_its_answers_and_ratings_again(server: ServerProcess, flags: list[str]) -> None:
    clear(server)
    rated, unrated = (call(server, "POST", "/v1/chat/completions", **CHAT).json()["id"] for _ in range(2))
    before = rate(server, rated).json()
    server.process.kill()
    server.wait()
    folder = Path(flags[flags.index("--data-dir") + 1])
    found = sorted(path.name for path in folder.glob("feedback*"))
    assert found[0] == "feedback.sqlite3"
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in found)
    with running(FAKE, *flags) as again:
        assert listed(again) == [before]
        assert rate(again, unrated, rating="good").status_code == 200
