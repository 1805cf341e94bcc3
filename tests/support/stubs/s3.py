"""A store with S3's API on 127.0.0.1: HeadObject and GetObject, by path."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Store:
    """Objects by "bucket/key", and how they are answered.

    Those in `forbidden` are refused, those in `broken` break off in the middle; HEAD says the sizes in `claimed`. What
    is read waits while `is_open` is not set, and `is_asked` says that something was read.
    """

    url: str
    objects: dict[str, bytes] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    claimed: dict[str, int] = field(default_factory=dict)
    is_failing: bool = False
    is_open: threading.Event = field(default_factory=threading.Event)
    is_asked: threading.Event = field(default_factory=threading.Event)
    reads: list[str] = field(default_factory=list)

    def add(self, prefix: str, folder: Path) -> None:
        """The files of a folder, as objects below "bucket/prefix"."""
        for file in folder.iterdir():
            self.objects[f"{prefix}/{file.name}"] = file.read_bytes()

    @property
    def environment(self) -> dict[str, str]:
        """Leads boto3 to this store."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class _Handler(BaseHTTPRequestHandler):
    store: Store

    def do_HEAD(self) -> None:
        self._answer(is_read=False)

    def do_GET(self) -> None:
        self._answer(is_read=True)

    def log_message(self, *_: object) -> None:
        """Nothing to stderr."""

    def _answer(self, *, is_read: bool) -> None:
        key = unquote(urlsplit(self.path).path).strip("/")
        if self.store.is_failing:
            return self._refuse(500, "InternalError")
        if key in self.store.forbidden:
            return self._refuse(403, "AccessDenied")
        if key not in self.store.objects:
            return self._refuse(404, "NoSuchKey")
        if is_read:
            self.store.reads.append(key)
            self.store.is_asked.set()
            self.store.is_open.wait()
        content = self.store.objects[key]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if self.headers.get("If-Match", tag) != tag:
            return self._refuse(412, "PreconditionFailed")
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if is_read else self.store.claimed.get(key, len(content))))
        self.send_header("ETag", tag)
        self.end_headers()
        if is_read:
            self.wfile.write(content[: len(content) // 2] if key in self.store.broken else content)
        return None

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_store() -> Iterator[Store]:
    """Until the end of the `with` statement; then nothing answers at its address."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store = Store(f"http://127.0.0.1:{server.server_port}")
    store.is_open.set()
    Handler.store = store
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.is_open.set()
        server.shutdown()
        server.server_close()
