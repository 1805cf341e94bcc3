"""Server, keys and model of a command."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stellarbyte_client import Model, ServerError, StellarByte, StellarByteError


class CommandFailed(StellarByteError):
    """A command cannot be executed; str() is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Address, with or without /v1 at its end, and keys of a command."""

    url: str
    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(default=None, repr=False)

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def client(self) -> StellarByte:
        """A client of the server; CommandFailed if the address is invalid."""
        try:
            return StellarByte(self.base_url, self.api_key, self.admin_api_key)
        except ValueError as error:
            raise CommandFailed(str(error)) from None


def models_of(client: StellarByte) -> list[Model]:
    """The models that requests may name, at least one; StellarByteError."""
    with refusals_explained():
        models = client.models()
    if not models:
        raise CommandFailed("This API key permits no model of this server.")
    return models


def default_model(models: Sequence[Model]) -> Model:
    """The served model; if the key permits only adapters, the first of them."""
    return next((model for model in models if model.parent is None), models[0])


def check_model(name: str, models: Sequence[Model]) -> None:
    """CommandFailed unless this is a model, an adapter, or NAME@HASH of an adapter."""
    known = [model.id for model in models]
    if name not in known and name.partition("@")[0] not in known:
        raise CommandFailed(f"This server has no model or adapter {name!r}; it has {', '.join(known)}.")


@contextlib.contextmanager
def refusals_explained(*, is_admin: bool = False) -> Iterator[None]:
    """Raises CommandFailed in place of ServerError."""
    try:
        yield
    except ServerError as error:
        problem = server_problem(error.status, str(error), error.retry_after_s, is_admin=is_admin)
        raise CommandFailed(problem) from None


def server_problem(status: int, message: str, retry_after_s: float | None, *, is_admin: bool = False) -> str:
    """A refusal as a sentence for the user; `message` is the server's."""
    if status == 401 and is_admin:
        return "The server needs its admin key; give it with --admin-api-key or in STELLARBYTE_ADMIN_API_KEY."
    if status == 401:
        return "The server needs one of its API keys; give it with --api-key or in STELLARBYTE_API_KEY."
    if retry_after_s is not None:
        return f"{message} Try again in {retry_after_s:g} s."
    return message
