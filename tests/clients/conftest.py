"""A real server with adapters and keys, the Python clients of it, and a stand-in for what no server of ours says."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte_client import AsyncStellarByte, StellarByte
from tests.clients.either import Blocking
from tests.support.adapters import write_adapter
from tests.support.server_process import REAL, ServerProcess, running
from tests.support.tiny_models import tiny_llama

ADMIN_KEY, USER_KEY, LIMITED_KEY = "key-admin", "key-user", "key-limited"
Connect = Callable[..., Any]  # the arguments of StellarByte; its methods

KEYS = f"""
[user]
key = "{USER_KEY}"
[limited]
key = "{LIMITED_KEY}"
requests_per_minute = 1
"""


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
    with running(REAL, "--model", str(model), *flags, limit_s=120) as server:
        yield server


@dataclass(frozen=True)
class Asked:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Stub:
    """Answers whatever it is asked with the next of `answers`; the last stays."""

    url: str
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, body: str, status: int = 200, **headers: str) -> None:
        """The next answer; `headers` have _ for -."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((status, names, body.encode()))

    def next_answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(asked)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


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
