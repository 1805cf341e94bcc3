"""The client for asyncio programs. calls.py has the requests and answers, client.py the descriptions."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import httpx

from stellarbyte_client import calls
from stellarbyte_client.address import DEFAULT_TIMEOUT_S, Address
from stellarbyte_client.answers import (
    AdapterHistory,
    AdapterList,
    Health,
    LoadedAdapter,
    MetricSample,
    Model,
    Tokenized,
    UnloadedAdapter,
)
from stellarbyte_client.errors import ConnectionFailed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")


class AsyncStellarByte:
    """`StellarByte` with asynchronous calls.

    Close it with `await close()`, or use it in an `async with` statement.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """As `StellarByte`, but `timeout_s` bounds each call exactly."""
        self._address = Address.of(base_url, api_key, admin_api_key, timeout_s)
        self._http = httpx.AsyncClient(base_url=self._address.base_url, timeout=self._address.timeout)
        self._openai: AsyncOpenAI | None = None
        self.adapters = AsyncAdapters(self)

    @property
    def base_url(self) -> str:
        return self._address.base_url

    async def models(self) -> list[Model]:
        """The served model first, then its adapters."""
        return await self._send(calls.list_models())

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: calls.Messages | None = None,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        return_token_strs: bool | None = None,
    ) -> Tokenized:
        """The tokens of a prompt or a chat; see `StellarByte.tokenize`."""
        return await self._send(
            calls.tokenize(
                prompt=prompt,
                messages=messages,
                model=model,
                tools=tools,
                add_special_tokens=add_special_tokens,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_token_strs=return_token_strs,
            )
        )

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of tokens, including special ones."""
        return await self._send(calls.detokenize(tokens, model))

    async def replay(self, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """Send the request of an answer's receipt once more, and return the receipt of the new answer."""
        return await self._send(calls.replay(receipt))

    async def rate(
        self,
        answer_id: str,
        rating: Literal["good", "bad"],
        *,
        answer: str | None = None,
        comment: str | None = None,
        index: int | None = None,
    ) -> str:
        """Rate an answer of this key. Returns the id of the rating."""
        return await self._send(calls.rate(answer_id, rating, answer, comment, index))

    async def metrics(self) -> list[MetricSample]:
        """All current metrics."""
        return await self._send(calls.metrics())

    async def health(self) -> Health:
        """Whether the engine makes progress, or the reason why not."""
        return await self._send(calls.health())

    async def is_ready(self) -> bool:
        """Whether the server answers requests now; False also if nothing, or only a proxy, answers at the address."""
        try:
            return await self._send(calls.ready())
        except ConnectionFailed:
            return False

    async def version(self) -> str:
        return await self._send(calls.version())

    def openai(self) -> "AsyncOpenAI":
        """OpenAI's asynchronous client; see `StellarByte.openai`."""
        if self._openai is None:
            options = self._address.openai_options()
            from openai import AsyncOpenAI

            self._openai = AsyncOpenAI(**options)
        return self._openai

    async def close(self) -> None:
        await self._http.aclose()
        if self._openai is not None:
            await self._openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: calls.Call[T]) -> T:
        headers = self._address.headers(is_admin=call.is_admin)
        with self._address.failures_named():
            async with asyncio.timeout(self._address.timeout_s):
                response = await self._http.request(call.method, call.path, json=call.body, headers=headers)
        return call.read(response)


class AsyncAdapters:
    """The adapters of a server: `AsyncStellarByte.adapters`. Calls are those of `Adapters`."""

    def __init__(self, client: AsyncStellarByte) -> None:
        self._client = client

    async def list(self) -> AdapterList:
        return await self._client._send(calls.list_adapters())

    async def load(self, name: str, path: str, replace: bool = False, probe: bool = True) -> LoadedAdapter:
        return await self._client._send(calls.load_adapter(name, path, replace, probe))

    async def unload(self, name: str) -> UnloadedAdapter:
        return await self._client._send(calls.unload_adapter(name))

    async def versions(self, name: str) -> AdapterHistory:
        return await self._client._send(calls.adapter_history(name))

    async def rollback(self, name: str, version: int | str | None = None) -> AdapterHistory:
        return await self._client._send(calls.roll_back_adapter(name, version))

    async def split(self, name: str, shares: Mapping[str, float]) -> AdapterHistory:
        return await self._client._send(calls.split_adapter(name, shares))

    async def watch(self, interval_s: float = 1.0) -> AsyncIterator[AdapterList]:
        before: AdapterList | None = None
        while True:
            now = await self.list()
            if now != before:
                yield now
            before = now
            await asyncio.sleep(interval_s)
