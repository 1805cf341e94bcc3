"""Files and batches by the official openai client: in front of the fake engine, and with the demo model."""

import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from tests.support.application import make_app
from tests.support.batches import completions, line, results, start, upload, wait
from tests.support.clients.openai_client import QUESTION, strict_client
from tests.support.models.references import MODEL_NAME
from tests.support.over_http import assert_error
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.server_process import ServerProcess


@pytest.fixture(scope="module")
def client(fake_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with strict_client(fake_server.url) as client:
        yield client


# Files


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI) -> None:
    content = bytes(range(256)) * 2000
    file = client.files.create(file=("a name.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.object) == ("a name.jsonl", len(content), "batch", "file")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_an_empty_file_can_be_stored(client: openai.OpenAI) -> None:
    file_id = upload(client, b"")
    assert client.files.content(file_id).content == b""


def test_files_are_listed_in_pages_in_both_orders(client: openai.OpenAI) -> None:
    made = [upload(client, b"x") for _ in range(5)]
    newest_first = [file.id for file in client.files.list(limit=2)]  # the client asks for all pages
    assert newest_first[:5] == made[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=3)] == newest_first[::-1]
    page = client.files.list(limit=2, after=made[3])
    assert ([file.id for file in page.data], page.has_more) == ([made[2], made[1]], True)
    assert all(file.purpose == "batch_output" for file in client.files.list(purpose="batch_output"))


def test_a_file_says_when_it_expires(client: openai.OpenAI) -> None:
    month_s = 30 * 86_400
    for expires_after, kept_s in ((openai.omit, month_s), ({"anchor": "created_at", "seconds": 3600}, 3600)):
        file = client.files.create(file=("a", b"x"), purpose="batch", expires_after=expires_after)
        assert file.expires_at is not None and file.expires_at - file.created_at == kept_s


# Batches


def test_a_batch_answers_each_request_as_its_endpoint_would(client: openai.OpenAI) -> None:
    batch = start(client, completions(70), metadata={"for": "a test"})
    assert batch.status == "validating" and batch.metadata == {"for": "a test"}
    assert batch.expires_at == batch.created_at + 86_400
    ended = wait(client, batch.id)
    assert (ended.status, ended.error_file_id, ended.errors) == ("completed", None, None)
    assert ended.request_counts.model_dump() == {"total": 70, "completed": 70, "failed": 0}
    assert ended.in_progress_at <= ended.finalizing_at <= ended.completed_at
    answers = results(client, ended.output_file_id)
    assert answers.keys() == {f"r{i}" for i in range(70)}
    for i in range(70):
        response = answers[f"r{i}"]["response"]
        assert response["status_code"] == 200 and response["request_id"]
        assert response["body"]["choices"][0]["text"] == f"<{i:03}><{i:03}>"[:8]
        assert answers[f"r{i}"]["error"] is None
    file = client.files.retrieve(ended.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_requests_that_fail_are_in_the_error_file_with_their_answers(
    client: openai.OpenAI, fake_server: ServerProcess
) -> None:
    bad = {
        "hot": {"temperature": 9},
        "unknown": {"model": "other"},
        "new": {"no_such_field": 1},
        "stream": {"stream": True},
        "first": {"priority": 1},
        "rejected": {"prompt": "!reject"},
    }
    good = {"model": "fake", "prompt": "ab", "max_tokens": 2}
    lines = [line(name, good | fields) for name, fields in bad.items()]
    ended = wait(client, start(client, b"\n".join([*lines, line("fine", good)])).id)
    assert ended.status == "completed"
    assert ended.request_counts.model_dump() == {"total": 7, "completed": 1, "failed": 6}
    assert results(client, ended.output_file_id).keys() == {"fine"}
    errors = results(client, ended.error_file_id)
    assert errors.keys() == bad.keys()
    for name in ("hot", "unknown", "new", "rejected"):
        asked = httpx.post(f"{fake_server.url}/v1/completions", json=good | bad[name])
        assert errors[name]["response"]["status_code"] == asked.status_code
        assert errors[name]["response"]["body"] == asked.json()
    for name, param in (("stream", "stream"), ("first", "priority")):
        response = errors[name]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, param)


def test_a_batch_can_be_cancelled_and_keeps_what_was_answered(
    client: openai.OpenAI, fake_server: ServerProcess
) -> None:
    fast = line("fast", {"model": "fake", "prompt": "ab", "max_tokens": 1})
    slow = line("slow", {"model": "fake", "prompt": SLOW, "max_tokens": 1900})
    batch = start(client, fast + slow)
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.05)
    with pytest.raises(openai.BadRequestError, match=batch.id):
        client.files.delete(batch.input_file_id)  # it is being read
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    ended = wait(client, batch.id)
    assert ended.status == "cancelled" and ended.cancelling_at <= ended.cancelled_at
    assert results(client, ended.output_file_id).keys() == {"fast"}
    assert fake_server.metric("vllm:num_requests_running") == 0
    client.files.delete(batch.input_file_id)
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.batches.cancel(batch.id)


def test_batches_are_listed_newest_first(client: openai.OpenAI) -> None:
    made = [start(client, completions(1)).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    assert client.batches.list(limit=1, after=made[1]).data[0].id == made[0]
    for batch_id in made:
        wait(client, batch_id)


def test_results_are_kept_as_long_as_was_asked(client: openai.OpenAI) -> None:
    expiry = {"anchor": "created_at", "seconds": 7200}
    ended = wait(client, start(client, completions(1), output_expires_after=expiry).id)
    file = client.files.retrieve(ended.output_file_id)
    assert file.expires_at - file.created_at == 7200


def test_a_server_without_a_folder_says_how_to_get_one() -> None:
    with TestClient(make_app(), base_url="http://127.0.0.1") as http:
        for answer in (
            http.get("/v1/files"),
            http.get("/v1/batches/batch_1"),
        ):
            assert "--data-dir" in assert_error(answer, 400, code="data_dir_required")["message"]


# The demo model


def test_the_demo_model_answers_batches_of_every_endpoint_as_it_answers_requests(demo_server: ServerProcess) -> None:
    asked = {
        "/v1/chat/completions": {"messages": QUESTION, "temperature": 0, "max_tokens": 8},
        "/v1/completions": {"prompt": "The sky is", "temperature": 0, "max_tokens": 8},
        "/v1/embeddings": {"input": "A cat sleeps."},
        "/v1/responses": {"input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 8},
    }
    with strict_client(demo_server.url) as client:
        batches = {
            url: start(client, line("one", {"model": MODEL_NAME, **body}, url), url).id for url, body in asked.items()
        }
        for url, batch_id in batches.items():
            ended = wait(client, batch_id)
            (answer,) = results(client, ended.output_file_id).values()
            direct = httpx.post(demo_server.url + url, json={"model": MODEL_NAME, **asked[url]}, timeout=60).json()
            assert _essence(answer["response"]["body"]) == _essence(direct)


def _essence(body: dict[str, object]) -> str:
    """An answer without what differs from one to the next."""
    kept = {name: body[name] for name in ("choices", "data", "output") if name in body}
    for item in kept.get("output", ()):
        item.pop("id")
    return json.dumps(kept)
