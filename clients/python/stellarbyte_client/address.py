"""Where a server is, which keys open it, and what it means when nothing answers there. Sends nothing."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from stellarbyte_client.calls import Call
from stellarbyte_client.errors import ConnectionFailed

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
OPENAI_IS_MISSING = "openai() needs the package openai: pip install 'stellarbyte-client[openai]'."


@dataclass(frozen=True, kw_only=True)
class Address:
    """What both clients are made with."""

    base_url: str
    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(repr=False)
    timeout_s: float

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None, admin_api_key: str | None, timeout_s: float) -> "Address":
        """ValueError unless `base_url`, or what STELLARBYTE_URL has in its place, is an HTTP address."""
        url = os.environ.get("STELLARBYTE_URL") or DEFAULT_URL if base_url is None else base_url
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"The server's address must look like {DEFAULT_URL}; {url!r} does not.")
        return cls(base_url=url.rstrip("/"), api_key=api_key, admin_api_key=admin_api_key, timeout_s=timeout_s)

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, _CONNECT_TIMEOUT_S))

    @property
    def openai_url(self) -> str:
        return f"{self.base_url}/v1"

    @property
    def openai_key(self) -> str:
        """OpenAI's client insists on a key, which a server without keys does not look at."""
        return self._key(is_admin=False) or "unused"

    def headers(self, call: Call[Any]) -> dict[str, str]:
        key = self._key(call.is_admin)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _key(self, is_admin: bool) -> str | None:
        """The operator's key opens all routes, so each key stands in where the other is not given."""
        first, second = (self.admin_api_key, self.api_key) if is_admin else (self.api_key, self.admin_api_key)
        return second if first is None else first

    @contextlib.contextmanager
    def failures_named(self) -> Iterator[None]:
        """Raises ConnectionFailed where what is done inside gets no answer."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise ConnectionFailed(f"The server at {self.base_url} did not answer in time.") from error
        except httpx.RequestError as error:
            detail = str(error) or type(error).__name__
            raise ConnectionFailed(f"The server at {self.base_url} cannot be reached: {detail}.") from error
