"""The client for ordinary programs. What each call sends and reads is in calls.py."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from stellarbyte_client import calls
from stellarbyte_client.address import DEFAULT_TIMEOUT_S, Address
from stellarbyte_client.answers import (
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
    """A connection to one server, for one or several threads. Every call raises `StellarByteError` where it fails.

    Close it with `close()`, or use it in a `with` statement.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """ValueError when one of these cannot be used: the address is none, a key does not fit into a header.

        Args:
            base_url: the server's address, without /v1; else that in STELLARBYTE_URL, else http://127.0.0.1:8000.
            api_key: sent with all calls but those of the operator. An empty key is none.
            admin_api_key: sent with those (`adapters.load` and `unload`), and with all if there is no `api_key`.
            timeout_s: how long each call may take. The clock is looked at whenever a piece of the answer's body comes,
                so that a server which falls silent within it may take up to as long again.
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
        """The tokens of a prompt, or of a chat as the model's template writes it; what is None is the server's choice.

        `tools` and the two after `add_special_tokens` are for chats only.
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
        """The text of tokens, special ones included."""
        return self._send(calls.detokenize(tokens, model))

    def metrics(self) -> list[MetricSample]:
        """All that /metrics shows now. docs/metrics.md says what each means."""
        return self._send(calls.metrics())

    def health(self) -> Health:
        """Whether the engine makes progress, and if not, why."""
        return self._send(calls.health())

    def is_ready(self) -> bool:
        """Whether requests can be answered now; False also while nothing answers at the address, or only a proxy."""
        try:
            return self._send(calls.ready())
        except ConnectionFailed:
            return False

    def version(self) -> str:
        return self._send(calls.version())

    def openai(self) -> "OpenAI":
        """OpenAI's own client for the same server, key and time-out, which generates; needs the package openai.

        Always the same one, which is closed with this one and, like it, tries nothing twice. `timeout_s` bounds each
        silence of the server there: to wait longer for answers that are not streamed, make this client with more.
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
            assert isinstance(response.stream, httpx.SyncByteStream)  # as that of every synchronous client
            response.stream = _Timed(response.stream, deadline_s)
            response.read()
        return call.read(response)


class _Timed(httpx.SyncByteStream):
    """The pieces of an answer; TimeoutError instead of one that comes after `deadline_s` of time.monotonic().

    httpx bounds the wait for each piece only, which a server that sends them one by one can go on with for ever.
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
        """All adapters as they are now, by name; those in --adapter-dir that nobody has asked for yet, too."""
        return self._client._send(calls.list_adapters())

    def load(self, name: str, path: str, replace: bool = False) -> LoadedAdapter:
        """Read and check the adapter at `path`, inside the server's --adapter-dir, to be asked for as `name`.

        With `replace` a name that exists gets the new version; requests that run or wait end on the old one.
        """
        return self._client._send(calls.load_adapter(name, path, replace))

    def unload(self, name: str) -> UnloadedAdapter:
        """Take an adapter out of the server's memory once the requests that run or wait for it have ended.

        Where that takes longer than `timeout_s`, ConnectionFailed is raised, and the server goes on unloading.
        """
        return self._client._send(calls.unload_adapter(name))

    def watch(self, interval_s: float = 1.0) -> Iterator[AdapterList]:
        """What `list` gives: once at the beginning, and again whenever anything in it has changed.

        The server is asked every `interval_s`. What was between two questions is not seen.
        """
        before: AdapterList | None = None
        while True:
            now = self.list()
            if now != before:
                yield now
            before = now
            time.sleep(interval_s)
