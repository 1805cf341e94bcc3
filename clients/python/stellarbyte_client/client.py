"""The synchronous client. calls.py has the requests and answers."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
    from openai import OpenAI

T = TypeVar("T")


class StellarByte:
    """A connection to one server, for one or several threads. Every call raises `StellarByteError` on failure.

    Close it with `close()`, or use it in a `with` statement.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """ValueError if the address is not a URL or a key cannot be sent in a header.

        Args:
            base_url: the server's address without /v1; default: STELLARBYTE_URL, or http://127.0.0.1:8000.
            api_key: sent with all calls but the operator's. An empty key means none.
            admin_api_key: sent with the operator's calls (`adapters.load` and `unload`), and with all without
                `api_key`.
            timeout_s: limit of each call. It is checked at each piece of the answer's body, so a server that becomes
                silent in the middle may take up to twice as long.
        """
        self._address = Address.of(base_url, api_key, admin_api_key, timeout_s)
        self._http = httpx.Client(base_url=self._address.base_url, timeout=self._address.timeout)
        self._openai: OpenAI | None = None
        self._openai_lock = threading.Lock()
        self.adapters = Adapters(self)

    @property
    def base_url(self) -> str:
        return self._address.base_url

    def models(self) -> list[Model]:
        """The served model first, then its adapters."""
        return self._send(calls.list_models())

    def tokenize(
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
        """The tokens of a prompt, or of a chat in the model's template; None: the server's default.

        `tools` and the two arguments after `add_special_tokens` are for chats only.
        """
        return self._send(
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

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of tokens, including special ones."""
        return self._send(calls.detokenize(tokens, model))

    def replay(self, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """Send the request of an answer's receipt once more, and return the receipt of the new answer."""
        return self._send(calls.replay(receipt))

    def rate(
        self,
        answer_id: str,
        rating: Literal["good", "bad"],
        *,
        answer: str | None = None,
        comment: str | None = None,
        index: int | None = None,
    ) -> str:
        """Rate an answer of this key by its id, on a server with --feedback. Returns the id of the rating.

        `answer`: a better one; `index`: which of several choices, by default the first.
        """
        return self._send(calls.rate(answer_id, rating, answer, comment, index))

    def metrics(self) -> list[MetricSample]:
        """All current metrics; docs/metrics.md describes them."""
        return self._send(calls.metrics())

    def health(self) -> Health:
        """Whether the engine makes progress, or the reason why not."""
        return self._send(calls.health())

    def is_ready(self) -> bool:
        """Whether the server answers requests now; False also if nothing, or only a proxy, answers at the address."""
        try:
            return self._send(calls.ready())
        except ConnectionFailed:
            return False

    def version(self) -> str:
        return self._send(calls.version())

    def openai(self) -> "OpenAI":
        """OpenAI's client for the same server, key and timeout, to generate; needs the package openai.

        Always the same object, closed with this client and, like it, without retries. There `timeout_s` limits each
        silence of the server: for long answers without streaming, create this client with a larger one.
        """
        with self._openai_lock:
            if self._openai is None:
                options = self._address.openai_options()
                from openai import OpenAI

                self._openai = OpenAI(**options)
            return self._openai

    def close(self) -> None:
        self._http.close()
        if self._openai is not None:
            self._openai.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: calls.Call[T]) -> T:
        deadline_s = time.monotonic() + self._address.timeout_s
        headers = self._address.headers(is_admin=call.is_admin)
        with (
            self._address.failures_named(),
            self._http.stream(call.method, call.path, json=call.body, headers=headers) as response,
        ):
            assert isinstance(response.stream, httpx.SyncByteStream)  # as of every synchronous client
            response.stream = _Timed(response.stream, deadline_s)
            response.read()
        return call.read(response)


class _Timed(httpx.SyncByteStream):
    """The pieces of an answer; TimeoutError for a piece after `deadline_s` of time.monotonic().

    httpx limits only the wait for each piece, so a server that sends small pieces could take for ever.
    """

    def __init__(self, pieces: httpx.SyncByteStream, deadline_s: float) -> None:
        self._pieces = pieces
        self._deadline_s = deadline_s

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if time.monotonic() > self._deadline_s:
                raise TimeoutError
            yield piece

    def close(self) -> None:
        self._pieces.close()


class Adapters:
    """The adapters of a server: `StellarByte.adapters`."""

    def __init__(self, client: StellarByte) -> None:
        self._client = client

    def list(self) -> AdapterList:
        """All adapters by name in their current state, including unused ones in --adapter-dir."""
        return self._client._send(calls.list_adapters())

    def load(self, name: str, path: str, replace: bool = False, probe: bool = True) -> LoadedAdapter:
        """Load the adapter at `path`, inside the server's --adapter-dir, as `name`.

        With `replace` an existing name gets the new version; running and waiting requests keep the old one. Without
        `probe` the server also takes an adapter that changes no logit.
        """
        return self._client._send(calls.load_adapter(name, path, replace, probe))

    def unload(self, name: str) -> UnloadedAdapter:
        """Unload an adapter after its running and waiting requests have ended.

        If that takes longer than `timeout_s`, raises ConnectionFailed; the server continues to unload.
        """
        return self._client._send(calls.unload_adapter(name))

    def versions(self, name: str) -> AdapterHistory:
        """The versions of an adapter that the server keeps in --data-dir, oldest first."""
        return self._client._send(calls.adapter_history(name))

    def rollback(self, name: str, version: int | str | None = None) -> AdapterHistory:
        """Make an earlier version current: the one before, or one by its number or content hash."""
        return self._client._send(calls.roll_back_adapter(name, version))

    def split(self, name: str, shares: Mapping[str, float]) -> AdapterHistory:
        """Divide the callers among versions, by number or content hash; the shares add up to 1. {} ends it.

        A caller is the request's `user`, else its key, and always gets the same version.
        """
        return self._client._send(calls.split_adapter(name, shares))

    def watch(self, interval_s: float = 1.0) -> Iterator[AdapterList]:
        """Results of `list`: the first one, then one after each change.

        Polls the server every `interval_s`; changes between two polls are merged.
        """
        before: AdapterList | None = None
        while True:
            now = self.list()
            if now != before:
                yield now
            before = now
            time.sleep(interval_s)
