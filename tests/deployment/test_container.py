"""The entry point and the health check as plain processes, in the surroundings that the image gives them."""

import contextlib
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployment.container import MODEL, ContainerProcess, why_not
from tests.support.servers import server_process
from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.server_process import ROOT, free_port


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    reason = why_not(folder)
    if reason is not None:
        pytest.skip(reason)
    return folder


@contextlib.contextmanager
def running(server: ContainerProcess) -> Iterator[ContainerProcess]:
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def entry_point() -> list[str]:
    """What the image's command runs, from this checkout instead of where it is installed."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["stellarbyte-server"]
    module, function = script.split(":")
    return ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


def check_health(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STELLARBYTE_")}
    command = [sys.executable, "docker/healthcheck.py"]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=30)


def test_it_serves_from_a_read_only_file_system_and_ends_when_told(root: Path, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    server = ContainerProcess(root, ["-m", "tests.support.servers.fake_server"], model, STELLARBYTE_MODEL=MODEL)
    with running(server):
        body = {"model": "model", "prompt": "abc", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"] == "abc"
        status = Path(f"/proc/{server.first_pid()}/status").read_text()
        assert "NSpid:" in status and status.split("NSpid:")[1].split("\n")[0].split()[-1] == "1"
        if os.geteuid() == 0:
            assert status.split("Uid:")[1].split()[0] == "10001"
            assert status.split("CapBnd:")[1].split()[0] == "0" * 16
        for folder in ("etc", "opt", "usr"):  # what is asked of the surroundings, or this test says nothing
            with pytest.raises(OSError):
                (server.root() / folder / "written").touch()
        server.terminate()
        assert server.wait() == 0, server.log()


def test_a_start_can_be_stopped_as_well(root: Path, tmp_path: Path) -> None:
    """Process 1 gets no signal that it has no handler for, so without one `docker stop` would wait and kill."""
    model = make_model_folder(tmp_path / "model")
    server = ContainerProcess(root, ["-m", "tests.support.servers.fake_server"], model, STELLARBYTE_MODEL=MODEL)
    try:
        while "starting the engine" not in server.log():
            assert server.process.poll() is None, server.log()
        server.terminate()
        assert server.wait() == 0, server.log()
    finally:
        server.stop()


@pytest.mark.slow
def test_the_demo_starts_with_an_empty_cache(root: Path) -> None:
    """Converted and compiled into the image's volume, from nothing, by its user."""
    with running(ContainerProcess(root, entry_point())) as server:
        body = {
            "model": "SmolLM2-135M-Instruct",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 12,
        }
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in reply["choices"][0]["message"]["content"]
        assert "cannot be stored" not in server.log()  # compiled kernels
        kept = server.root() / "var/cache/stellarbyte"
        demo = "SmolLM2-135M-Instruct-v2"
        assert {path.name for path in kept.iterdir()} == {demo, f".{demo}.lock", "compiled", "weight-hashes.json"}


class Health(http.server.BaseHTTPRequestHandler):
    """Answers as a server whose engine is dead, or lives."""

    status = 503

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "the engine is dead"}}')

    def log_message(self, *_: object) -> None:
        pass


class Healthy(Health):
    status = 200


@contextlib.contextmanager
def answering(handler: type[Health], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server of one's own; its port."""
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


def test_the_health_check_tells_a_real_server_from_none(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    with server_process.running(server_process.FAKE, "--model", str(model)) as server:
        # As in the image, and with a proxy that must not be asked about this machine.
        variables = {"STELLARBYTE_HOST": "0.0.0.0", "http_proxy": f"http://127.0.0.1:{free_port()}"}
        result = check_health(STELLARBYTE_PORT=str(server.port), **variables)
        assert result.returncode == 0, result.stderr
    result = check_health(STELLARBYTE_PORT=str(server.port))
    assert result.returncode == 1 and "refused" in result.stderr


def test_the_health_check_says_why_a_server_is_unwell() -> None:
    with answering(Health) as port:
        result = check_health(STELLARBYTE_PORT=port)
    assert result.returncode == 1
    assert "503" in result.stderr and "the engine is dead" in result.stderr


def test_the_health_check_speaks_tls_where_the_server_does(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=models.example.com"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(Healthy, context) as port:
        result = check_health(STELLARBYTE_PORT=port, STELLARBYTE_SSL_CERTFILE=str(certificate))
    assert result.returncode == 0, result.stderr
