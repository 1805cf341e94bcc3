"""Load on an OpenAI-compatible server: concurrent streaming requests with their times.

One process: enough for some thousand events a second. `benchmarks/loadgen.py` runs several.
"""

import asyncio
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h11
import httpx
import msgspec

from stellarbyte_client.address import Address
from stellarbyte_client.errors import server_error

# Token ids of every vocabulary. In random order, prompts differ from their first tokens on.
_TOKEN_IDS = range(32, 256)
_READ_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    path: str
    body: dict[str, Any]  # with "stream" and usage included


# The request for (stream number, request number).
RequestMaker = Callable[[int, int], LoadRequest]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A RequestMaker: completions of `max_tokens` tokens after a random prompt, of one of `models` by the stream."""

    models: Sequence[str]
    prompt_tokens: int
    max_tokens: int

    def __call__(self, stream: int, _: int) -> LoadRequest:
        body = {
            "model": self.models[stream % len(self.models)],
            # Without a seed: with one, the prefix cache would hold the prompts of an earlier run.
            "prompt": random.choices(_TOKEN_IDS, k=self.prompt_tokens),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,  # the last token, or one that is part of a character, gives no text
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return LoadRequest(path="/v1/completions", body=body)


@dataclass
class Outcome:
    """One request's times, tokens and error; times are time.perf_counter() seconds."""

    sent_at_s: float = 0.0
    event_times_s: list[float] = field(default_factory=list)  # of events with tokens or text
    tokens: int = 0  # by the server's count
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.event_times_s[0] - self.sent_at_s if self.event_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """The mean time of a token after the first event."""
        if not self.event_times_s or self.tokens < 2:
            return None
        return (self.event_times_s[-1] - self.event_times_s[0]) / (self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_times_s, self.event_times_s[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """A run's figures. Times are [p50, p99] in milliseconds, of requests without an error.

    ttft: from sending a request to its first event with tokens. itl: between two such events of one stream; a server
    may send several tokens in one event. tpot: (last event - first event) / (tokens - 1) of one stream.
    """

    errors: dict[str, int]  # message → number of requests
    tokens: int  # of answers, by the server's count
    wall_s: float
    tokens_per_s: float
    ttft_ms: list[float | None]  # None: too few values
    itl_ms: list[float | None]
    tpot_ms: list[float | None]

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], wall_s: float) -> "LoadFigures":
        good = [outcome for outcome in outcomes if outcome.error is None]
        tokens = sum(outcome.tokens for outcome in good)
        return cls(
            errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
            tokens=tokens,
            wall_s=round(wall_s, 3),
            tokens_per_s=round(tokens / wall_s, 1),
            ttft_ms=percentiles_ms(outcome.ttft_s for outcome in good),
            itl_ms=percentiles_ms(gap_s for outcome in good for gap_s in outcome.gaps_s),
            tpot_ms=percentiles_ms(outcome.tpot_s for outcome in good),
        )


def percentiles_ms(values_s: Iterable[float | None]) -> list[float | None]:
    """[p50, p99] of the values that are not None; below 100 values p99 is None, as it would be the largest."""
    ordered = sorted(value_s for value_s in values_s if value_s is not None)
    return [
        round(1e3 * ordered[math.ceil(percent * len(ordered) / 100) - 1], 2) if len(ordered) >= fewest else None
        for percent, fewest in ((50, 1), (99, 100))
    ]


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.content or self.reasoning_content)


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_tokens(self) -> bool:
        return bool(self.token_ids or self.text or (self.delta is not None and self.delta.has_text))


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_DECODER = msgspec.json.Decoder(_Event)


class LoadGenerator:
    """Sends over plain sockets, each request on its own connection: httpx would be slower than fast servers.

    `needs_done`: an answer without [DONE] is an error.
    """

    def __init__(self, address: Address, *, needs_done: bool = True) -> None:
        self._address = address
        self._url = httpx.URL(address.base_url)
        self._ssl = ssl.create_default_context() if self._url.scheme == "https" else None
        self._needs_done = needs_done

    async def run(
        self,
        make_request: RequestMaker,
        *,
        streams: int,
        requests: Iterable[int],
        on_end: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Send `requests`, by their numbers, `streams` at a time; call `on_end` after each."""
        outcomes: list[Outcome] = []
        remaining = iter(requests)

        async def stream(number: int) -> None:
            for request in remaining:
                outcomes.append(await self._outcome(make_request(number, request)))
                on_end()

        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(stream(number))
        return outcomes

    async def _outcome(self, request: LoadRequest) -> Outcome:
        outcome = Outcome()
        try:
            await self._send(request, outcome)
        except TimeoutError:
            outcome.error = "The server did not answer in time."
        except OSError as error:
            outcome.error = str(error) or type(error).__name__
        except h11.RemoteProtocolError as error:
            outcome.error = f"The answer is not valid HTTP: {error}."
        except msgspec.DecodeError as error:
            outcome.error = f"The answer is not that of an OpenAI-compatible server: {error}."
        return outcome

    async def _send(self, request: LoadRequest, outcome: Outcome) -> None:
        content = msgspec.json.encode(request.body)
        headers = {
            **self._address.headers(),
            "Host": self._url.netloc.decode(),
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
        }
        head = h11.Request(
            method="POST", target=f"{self._url.path.rstrip('/')}{request.path}", headers=[*headers.items()]
        )
        port = self._url.port or (443 if self._ssl else 80)
        async with asyncio.timeout(self._address.timeout.connect):
            reader, writer = await asyncio.open_connection(self._url.host, port, ssl=self._ssl)
        try:
            http = h11.Connection(h11.CLIENT)
            sent = [http.send(head), http.send(h11.Data(data=content)), http.send(h11.EndOfMessage())]
            outcome.sent_at_s = time.perf_counter()
            writer.write(b"".join(part for part in sent if part is not None))
            await self._read(http, reader, outcome)
        finally:
            writer.close()

    async def _read(self, http: h11.Connection, reader: asyncio.StreamReader, outcome: Outcome) -> None:
        is_done, rest, refusal = False, b"", None
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                async with asyncio.timeout(self._address.timeout_s):
                    http.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response) and not 200 <= event.status_code < 300:
                refusal = event
            elif isinstance(event, h11.Data):
                *lines, rest = [rest + event.data] if refusal else (rest + event.data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: [DONE]"):
                        is_done = True
                    elif line.startswith(b"data: "):
                        _note(_DECODER.decode(line[6:]), outcome)
        if refusal is not None:
            url = httpx.Request("POST", self._url)
            answer = httpx.Response(refusal.status_code, headers=refusal.headers.raw_items(), content=rest, request=url)
            outcome.error = str(server_error(answer))
        elif outcome.error is None and self._needs_done and not is_done:
            outcome.error = "The answer broke off."
        elif outcome.error is None and outcome.tokens == 0:
            outcome.error = "The server's usage counts no tokens."


def _note(event: _Event, outcome: Outcome) -> None:
    if event.error is not None:
        outcome.error = event.error.message
    if event.usage is not None:
        outcome.tokens = event.usage.completion_tokens
    if any(choice.has_tokens for choice in event.choices):
        outcome.event_times_s.append(time.perf_counter())
