"""HTTPS, and paths behind a proxy, as clients see them."""

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.certificates import make_certificate
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, running, the_error_line


@pytest.fixture
def secure(tmp_path: Path, fake_model: str) -> Iterator[tuple[ServerProcess, httpx.Client]]:
    """A server that speaks HTTPS, and a client that trusts it."""
    certificate, key = make_certificate(tmp_path, "server")
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    server = ServerProcess(FAKE, "--model", fake_model, *flags)
    context = ssl.create_default_context(cafile=str(certificate))
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=context) as client:
            yield server, client
    finally:
        server.stop()


def test_answers_come_over_https_and_nothing_over_http(secure: tuple[ServerProcess, httpx.Client]) -> None:
    server, client = secure
    deadline_s = time.monotonic() + 30
    while True:
        try:
            assert client.get("/ready").status_code == 200
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline_s, server.log()
            time.sleep(0.1)
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", http_client=client)
    chunks = api.completions.create(model="fake", prompt="abc", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcabc"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=30)
    assert f"at https://127.0.0.1:{server.port}" in server.log()


def test_certificates_that_cannot_be_used_stop_the_start_with_one_line(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "one")
    _, other_key = make_certificate(tmp_path, "other")
    locked, locked_key = make_certificate(tmp_path, "locked", "-passout", "pass:secret")
    cases = [
        (["--ssl-keyfile", str(key)], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", str(certificate)], "the files must be PEM, with a certificate and an RSA or EC key"),
        (
            ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(other_key)],
            "the key does not belong to the certificate",
        ),
        (["--ssl-certfile", str(locked), "--ssl-keyfile", str(locked_key)], "the key is encrypted with a password"),
        (["--root-path", "llm/"], "--root-path: 'llm/' must be a path such as /llm"),
    ]
    servers = [ServerProcess(REAL, *flags) for flags, _ in cases]
    try:
        for server, (_, said) in zip(servers, cases, strict=True):
            assert said in the_error_line(server)
    finally:
        for server in servers:
            server.stop()


def test_a_proxys_prefix_is_in_the_document_and_not_in_the_way(fake_model: str) -> None:
    """Whether the proxy takes it away or not."""
    with running(FAKE, "--model", fake_model, "--root-path", "/llm") as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        assert document["servers"] == [{"url": "/llm"}]
        for prefix in ("", "/llm"):
            for path in ("/v1/models", "/docs", "/v1/models/fake", "/", "/openapi.json"):
                assert httpx.get(f"{server.url}{prefix}{path}").status_code == 200, prefix + path
            assert httpx.get(f"{server.url}{prefix}/nothing").status_code == 404
        assert httpx.get(f"{server.url}/llm/llm/v1/models").status_code == 404
        assert httpx.get(f"{server.url}/llmv1/models").status_code == 404
        body = {"model": "fake", "prompt": "ab", "max_tokens": 2}
        assert httpx.post(f"{server.url}/llm/v1/completions", json=body).json()["choices"][0]["text"] == "ab"
        assert httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"] == "ab"
        assert httpx.get(f"{server.url}/nothing").status_code == 404
