"""The answer of the downloading process to the HTTP process: one line of JSON on its stdout."""

import msgspec


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """The adapter is in the cache folder."""

    source: str  # its name with the downloaded version


class NotFetched(msgspec.Struct, frozen=True, tag=True):
    """`message` is one sentence for the user."""

    status: int  # of HTTP
    message: str


class FetchError(Exception):
    """An adapter cannot be fetched; str() is one sentence for the user, without secrets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
