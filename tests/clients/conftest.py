"""A real server with adapters and keys, the Python clients of it, and a stand-in for what no server of ours says."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte_client import AsyncStellarByte, StellarByte
from tests.clients.either import Blocking, Connect
from tests.clients.keys import ADMIN_KEY, KEYS, USER_KEY
from tests.support.models.adapters import write_adapter
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, ServerProcess, running
from tests.support.stubs.http_stub import Asked, Stub


@pytest.fixture(scope="session")
def adapter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model called tiny, with the adapters json and pirate in --adapter-dir, unread."""
    folder = tmp_path_factory.mktemp("clients")
    model = convert(tiny_llama(folder / "hf", max_position_embeddings=512), folder / "tiny")
    for seed, name in enumerate(("json", "pirate")):
        write_adapter(folder / "adapters" / name, load_model(model), seed)
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    flags = ["--adapter-dir", str(folder / "adapters"), "--keys", str(keys), "--admin-api-key", ADMIN_KEY]
    flags += ["--data-dir", str(folder / "stored"), "--feedback"]
    with running(REAL, "--model", str(model), *flags) as server:
        yield server


@pytest.fixture
def stub() -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, names, content = stub.next_answer(Asked(self.command, self.path, headers, body))
            self.send_response(status)
            for name, value in (names | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub = Stub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        server.shutdown()
        thread.join()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of either kind, which are closed after the test."""
    made: list[Any] = []
    with asyncio.Runner() as runner:

        def make(*args: Any, **kwargs: Any) -> Any:
            if request.param == "sync":
                made.append(StellarByte(*args, **kwargs))
            else:
                made.append(Blocking(AsyncStellarByte(*args, **kwargs), runner))
            return made[-1]

        yield make
        for client in made:
            client.close()


@pytest.fixture
def client(connect: Connect, adapter_server: ServerProcess) -> Any:
    return connect(adapter_server.url, api_key=USER_KEY, admin_api_key=ADMIN_KEY)
