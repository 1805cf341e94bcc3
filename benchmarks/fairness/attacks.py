"""Loads that one client with an ordinary key can put on a server; each runs until cancelled."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

MOST_BODY_BYTES = 2**21
SOON_S = 0.05  # between a refusal and a retry

Attack = Callable[[httpx.AsyncClient, str], Awaitable[None]]


async def long_prompts(http: httpx.AsyncClient, model: str) -> None:
    """Four prompts at a time, of 3,000 tokens each."""
    chance = random.Random(1)

    async def ask() -> None:
        prompt = [chance.randrange(1000, 40_000) for _ in range(3000)]
        await _read(http, "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 8, "stream": True})

    await _at_once(4, ask)


async def endless_streams(http: httpx.AsyncClient, model: str) -> None:
    """More streams than the batch has places, each without an end."""
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 10**9, "context_overflow": "slide"}
    await _at_once(100, lambda: _read(http, "/v1/completions", body | {"ignore_eos": True, "stream": True}))


async def a_thousand_requests(http: httpx.AsyncClient, model: str) -> None:
    """As many requests as the queue takes, and retries of the refused ones."""
    body = {"model": model, "prompt": list(range(100, 150)), "max_tokens": 200, "ignore_eos": True}
    await _at_once(1000, lambda: _read(http, "/v1/completions", body))


async def refused_bodies(http: httpx.AsyncClient, model: str) -> None:
    """Bodies of the largest size, with very many errors."""
    bodies = [
        ("/v1/responses", _large(f'{{"model": "{model}", "input": [', "{}", "]}")),
        ("/v1/embeddings", _large(f'{{"model": "{model}", "input": [', "[]", "]}")),
        ("/detokenize", _large(f'{{"model": "{model}", "tokens": [', '""', "]}")),
        ("/v1/chat/completions", _large(f'{{"model": "{model}", "messages": [', "{}", "]}")),
        ("/v1/messages", _large(f'{{"model": "{model}", "max_tokens": 0, "messages": [', "{}", "]}")),
        ("/v1/completions", _large(f'{{"model": "{model}", "prompt": ', "[", "}")),
    ]
    turn = iter(range(10**9))

    async def ask() -> None:
        path, content = bodies[next(turn) % len(bodies)]
        answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text

    await _at_once(4, ask)


async def tokenizing(http: httpx.AsyncClient, model: str) -> None:
    """Six texts of two megabytes at a time."""
    body = {"model": model, "prompt": "all the words of a long text " * (MOST_BODY_BYTES // 30)}
    await _at_once(6, lambda: _read(http, "/tokenize", body))


async def schemas(http: httpx.AsyncClient, model: str) -> None:
    """Eight schemas at a time, all different, with nested long constants."""
    chance = random.Random(1)

    def constant() -> str:
        return "".join(chance.choices("abcdefgh ", k=300))

    async def ask() -> None:
        schema: dict[str, Any] = {"enum": [constant() for _ in range(20)]}
        for number in range(4):
            schema = {
                "type": "object",
                "properties": {f"field{number}": schema, constant()[:50]: {"const": constant()}},
                "required": [f"field{number}"],
                "additionalProperties": False,
            }
        body = {"model": model, "messages": [{"role": "user", "content": "Fill it in."}], "max_tokens": 200}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        await _read(http, "/v1/chat/completions", body | {"response_format": form, "stream": True})

    await _at_once(8, ask)


async def biases(http: httpx.AsyncClient, model: str) -> None:
    """Sixteen streams with the most expensive sampling parameters."""
    chance = random.Random(1)

    async def ask() -> None:
        prompt = [chance.randrange(1000, 40_000) for _ in range(500)]
        body = {"model": model, "prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}
        body |= {"logit_bias": {str(token): 1.0 for token in range(1024)}, "logprobs": 5}
        body |= {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
        await _read(http, "/v1/completions", body)

    await _at_once(16, ask)


ATTACKS: list[Attack] = [
    long_prompts,
    endless_streams,
    a_thousand_requests,
    refused_bodies,
    tokenizing,
    schemas,
    biases,
]


async def _at_once(number: int, ask: Callable[[], Awaitable[None]]) -> None:
    """Run `number` tasks that each call `ask` repeatedly."""

    async def again_and_again() -> None:
        while True:
            try:
                await ask()
            except httpx.TransportError:
                await asyncio.sleep(SOON_S)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(number):
            tasks.create_task(again_and_again())


async def _read(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """Send a request and read its answer to the end; wait a little after a refusal."""
    async with http.stream("POST", path, content=json.dumps(body)) as response:
        async for _ in response.aiter_raw():
            pass
        if response.status_code != 200:
            await asyncio.sleep(SOON_S)


def _large(start: str, item: str, end: str) -> bytes:
    separator = "" if item == "[" else ", "
    number = (MOST_BODY_BYTES - len(start) - len(end)) // (len(item) + len(separator))
    return (start + separator.join([item] * number) + end).encode()
