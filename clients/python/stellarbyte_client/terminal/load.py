"""Load on a server: streaming completions, some at once, each of them timed.

One process and httpx: enough for some thousand tokens a second. What a server with a large GPU can do at its most needs
a sender with several processes.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from stellarbyte_client.address import GENERATION_TIMEOUT_S, Address
from stellarbyte_client.errors import server_error
from stellarbyte_client.terminal.connection import Connection

# Token ids that every vocabulary has. In random order they make prompts that differ from their first tokens on.
_TOKEN_IDS = range(32, 256)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each request asks for: `max_tokens` tokens after a random prompt, of one of `models` by its stream."""

    models: Sequence[str]
    prompt_tokens: int
    max_tokens: int


@dataclass
class Outcome:
    """What one request came to; times are time.perf_counter() seconds."""

    sent_at_s: float
    event_times_s: list[float] = field(default_factory=list)  # of events with tokens
    tokens: int = 0  # by the server's count
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.event_times_s[0] - self.sent_at_s if self.event_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_times_s, self.event_times_s[1:], strict=False)]


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class LoadGenerator:
    """Use in an `async with` statement."""

    def __init__(self, connection: Connection, most_streams: int) -> None:
        address = Address.of(connection.base_url, connection.api_key, None, GENERATION_TIMEOUT_S)
        self._http = httpx.AsyncClient(
            base_url=address.base_url,
            headers=address.headers(),
            timeout=address.timeout,
            limits=httpx.Limits(max_connections=most_streams, max_keepalive_connections=most_streams),
        )
        self._random = random.Random()  # a fixed seed would find the prompts of an earlier run in the prefix cache

    async def __aenter__(self) -> "LoadGenerator":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(
        self, work: Work, *, streams: int, requests: int, on_end: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """Keep `streams` requests running until there were `requests`; `on_end` is called after each."""
        outcomes: list[Outcome] = []
        remaining = iter(range(requests))

        async def stream(number: int) -> None:
            model = work.models[number % len(work.models)]
            for _ in remaining:
                outcomes.append(await self._send(model, work))
                on_end()

        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(stream(number))
        return outcomes

    async def _send(self, model: str, work: Work) -> Outcome:
        body = {
            "model": model,
            "prompt": self._random.choices(_TOKEN_IDS, k=work.prompt_tokens),
            "max_tokens": work.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,  # a token that is only part of a character, or the last one, gives no text
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        outcome = Outcome(sent_at_s=time.perf_counter())
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    outcome.error = str(server_error(response))
                    return outcome
                await self._read(response, outcome)
        except httpx.HTTPError as error:
            outcome.error = str(error) or type(error).__name__
        except msgspec.DecodeError as error:
            outcome.error = f"The answer is not one of an OpenAI-compatible server: {error}."
        return outcome

    async def _read(self, response: httpx.Response, outcome: Outcome) -> None:
        outcome.error = "The answer broke off."
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                outcome.error = None
            elif line.startswith("data: "):
                self._note(msgspec.json.decode(line[6:], type=_Event), outcome)

    def _note(self, event: _Event, outcome: Outcome) -> None:
        if event.error is not None:
            outcome.error = event.error.message
        if event.usage is not None:
            outcome.tokens = event.usage.completion_tokens
        if any(choice.token_ids for choice in event.choices):
            outcome.event_times_s.append(time.perf_counter())
