"""Bodies of 2 MiB that are refused cost nobody a stream, and hardly a pause.

Every shape of body in every place with `--slow`, each shape and each place a few times without. The longest pause
between a neighbour's tokens is shown with -s.
"""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.support.cases import some
from tests.support.servers.server_process import REAL, ServerProcess, running

MAX_BYTES = 2**21
PAUSE_LIMIT_S = 4.0  # on a loaded machine; a body used to take up to 18 s
NEIGHBOUR = {
    "model": "tiny",
    "prompt": [7],
    "max_tokens": 500,
    "context_overflow": "slide",
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
    "return_token_ids": True,
}
# Each is a body but for the value that fills it.
CHAT = '{"model":"tiny","messages":[{"role":"user","content":"hi"}],'
PLACES = {
    "/v1/responses": ['{"model":"tiny","input":', '{"model":"tiny","input":"hi","metadata":'],
    "/v1/chat/completions": [
        '{"model":"tiny","messages":',
        '{"model":"tiny","messages":[{"role":"user","content":',
        *(f'{CHAT}"{name}":' for name in ("tools", "stop", "stop_token_ids", "logit_bias", "unknown")),
        f'{CHAT}"response_format":{{"type":"json_schema","json_schema":{{"name":"a","schema":',
    ],
    "/v1/completions": ['{"model":"tiny","prompt":'],
    "/v1/embeddings": ['{"model":"tiny","input":'],
    "/detokenize": ['{"tokens":'],
    "/tokenize": ['{"messages":', '{"prompt":"hi","unknown":'],
}
ITEMS = ["{}", "[]", '""', "[[]]", '{"":0}', "-1", "5", "0.5", '"["', '{"role":"user","content":[{}]}']
HEAD_ROOM = 300


def fillings() -> Iterator[str]:
    """Values of 2 MiB, of every shape that takes long to read or to refuse."""
    size = MAX_BYTES - HEAD_ROOM
    for item in ITEMS:
        yield "[" + ",".join([item] * (size // (len(item) + 1))) + "]"
    yield "{" + ",".join(f'"{number}":0' for number in range(size // 11)) + "}"
    yield "[" * size
    yield '{"a":' * (size // 5)
    yield "[" + ",".join(["[" * 150 + "]" * 150] * (size // 301)) + "]"


def bodies(step: int) -> Iterator[tuple[str, bytes]]:
    """Every `step`-th."""
    places = [(path, place) for path, places in PLACES.items() for place in places]
    for number, ((path, place), filling) in enumerate(itertools.product(places, fillings())):
        if number % step == 0:
            body = place + filling
            open_signs = [sign for sign in place if sign in "{["]  # that are not closed, as far as it matters
            closed = sum(place.count(sign) for sign in "}]")
            ends = "".join("}" if sign == "{" else "]" for sign in reversed(open_signs[: len(open_signs) - closed]))
            yield path, (body + ends).encode()


@dataclass
class Neighbour:
    """Streams of one client, one after the other, each with the time of its events."""

    server: ServerProcess
    answers: list[tuple[list[int], bool]] = field(default_factory=list)  # token ids, and whether it ended as it should
    pauses_s: list[float] = field(default_factory=list)
    is_over: bool = False

    def ask(self) -> None:
        token_ids: list[int] = []
        is_whole = False
        last_s = None
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=NEIGHBOUR, timeout=60) as response:
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                now_s = time.monotonic()
                if last_s is not None:
                    self.pauses_s.append(now_s - last_s)
                last_s = now_s
                if line == "data: [DONE]":
                    is_whole = True
                else:
                    token_ids += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids") or ()
        self.answers.append((token_ids, is_whole))

    def ask_on(self) -> None:
        while not self.is_over:
            self.ask()


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[ServerProcess]:
    with running(REAL, "--model", tiny_model) as process:
        yield process


# 11 and 5 have no common divisor with the number of shapes, so each shape comes in some place.
@pytest.mark.slow
@pytest.mark.parametrize("step", some([11, 5, 1], 0))
def test_a_neighbours_streams_end_whole_while_large_bodies_are_refused(server: ServerProcess, step: int) -> None:
    neighbour = Neighbour(server)
    neighbour.ask()
    ((expected, is_whole),) = neighbour.answers
    assert is_whole and len(expected) == NEIGHBOUR["max_tokens"]
    neighbour.pauses_s.clear()
    reader = threading.Thread(target=neighbour.ask_on)
    reader.start()
    slowest_s, num_refused = 0.0, 0
    try:
        with httpx.Client(base_url=server.url, timeout=60) as attacker:
            for path, body in bodies(step):
                assert len(body) <= MAX_BYTES, (path, body[:80])
                began_s = time.monotonic()
                answer = attacker.post(path, content=body, headers={"Content-Type": "application/json"})
                slowest_s = max(slowest_s, time.monotonic() - began_s)
                if path == "/detokenize" and body.startswith(b'{"tokens":[5,'):  # as many as may be
                    assert answer.status_code == 200, answer.text[:200]
                    continue
                assert answer.status_code == 400, (path, body[:80], answer.text[:200])
                assert len(answer.content) < 1000, (path, body[:80])
                num_refused += 1
    finally:
        neighbour.is_over = True
        reader.join()
    print(f"{num_refused} bodies, the slowest {slowest_s:.2f} s; a pause of {max(neighbour.pauses_s):.2f} s")
    assert num_refused >= 150 // step
    assert all(answer == (expected, True) for answer in neighbour.answers)
    assert max(neighbour.pauses_s) < PAUSE_LIMIT_S
    assert "no heartbeat" not in server.log() and "Traceback" not in server.log()
