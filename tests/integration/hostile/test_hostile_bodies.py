"""Bodies that are broken in every way: each is refused as the API says, on a connection that goes on being used."""

import http.client
import json
import random
from collections import Counter

import httpx
import pytest
from hypothesis import settings

from stellarbyte_server.api.contract.bodies.anthropic.messages import MessagesBody
from stellarbyte_server.api.contract.bodies.body import parse_body
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.bodies.tokenize import DetokenizeBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.routes.embeddings import EmbeddingsBody
from tests.support.servers.server_process import ServerProcess

MUTATIONS = 250 * settings().max_examples  # which are more with --slow

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CUSTOM = {
    "type": "custom",
    "custom": {"name": "g", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a+/"}}},
}
BODIES = {
    "/v1/completions": (
        CompletionBody,
        {"prompt": "hello", "max_tokens": 2, "n": 1, "logit_bias": {"5": 1}, "stop": ["x"], "temperature": 0.5},
    ),
    "/v1/chat/completions": (
        ChatBody,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_tokens": 2,
            "tools": [TOOL, CUSTOM],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            "response_format": {"type": "text"},
        },
    ),
    "/v1/embeddings": (EmbeddingsBody, {"input": ["a", "b"], "encoding_format": "float"}),
    "/v1/responses": (
        ResponsesBody,
        {
            "input": [
                {"role": "user", "content": "hi"},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]},
            ],
            "max_output_tokens": 2,
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}],
            "tool_choice": "none",
            "text": {"format": {"type": "text"}},
        },
    ),
    "/v1/messages": (
        MessagesBody,
        {
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": [1]}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]},
            ],
            "max_tokens": 2,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "none"},
        },
    ),
    "/detokenize": (DetokenizeBody, {"tokens": [1, 2, 3]}),
}
HOSTILE = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 400,
    b"-1",
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\xff\xfe"',
    b"[" * 5000,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b"null",
    b"true",
    b"{}",
    b"[[]]",
    b'"' + b"x" * 20_000 + b'"',
    b"18446744073709551616",
    b"0.1",
    b"//",
    b"'a'",
]


def mutated(body: bytes, chance: random.Random) -> bytes:
    """One to three changes: bytes flipped, lost, added, repeated; values replaced by hostile ones; the end cut off."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(body) + 1)
        match chance.randrange(7):
            case 0:
                body = body[:place] + bytes([chance.randrange(256)]) + body[place + 1 :]
            case 1:
                body = body[:place] + body[place + chance.randint(1, 8) :]
            case 2:
                body = (
                    body[:place]
                    + bytes(chance.choices(b'{}[]",:\\0eE-.\x00\xc3', k=chance.randint(1, 4)))
                    + body[place:]
                )
            case 3:
                body = body[:place] + body[place - 10 : place] + body[place:]
            case 4:
                body = body[:place]
            case 5:
                start = body.find(b":", place)
                end = min((i for i in (body.find(b",", start), body.find(b"}", start)) if i > 0), default=len(body))
                body = body[: start + 1] + chance.choice(HOSTILE) + body[end:]
            case 6:
                body = body.replace(b'"', b'"\\' + chance.choice([b"u12", b"x", b"", b"ud83d"]), 1)
    return body


def is_json(body: bytes) -> bool:
    """By Python's reader, which is none of ours and a little more lenient than RFC 8259."""
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def accepts(body_class: type, body: bytes) -> bool:
    try:
        parse_body(body_class, body, warn_unknown=False)
    except ApiError:
        return False
    return True


@pytest.fixture(scope="module")
def connection(fake_server: ServerProcess):
    connection = http.client.HTTPConnection("127.0.0.1", fake_server.port, timeout=30)
    connection.connect()
    yield connection
    connection.close()


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
    sock = connection.sock
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    assert connection.sock is sock, "the connection was closed"
    return response.status, content


statuses: Counter[int] = Counter()


def test_every_mutated_body_gets_a_4xx_with_one_sentence(connection) -> None:
    chance = random.Random(0)
    for _ in range(MUTATIONS):
        path = chance.choice(list(BODIES))
        body_class, fields = BODIES[path]
        body = mutated(json.dumps({"model": "fake", **fields}).encode(), chance)
        status, content = post(connection, path, body)
        statuses[status] += 1
        if 200 <= status < 300:
            # What was changed was a text or a number, to another good one.
            assert is_json(body) and accepts(body_class, body), body
            continue
        assert 400 <= status < 500, (status, path, body, content)
        error = json.loads(content)["error"]
        fields = {"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"}
        assert error.keys() == fields
        assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]


def test_the_server_is_as_healthy_as_before(connection, fake_server) -> None:
    """Runs after the other."""
    assert statuses.total() >= MUTATIONS and statuses[400] > MUTATIONS / 2
    assert httpx.get(f"{fake_server.url}/health").status_code == 200
    assert fake_server.metric("vllm:num_requests_running") == 0
    status, _ = post(connection, "/v1/completions", b'{"model":"fake","prompt":"hi","max_tokens":1}')
    assert status == 200
    assert "Traceback" not in fake_server.log()
