"""Files and batches of hostile users: bad lines, bad forms, names that look like paths, other keys' files."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.batches import completions, line, results, start, upload, wait
from tests.support.clients.openai_client import strict_client
from tests.support.over_http import assert_error
from tests.support.servers.server_process import FAKE, ServerProcess, running

ANN, BOB = "key-of-ann", "key-of-bob"
GOOD = {"model": "fake", "prompt": "ab", "max_tokens": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored") / "data"


@pytest.fixture(scope="module")
def server(fake_model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[ann]\nkey = "{ANN}"\n[bob]\nkey = "{BOB}"\nmodels = ["another"]\n')
    keys.chmod(0o600)
    bounds = ["--max-body-bytes", "20000", "--max-file-bytes", "300000", "--max-stored-bytes", "700000"]
    with running(FAKE, "--model", fake_model, "--keys", str(keys), "--data-dir", str(folder), *bounds) as server:
        yield server


@pytest.fixture(scope="module")
def ann(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with strict_client(server.url) as client:
        yield client.with_options(api_key=ANN)


@pytest.fixture(scope="module")
def bob(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with strict_client(server.url) as client:
        yield client.with_options(api_key=BOB)


def post_form(server: ServerProcess, content: bytes, boundary: str = "b", key: str = ANN) -> httpx.Response:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/files", content=content, headers=headers)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    shown = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode() + value + b"\r\n"


PURPOSE = part("purpose", b"batch")
FILE = part("file", b"{}", "in.jsonl")
END = b"--b--\r\n"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (PURPOSE + END, "file"),
        (FILE + END, "purpose"),
        (FILE + part("purpose", b"fine-tunes") + END, "purpose"),
        (FILE + part("purpose", b"../../etc/passwd") + END, "purpose"),
        (FILE + FILE + PURPOSE + END, "file"),
        (FILE + PURPOSE + PURPOSE + END, "purpose"),
        (FILE + PURPOSE + part("path", b"/tmp/x") + END, "path"),
        (FILE + PURPOSE + part("expires_after[seconds]", b"3600") + END, "expires_after[anchor]"),
        (FILE + PURPOSE + part("expires_after[anchor]", b"created_at") + END, "expires_after[seconds]"),
        (
            FILE + PURPOSE + part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"1") + END,
            "expires_after[seconds]",
        ),
        (PURPOSE + part("file", b"x") + END, "file"),  # without a filename
        (PURPOSE + part("file", b"x", "a\x01b") + END, "file"),
        (PURPOSE + part("file", b"x", "n" * 300) + END, "file"),
        (FILE + part("purpose", b"b" * 2000) + END, "purpose"),
        (FILE + PURPOSE, None),  # cut off
        (b"no form at all", None),
        (b"", None),
        (b"".join(part(f"f{i}", b"x") for i in range(20)) + END, None),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, None),
        (b"--b\r\n" + b"X-A: " + b"y" * 100_000 + b"\r\n\r\nx\r\n" + END, None),
        (b"--b\r\n" + b"X-A: y\r\n" * 1000 + b"\r\nx\r\n" + END, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_form_is_refused_by_name(server: ServerProcess, content: bytes, param: str | None) -> None:
    assert_error(post_form(server, content), 400, param)


def test_what_is_no_form_is_refused(server: ServerProcess) -> None:
    url, headers = f"{server.url}/v1/files", {"Authorization": f"Bearer {ANN}"}
    for answer in (
        httpx.post(url, json=GOOD, headers=headers),
        httpx.post(url, headers=headers),
        post_form(server, FILE + PURPOSE + END, boundary="x" * 300),
        post_form(server, FILE + PURPOSE + END, boundary=""),
    ):
        assert "multipart/form-data" in assert_error(answer, 400)["message"]


@pytest.mark.parametrize(
    "name", ["../../../../tmp/evil", "/etc/passwd", "..", "a/b.jsonl", "..\\x", "%2e%2e%2fx", "index.sqlite3"]
)
def test_a_filename_is_never_a_path(ann: openai.OpenAI, folder: Path, name: str) -> None:
    before = {path for path in folder.parent.rglob("*")} | {folder / f"index.sqlite3-{kind}" for kind in ("wal", "shm")}
    file = ann.files.create(file=(name, b"{}"), purpose="batch")
    assert file.filename == name
    (made,) = (
        {path for path in folder.parent.rglob("*")}
        - before
        - {folder / "index.sqlite3-wal", folder / "index.sqlite3-shm"}
    )
    assert made == folder / "files" / file.id
    ann.files.delete(file.id)
    assert not made.exists()


@pytest.mark.parametrize(
    "given", ["%2e%2e", "..%2flock", "%2e%2e%2flock", "index.sqlite3", "file-", "file-x/../..", "a%00b", "%C3%A9" * 100]
)
def test_an_id_is_never_a_path(server: ServerProcess, given: str) -> None:
    headers = {"Authorization": f"Bearer {ANN}"}
    for method, path in (
        ("GET", f"/v1/files/{given}"),
        ("GET", f"/v1/files/{given}/content"),
        ("DELETE", f"/v1/files/{given}"),
        ("GET", f"/v1/batches/{given}"),
        ("POST", f"/v1/batches/{given}/cancel"),
    ):
        answer = httpx.request(method, server.url + path, headers=headers)
        assert answer.status_code in (404, 405), (method, path, answer.text)
        assert answer.json()["error"]["message"].endswith(".")


def test_what_is_another_keys_does_not_exist(ann: openai.OpenAI, bob: openai.OpenAI) -> None:
    file_id = upload(ann, completions(2))
    ended = wait(ann, ann.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id)
    for given in (file_id, ended.output_file_id):
        for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(given)
    for call in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(ended.id)
    with pytest.raises(openai.NotFoundError):
        bob.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")
    assert file_id not in [file.id for file in bob.files.list()]
    assert ended.id not in [batch.id for batch in bob.batches.list()]
    for page in (bob.files.list, bob.batches.list):
        with pytest.raises(openai.BadRequestError):
            page(after=file_id)


def test_a_key_may_do_no_more_by_a_batch_than_by_requests(bob: openai.OpenAI) -> None:
    ended = wait(bob, start(bob, line("a", GOOD)).id)
    (result,) = results(bob, ended.error_file_id).values()
    assert result["response"]["status_code"] == 403
    assert result["response"]["body"]["error"]["code"] == "model_not_allowed"


BAD_INPUTS = {
    "empty_file": b"",
    "blank": b"\n  \n\n",
    "invalid_json_line": line("a", GOOD) + b'{"custom_id": "b", \n',
    "no_object": b"[1, 2]\n",
    "not_utf8": b'{"custom_id": "\xff", "method": "POST", "url": "/v1/completions", "body": {}}',
    "deep": b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"x": ' + b"[" * 9000 + b"}",
    "missing": b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}',
    "unknown": line("a", GOOD, more=1),
    "no_id": line("", GOOD),
    "long_id": line("x" * 600, GOOD),
    "duplicate_custom_id": line("a", GOOD) + line("a", GOOD),
    "method": line("a", GOOD, method="GET"),
    "mismatched_url": line("a", GOOD, "/v1/embeddings"),
    "admin_url": line("a", GOOD, "/v1/load_lora_adapter"),
    "body_list": line("a", [GOOD]),
    "body_text": line("a", "x"),
    "long_line": line("a", GOOD | {"prompt": "x" * 250_000}),
    "long_body": line("a", GOOD | {"prompt": "x" * 20_001}),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_batch_of_bad_lines_fails_and_says_where(ann: openai.OpenAI, kind: str) -> None:
    ended = wait(ann, start(ann, BAD_INPUTS[kind]).id)
    assert ended.status == "failed" and ended.failed_at and ended.output_file_id is None
    assert ended.request_counts.completed == ended.request_counts.failed == 0
    (problem,) = ended.errors.data
    assert problem.message.endswith(".") and "Traceback" not in problem.message
    assert problem.line == {"empty_file": None, "blank": None}.get(kind, BAD_INPUTS[kind].strip().count(b"\n") + 1)
    if kind in ("empty_file", "invalid_json_line", "duplicate_custom_id", "mismatched_url"):
        assert problem.code == kind
    ann.files.delete(ended.input_file_id)


def test_of_many_bad_lines_the_first_hundred_are_told(ann: openai.OpenAI) -> None:
    ended = wait(ann, start(ann, b"x\n" * 1000).id)
    assert [problem.line for problem in ended.errors.data] == list(range(1, 101))


def test_lines_over_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stellarbyte_server.batch import input_lines

    monkeypatch.setattr(input_lines, "MAX_LINES", 3)
    (tmp_path / "in").write_bytes(completions(4))
    with open(tmp_path / "in", "rb", buffering=0) as file:
        _, problems = input_lines.check_input(file, "/v1/completions", 1000)
    assert [problem.code for problem in problems] == ["too_many_lines"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input_file_id"),
        ({"input_file_id": "file-0"}, 404, "input_file_id"),
        ({"input_file_id": "../lock"}, 404, "input_file_id"),
        ({"input_file_id": ["a"]}, 400, "input_file_id"),
        ({"input_file_id": "x" * 100}, 400, "input_file_id"),
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"endpoint": "/v1/files"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, 400, "output_expires_after.anchor"),
        ({"priority": 1}, 400, "priority"),
    ],
    ids=str,
)
def test_a_bad_batch_is_refused_by_name(
    server: ServerProcess, ann: openai.OpenAI, body: dict[str, object], status: int, param: str
) -> None:
    good = {"endpoint": "/v1/completions", "completion_window": "24h"}
    if body and "input_file_id" not in body:
        good["input_file_id"] = upload(ann, completions(1))
    answer = httpx.post(f"{server.url}/v1/batches", json=good | body, headers={"Authorization": f"Bearer {ANN}"})
    assert_error(answer, status, param)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=1000000", "order=up", "purpose=x", "after=", "page=2", "limit=1&limit=2"]
)
def test_a_bad_query_is_refused_by_name(server: ServerProcess, query: str) -> None:
    answer = httpx.get(f"{server.url}/v1/files?{query}", headers={"Authorization": f"Bearer {ANN}"})
    assert_error(answer, 400, query.partition("=")[0])


def test_results_are_no_input(ann: openai.OpenAI) -> None:
    ended = wait(ann, start(ann, completions(1)).id)
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        ann.batches.create(input_file_id=ended.output_file_id, endpoint="/v1/completions", completion_window="24h")


def test_a_file_has_a_greatest_size_however_it_is_declared(server: ServerProcess, folder: Path) -> None:
    content = PURPOSE + part("file", b"x" * 300_001, "in.jsonl") + END
    assert_error(post_form(server, content), 413, code="request_too_large")
    assert_error(post_form(server, content + b"x" * 2**20), 413, code="request_too_large")

    def pieces() -> Iterator[bytes]:
        yield PURPOSE + b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(1000):
            yield b"x" * 10_000

    try:
        assert_error(post_form(server, pieces()), 413, code="request_too_large")  # type: ignore[arg-type]
    except httpx.TransportError:
        pass  # it was answered before all was sent
    assert not list((folder / "uploads").iterdir())


def test_a_key_can_store_only_so_much(bob: openai.OpenAI, ann: openai.OpenAI) -> None:
    stored = [upload(bob, b"x" * 300_000) for _ in range(2)]
    with pytest.raises(openai.BadRequestError) as full:
        upload(bob, b"x" * 300_000)
    assert full.value.code == "storage_limit"
    upload(ann, b"x")  # another key has its own room
    bob.files.delete(stored[0])
    stored[0] = upload(bob, b"x" * 300_000)
    for file_id in stored:
        bob.files.delete(file_id)


def test_an_upload_that_breaks_off_leaves_nothing(server: ServerProcess, folder: Path) -> None:
    before = set((folder / "files").iterdir())
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ANN}\r\nContent-Length: 100000\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + PURPOSE + FILE[:-2]
        )
        deadline_s = time.monotonic() + 30
        while not list((folder / "uploads").iterdir()):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    while list((folder / "uploads").iterdir()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert set((folder / "files").iterdir()) == before


def test_a_key_uploads_only_so_many_files_at_once(server: ServerProcess, folder: Path) -> None:
    enough = threading.Event()

    def slow() -> Iterator[bytes]:
        yield PURPOSE
        enough.wait(30)
        yield FILE + END

    with ThreadPoolExecutor(4) as threads:
        uploads = [threads.submit(post_form, server, slow()) for _ in range(4)]  # type: ignore[arg-type]
        deadline_s = time.monotonic() + 20
        while len(list((folder / "uploads").iterdir())) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        refused = post_form(server, PURPOSE + FILE + END)
        enough.set()
        assert_error(refused, 429, code="too_many_uploads")
        assert {upload.result().status_code for upload in uploads} == {200}
    assert post_form(server, PURPOSE + FILE + END, key=BOB).status_code == 200


def test_no_page_of_another_origin_changes_anything_without_keys(fake_server: ServerProcess) -> None:
    headers = {"Origin": "https://evil.example"}
    form = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
    assert httpx.post(f"{fake_server.url}/v1/files", headers=headers, **form).status_code == 403
    assert httpx.delete(f"{fake_server.url}/v1/files/file-0", headers=headers).status_code == 403
    assert httpx.post(f"{fake_server.url}/v1/files", **form).status_code == 200
