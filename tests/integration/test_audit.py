"""What a server does while it serves: no file outside, no connection out, nothing unpickled, no code made of texts."""

import http.client
import itertools
import json
import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.adapter_server import PROMPT, KnownModel
from tests.adapters import write_adapter
from tests.server_process import ROOT, ServerProcess, running

SECRET = "this text is in no folder that the server may read"


@dataclass
class Audited:
    server: ServerProcess
    folder: Path  # has `adapters`, which is --adapter-dir, the model, and things outside of both
    file: Path  # AUDIT_FILE
    ready_at: int  # its size when the server was ready

    def events(self, kind: str, *, since_ready: bool = False) -> list[str]:
        content = self.file.read_bytes()[self.ready_at if since_ready else 0 :].decode()
        return [line.partition(" ")[2] for line in content.splitlines() if line.partition(" ")[0] == kind]

    def raw(self, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The target goes out as it is: clients would tidy it up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.putrequest(method, "/", skip_accept_encoding=True)
        connection._buffer[0] = f"{method} {target} HTTP/1.1".encode("utf-8", "surrogateescape")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audited")
    known = KnownModel.make(folder)
    write_adapter(folder / "adapters" / "inside", known.model, 0)
    write_adapter(folder / "outside", known.model, 1)
    (folder / "secret.txt").write_text(SECRET)
    (folder / "adapters" / "link").symlink_to(folder / "outside")
    (folder / "adapters" / "secret").symlink_to(folder / "secret.txt")
    file = folder / "audit"
    os.environ["AUDIT_FILE"] = str(file)
    flags = ["--model", str(known.folder), "--adapter-dir", str(folder / "adapters"), "--allow-local-admin"]
    try:
        with running("tests.audited_server", *flags, limit_s=120) as server:
            yield Audited(server, folder, file, file.stat().st_size)
    finally:
        del os.environ["AUDIT_FILE"]


def test_requests_of_all_kinds_are_answered(audited: Audited) -> None:
    """Runs before the others, which look at what it did."""
    with httpx.Client(base_url=audited.server.url, timeout=60) as client:
        prompt = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["a", "b"]}}}
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        for path, body in (
            ("/v1/completions", prompt),
            ("/v1/completions", prompt | {"stream": True, "n": 2, "logprobs": 2, "echo": True}),
            ("/v1/completions", prompt | {"model": "inside"}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"response_format": schema}),
            ("/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 4}),
            ("/v1/embeddings", {"model": "tiny", "input": [PROMPT]}),
            ("/tokenize", {"model": "tiny", "prompt": "hi"}),
            ("/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "inside"}),
            ("/v1/completions", prompt | {"model": "again"}),
            ("/v1/unload_lora_adapter", {"lora_name": "again"}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 200 or "template" in answer.text, (path, answer.text)
        for path in ("/health", "/metrics", "/v1/models", "/v1/adapters", "/openapi.json", "/docs", "/version"):
            assert client.get(path).status_code == 200


def tricks(folder: Path) -> list[str]:
    """Ways to say `../../secret.txt` and other places that are none of the client's business."""
    outside = [f"{'../' * depth}{name}" for depth in (1, 2, 3, 8) for name in ("secret.txt", "outside", "etc/passwd")]
    outside += [str(folder / "outside"), str(folder / "secret.txt"), "/etc/passwd", "/proc/self/environ", "link",
                "secret", ".", "..", "~root", "~", "inside/../../outside", "inside/adapter_config.json", "link/.",
                "./inside/.././../outside", "adapters/../outside", "inside//..//..//outside"]  # fmt: skip
    encodings = [
        lambda path: path,
        lambda path: path.replace("../", "..%2f").replace("/", "%2F"),
        lambda path: quote(quote(path, safe=""), safe=""),
        lambda path: quote(path, safe="").replace(".", "%2e"),
        lambda path: path.replace("..", "%252e%252e"),
        lambda path: path.replace("/", "\\"),
        lambda path: path.replace("/", "%5c"),
        lambda path: path.replace("..", "%c0%ae%c0%ae").replace("/", "%c0%af"),
        lambda path: path.replace("..", "．．").replace("/", "／"),
        lambda path: path.replace("..", quote("․․")),
        lambda path: path.replace("../", "....//"),
        lambda path: path.replace("../", ".././"),
        lambda path: path.replace("../", "..;/"),
        lambda path: path + "%00",
        lambda path: path + "%00.safetensors",
        lambda path: path + "\u0000",
        lambda path: "file://" + path,
        lambda path: "http://127.0.0.1/" + path,
        lambda path: path + "/" + "a" * 3000,
        lambda path: path + "%0d%0aX: y",
        lambda path: path + "?x=/../..",
        lambda path: path + "%ff%fe%ed%a0%80",
    ]
    return sorted({encode(path) for encode, path in itertools.product(encodings, outside)})


def target(prefix: str, trick: str) -> str:
    """In a request line what cannot stand there is encoded once."""
    return prefix + quote(trick, safe="/%.\\:;?=~")


def test_no_trick_with_a_path_opens_anything_outside(audited: Audited) -> None:
    ways = tricks(audited.folder)
    assert len(ways) >= 500
    prefixes = ("/v1/models/", "/docs/static/", "/docs/", "/", "/web/", "/v1/adapters/", "//")
    for i, trick in enumerate(ways):
        for prefix in {"/docs/static/", "/v1/models/", prefixes[i % len(prefixes)]}:
            status, content = audited.raw("GET", target(prefix, trick))
            assert 200 <= status < 500, (status, prefix, trick, content)
            assert SECRET.encode() not in content and b"root:" not in content
            if status == 200:
                assert prefix == "/v1/models/" or "inside" not in trick, (prefix, trick)
        for lora_path in {trick, trick.replace("%00", "\0").replace("%2e", ".").replace("%2F", "/")}:
            body = {"lora_name": f"trick-{i}", "lora_path": lora_path}
            status, content = audited.raw("POST", "/v1/load_lora_adapter", json.dumps(body).encode())
            assert 400 <= status < 500, (status, lora_path, content)
            assert SECRET.encode() not in content
        for field in ("lora_name", "model"):
            path = "/v1/unload_lora_adapter" if field == "lora_name" else "/v1/completions"
            body = {field: trick, "prompt": PROMPT} if field == "model" else {field: trick}
            status, _ = audited.raw("POST", path, json.dumps(body).encode())
            assert 400 <= status < 500, (status, path, trick)
    assert httpx.get(f"{audited.server.url}/health").status_code == 200
    assert "Traceback" not in audited.server.log()


def test_only_files_of_the_server_and_its_folders_are_opened(audited: Audited) -> None:
    """Python's own, the packages', the model's and the adapters'; libraries read the machine's figures in /proc."""
    roots = [audited.folder / "adapters", audited.folder / "tiny", ROOT / "server", ROOT / "stellarbyte"]
    roots += [Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("stdlib")), Path("/sys"), Path("/dev")]
    roots += [*map(Path, site.getsitepackages()), ROOT / "stellarbyte.egg-info", Path.home() / ".cache"]
    opened = {Path(_unquoted(text)) for text in audited.events("open", since_ready=True)}
    assert any(path.is_relative_to(audited.folder / "adapters" / "inside") for path in opened)
    for path in opened:
        is_ours = any(path.is_relative_to(root) or path.resolve().is_relative_to(root.resolve()) for root in roots)
        is_figure = path.parts[:2] == ("/", "proc") and path.name in ("meminfo", "cpuinfo", "stat", "status", "statm")
        assert is_ours or is_figure, path
        assert not path.resolve().is_relative_to(audited.folder / "outside"), path
        assert path.resolve() != audited.folder / "secret.txt"


def _unquoted(text: str) -> str:
    return text[1:-1].replace("\\\\", "\\").replace("\\x00", "\0")


@pytest.mark.parametrize(
    "kind", ["socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"]
)
def test_no_connection_goes_out(audited: Audited, kind: str) -> None:
    assert audited.events(kind) == []


@pytest.mark.parametrize("kind", ["pickle.find_class", "exec", "compile", "marshal.loads"])
def test_nothing_is_unpickled_and_no_code_made_of_texts(audited: Audited, kind: str) -> None:
    assert audited.events(kind) == []


@pytest.mark.parametrize("kind", ["os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"])
def test_no_program_is_started_while_it_serves(audited: Audited, kind: str) -> None:
    assert audited.events(kind, since_ready=True) == []


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """Else all of the above would pass with a hook that sees nothing."""
    program = (
        "from tests import audit; audit.OURS = ('<',); audit.install()\n"
        "import io, pickle, socket\n"
        "exec('1')\n"
        "pickle.loads(pickle.dumps(io.BytesIO))\n"
        f"open({str(tmp_path / 'x')!r}, 'w')\n"
        "s = socket.socket(); s.settimeout(0.01)\n"
        "try: s.connect(('203.0.113.1', 9))\n"
        "except OSError: pass\n"
    )
    file = tmp_path / "audit"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"AUDIT_FILE": str(file)}, check=True)
    seen = {line.partition(" ")[0] for line in file.read_text().splitlines()}
    assert {"open", "exec", "pickle.find_class", "socket.connect"} <= seen
