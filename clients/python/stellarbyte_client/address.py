"""A server's address and keys, and errors of connections to it. Sends nothing."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from stellarbyte_client.errors import timed_out, unreachable

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
GENERATION_TIMEOUT_S = 600.0  # of commands that generate: a queued request gets no bytes
_CONNECT_TIMEOUT_S = 5.0
_KEY = re.compile(r"[!-~]+")  # allowed in a header


@dataclass(frozen=True, kw_only=True)
class Address:
    """Address, keys and timeout of a client."""

    base_url: str
    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(repr=False)
    timeout_s: float

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None, admin_api_key: str | None, timeout_s: float) -> "Address":
        """Validate the arguments; ValueError, without keys in it. An empty key means none.

        `base_url` defaults to STELLARBYTE_URL, or DEFAULT_URL.
        """
        url = os.environ.get("STELLARBYTE_URL") or DEFAULT_URL if base_url is None else base_url
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"The server's address must be a URL such as {DEFAULT_URL}; {url!r} is not.")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a number of seconds above 0; {timeout_s!r} is not.")
        return cls(
            base_url=url.rstrip("/"),
            api_key=_usable_key("api_key", api_key),
            admin_api_key=_usable_key("admin_api_key", admin_api_key),
            timeout_s=timeout_s,
        )

    @property
    def timeout(self) -> httpx.Timeout:
        """Timeout of each read; that of connecting is shorter."""
        return httpx.Timeout(self.timeout_s, connect=self._connect_timeout_s)

    def openai_options(self) -> dict[str, Any]:
        """Arguments for OpenAI's clients. Without the package ModuleNotFoundError, with the command to install it."""
        try:
            from openai import Timeout
        except ModuleNotFoundError as error:
            what = "openai() needs the package openai: pip install 'stellarbyte-client[openai]'."
            raise ModuleNotFoundError(what) from error
        key = self._key(is_admin=False)
        return {
            "base_url": f"{self.base_url}/v1",
            "api_key": "unused"
            if key is None
            else key,  # OpenAI's clients require one; a server without keys ignores it
            "timeout": Timeout(self.timeout_s, connect=self._connect_timeout_s),
            "max_retries": 0,
        }

    def headers(self, *, is_admin: bool = False) -> dict[str, str]:
        key = self._key(is_admin)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    @property
    def _connect_timeout_s(self) -> float:
        return min(self.timeout_s, _CONNECT_TIMEOUT_S)

    def _key(self, is_admin: bool) -> str | None:
        """The key for a route. The admin key permits all routes, so each key is used if the other is not given."""
        first, second = (self.admin_api_key, self.api_key) if is_admin else (self.api_key, self.admin_api_key)
        return second if first is None else first

    @contextlib.contextmanager
    def failures_named(self) -> Iterator[None]:
        """Raises ConnectionFailed for timeouts and connection errors inside."""
        try:
            yield
        except (httpx.TimeoutException, TimeoutError) as error:
            raise timed_out(self.base_url) from error
        except httpx.RequestError as error:
            raise unreachable(self.base_url, error) from error


def _usable_key(name: str, key: str | None) -> str | None:
    if key is None or key == "":
        return None
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"{name} must consist of printable ASCII characters without spaces.")
    return key
