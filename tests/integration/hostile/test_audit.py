"""What a server does while it serves: no file outside, no connection out, nothing unpickled, no code made of texts."""

import ast
import http.client
import itertools
import json
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import jinja2
import pytest

from tests.support.cases import some
from tests.support.models.adapters import write_adapter
from tests.support.servers.adapter_server import PROMPT, KnownModel
from tests.support.servers.server_process import ROOT, ServerProcess, running

SECRET = "this text is in no folder that the server may read"
CODE = "{{ ''.__class__ }} {% set x = 1 %} __import__('os').getcwd()"


@dataclass
class Audited:
    server: ServerProcess
    folder: Path  # has `adapters`, which is --adapter-dir, the model, and things outside of both
    file: Path  # AUDIT_FILE
    ready_at: int  # its size when the server was ready

    def starting(self) -> list[tuple[str, str]]:
        """(kind, what was done) of each event until it was ready."""
        return _events(self.file.read_bytes()[: self.ready_at])

    def serving(self) -> list[tuple[str, str]]:
        return _events(self.file.read_bytes()[self.ready_at :])

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


def _events(content: bytes) -> list[tuple[str, str]]:
    parts = [line.partition(" ") for line in content.decode().splitlines()]
    return [(kind, what) for kind, _, what in parts]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audited")
    known = KnownModel.make(folder)
    write_adapter(folder / "adapters" / "inside", known.model, 0)
    write_adapter(folder / "outside", known.model, 1)
    (folder / "secret.txt").write_text(SECRET)
    (folder / "adapters" / "link").symlink_to(folder / "outside")
    (folder / "adapters" / "secret").symlink_to(folder / "secret.txt")
    (folder / "adapters" / "linked").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapters" / "linked" / name).symlink_to(folder / "outside" / name)
    file = folder / "audit"
    os.environ["AUDIT_FILE"] = str(file)
    flags = ["--model", str(known.folder), "--adapter-dir", str(folder / "adapters"), "--allow-local-admin"]
    try:
        with running("tests.support.servers.audited_server", *flags) as server:
            yield Audited(server, folder, file, file.stat().st_size)
    finally:
        del os.environ["AUDIT_FILE"]


def test_requests_of_all_kinds_are_answered(audited: Audited) -> None:
    """Runs before the others, which look at what it did."""
    with httpx.Client(base_url=audited.server.url, timeout=60) as client:
        prompt = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
        wanted = {"anyOf": [{"enum": ["a", CODE]}, {"type": "string", "pattern": "^[a-c]{1,3}$"}]}
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted}}
        chat = {"model": "tiny", "messages": [{"role": "user", "content": CODE}], "max_tokens": 4}
        tool = {
            "type": "function",
            "function": {"name": "f", "description": "{{ 1 }}", "parameters": {"type": "object"}},
        }
        for path, body in (
            ("/v1/completions", prompt),
            ("/v1/completions", prompt | {"stream": True, "n": 2, "logprobs": 2, "echo": True}),
            ("/v1/completions", prompt | {"model": "inside"}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"response_format": schema}),
            ("/v1/chat/completions", chat | {"tools": [tool], "tool_choice": "required", "stream": True}),
            ("/v1/responses", {"model": "tiny", "input": CODE, "instructions": CODE, "max_output_tokens": 4}),
            ("/v1/embeddings", {"model": "tiny", "input": [PROMPT]}),
            ("/tokenize", {"model": "tiny", "prompt": CODE}),
            ("/tokenize", {"model": "tiny", "messages": chat["messages"]}),
            ("/detokenize", {"model": "tiny", "tokens": PROMPT}),
            ("/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "inside"}),
            ("/v1/completions", prompt | {"model": "again"}),
            ("/v1/unload_lora_adapter", {"lora_name": "again"}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
        for path in ("/health", "/metrics", "/v1/models", "/v1/adapters", "/openapi.json", "/docs", "/version"):
            assert client.get(path).status_code == 200


def tricks(folder: Path) -> list[str]:
    """Ways to say `../../secret.txt` and other places that are none of the client's business."""
    outside = [f"{'../' * depth}{name}" for depth in (1, 2, 3, 8) for name in ("secret.txt", "outside", "etc/passwd")]
    outside += [str(folder / "outside"), str(folder / "secret.txt"), "/etc/passwd", "/proc/self/environ", "link",
                "secret", ".", "..", "~root", "~", "inside/../../outside", "inside/adapter_config.json", "link/.",
                "./inside/.././../outside", "adapters/../outside", "inside//..//..//outside",
                "linked", "linked/."]  # fmt: skip
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


# In the order of the alphabet: every seventh is of each encoding and of each place.
@pytest.mark.parametrize("step", some([7, 1], 0))
def test_no_trick_with_a_path_opens_anything_outside(audited: Audited, step: int) -> None:
    ways = tricks(audited.folder)[::step]
    assert len(ways) >= 500 // step
    prefixes = ("/v1/models/", "/docs/static/", "/docs/", "/", "/web/", "/v1/adapters/", "//")
    for i, trick in enumerate(ways):
        for prefix in {"/docs/static/", "/v1/models/", prefixes[i % len(prefixes)]}:
            status, content = audited.raw("GET", target(prefix, trick))
            assert status == 404, (status, prefix, trick, content)
            assert SECRET.encode() not in content and b"root:" not in content
        for lora_path in {trick, trick.replace("%00", "\0").replace("%2e", ".").replace("%2F", "/")}:
            body = {"lora_name": f"trick-{i}", "lora_path": lora_path}
            status, content = audited.raw("POST", "/v1/load_lora_adapter", json.dumps(body).encode())
            assert status == 404, (status, lora_path, content)
            assert SECRET.encode() not in content
        for field in ("lora_name", "model"):
            path = "/v1/unload_lora_adapter" if field == "lora_name" else "/v1/completions"
            body = {field: trick, "prompt": PROMPT} if field == "model" else {field: trick}
            status, _ = audited.raw("POST", path, json.dumps(body).encode())
            assert status == 404, (status, path, trick)
    assert httpx.get(f"{audited.server.url}/health").status_code == 200
    assert "Traceback" not in audited.server.log()


def test_only_files_of_the_server_and_its_folders_are_opened(audited: Audited) -> None:
    """Python's own, the packages', the model's and the adapters'; libraries read the machine's figures in /proc."""
    roots = [audited.folder / "adapters" / "inside", audited.folder / "tiny", ROOT / "server", ROOT / "stellarbyte"]
    roots += [Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("stdlib")), Path("/sys"), Path("/dev")]
    roots += [*map(Path, site.getsitepackages()), ROOT / "stellarbyte.egg-info"]
    opened = {_path(what) for kind, what in audited.serving() if kind == "open" and what.startswith("r ")}
    assert audited.folder / "adapters" / "inside" / "adapter_config.json" in opened
    for path in opened:
        is_ours = any(path.resolve().is_relative_to(root.resolve()) for root in roots)
        is_figure = path.parts[:2] == ("/", "proc") and path.name in ("meminfo", "cpuinfo", "stat", "status", "statm")
        assert is_ours or is_figure or _is_own(path) or path == audited.folder / "adapters", path


def _path(what: str) -> Path:
    """Of an event "open"."""
    return Path(ast.literal_eval(what[2:]))


def test_nothing_else_is_done_while_it_serves(audited: Audited) -> None:
    """No connection, nothing unpickled, no code made, no program started; by no library either. Files are written in
    the folder that the server made for itself only: the record of adapters."""
    done = [(kind, what) for kind, what in audited.serving() if (kind, what[:2]) != ("open", "r ")]
    assert [(kind, what) for kind, what in done if kind != "open" or not _is_own(_path(what))] == []
    names = {_path(what).name for _, what in done}
    assert {"adapter_config.json", "adapter_model.safetensors"} < names  # of "again"


def _is_own(path: Path) -> bool:
    """Whether a path is in the server's own folder."""
    temporary = Path(tempfile.gettempdir())
    return path.is_relative_to(temporary) and path.relative_to(temporary).parts[0].startswith("stellarbyte-")


def test_what_is_done_while_it_starts_owes_nothing_to_a_request_or_another_host(audited: Audited) -> None:
    """The chat template becomes code, numba makes and keeps its kernels, the engine is started, the port is bound."""
    done: dict[str, set[str]] = {}
    for kind, what in audited.starting():
        if kind != "open" and "/site-packages/numba/" not in what.rpartition(" by ")[2]:
            done.setdefault(kind, set()).add(what)
    started = done.pop("subprocess.Popen")
    (engine,) = (what for what in started if "ldconfig" not in what)  # older numba asks where libraries are
    assert "tests.support.servers.audited_engine" in engine
    jinja = "'<template>' by " + str(Path(jinja2.__file__).parent / "environment.py")
    assert done == {"compile": {jinja}, "exec": {jinja}, "socket.getaddrinfo": {"'127.0.0.1'"}}


SEEN = {
    "open('kept', 'w')": "open w ",
    "open('/etc/hostname')": "open r '/etc/hostname'",
    "exec('1')": "exec '<string>'",
    "jinja2.Template('{{ 1 }}')": "compile '<template>' by " + jinja2.__path__[0],
    "marshal.loads(marshal.dumps(1))": "marshal.loads ",
    "pickle.loads(pickle.dumps(io.BytesIO))": "pickle.find_class ('_io', 'BytesIO')",
    "socket.create_connection(('127.0.0.1', 9), 1)": "socket.connect ('127.0.0.1', 9)",
    "socket.create_connection(('203.0.113.1', 9), 0.01)": "socket.connect ('203.0.113.1', 9)",
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))": "socket.sendto ('127.0.0.1', 9)",
    "socket.getaddrinfo('localhost', 9)": "socket.getaddrinfo 'localhost'",
    "urllib.request.urlopen('http://127.0.0.1:9/')": "urllib.Request ('http://127.0.0.1:9/', None)",
    "os.system('true')": "os.system (b'true',)",
    "subprocess.run(['true'])": "subprocess.Popen ('true', ['true'])",
}


def test_the_watch_sees_what_it_is_for_in_libraries_too(tmp_path: Path) -> None:
    """Else all of the above would pass with a hook that sees nothing."""
    imports = "contextlib, io, jinja2, marshal, os, pickle, socket, subprocess, urllib.request"
    program = f"from tests.support.servers import audit\nimport {imports}\naudit.install()\n"
    program += "".join(f"with contextlib.suppress(OSError): {statement}\n" for statement in SEEN)
    program += "import this_module_is_made_of_a_file\n"
    (tmp_path / "this_module_is_made_of_a_file.py").write_text("exec('1')")
    environment = os.environ | {"AUDIT_FILE": str(tmp_path / "audit"), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    lines = (tmp_path / "audit").read_text().splitlines()
    for statement, seen in SEEN.items():
        assert any(line.startswith(seen) for line in lines), (statement, lines)
    assert not any("this_module_is_made_of_a_file" in line for line in lines if not line.startswith("open "))
