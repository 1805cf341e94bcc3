"""A Hugging Face Hub on 127.0.0.1 whose repositories are folders, for downloads by huggingface_hub."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_these_tests"


@dataclass
class Hub:
    """What it has and what it was asked.

    `repositories` are folders by their names, with one commit for each revision: (name, revision) → folder. Of those in
    `gated`, files need TOKEN; `renamed` has old names; paths in `broken` break off in the middle.
    """

    url: str
    repositories: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    is_failing: bool = False
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        self.repositories[name, revision] = folder
        self.repositories[name, commit_of(folder)] = folder

    @property
    def storage(self) -> str:
        """Another host, as the real Hub's: redirects within the Hub are followed before a file's headers count."""
        return self.url.replace("127.0.0.1", "localhost")

    @property
    def downloads(self) -> list[str]:
        """Paths of files whose content was sent."""
        return [path.split("/storage/")[1] for path in self.asked if path.startswith("GET /storage/")]


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode(), usedforsecurity=False).hexdigest()


def _tree(folder: Path) -> list[dict[str, object]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [
        {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": _hash(file)}
        for file in files
    ]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing to stderr."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.is_failing:
            return self._send(500)
        match path.strip("/").split("/"):
            case ["storage", *rest]:
                self._send_file(Path("/", *rest))
            case ["api", "models", owner, name, "revision", *revision]:
                self._with_folder(f"{owner}/{name}", "/".join(revision), self._send_info)
            case ["api", "models", owner, name, "tree", *revision]:
                self._with_folder(f"{owner}/{name}", "/".join(revision), self._send_tree)
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._send(404)

    def _with_folder(self, name: str, revision: str, answer: Callable[[Path], None]) -> None:
        if name in self.hub.renamed:
            return self._send(307, Location=self.path.replace(name, self.hub.renamed[name]))
        if not any(known == name for known, _ in self.hub.repositories):
            return self._send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if (name, revision) not in self.hub.repositories:
            return self._send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        return answer(self.hub.repositories[name, revision])

    def _send_tree(self, folder: Path) -> None:
        self._send_json(_tree(folder))

    def _send_info(self, folder: Path) -> None:
        names = [name for (name, _), known in self.hub.repositories.items() if known == folder]
        files = [{"rfilename": entry["path"]} for entry in _tree(folder)]
        self._send_json({"id": names[0], "sha": commit_of(folder), "private": False, "siblings": files})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        def redirect(folder: Path) -> None:
            if name in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._send(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            file = folder / path
            if not file.is_file():
                return self._send(404, X_Error_Code="EntryNotFound")
            return self._send(
                302,
                Location=f"{self.hub.storage}/storage{file}",
                X_Repo_Commit=commit_of(folder),
                X_Linked_Etag=f'"{_hash(file)}"',
                X_Linked_Size=str(file.stat().st_size),
            )

        self._with_folder(name, revision, redirect)

    def _send_file(self, file: Path) -> None:
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if file.name in self.hub.broken else content)

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Until the end of the `with` statement; then nothing answers at its address."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    Handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let huggingface_hub, in this process, know only this Hub and an own cache."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def write_repository(folder: Path, weights: bytes) -> Path:
    """An adapter's repository in a new folder, with files that no server needs."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_bytes(b"hi")
    return folder
