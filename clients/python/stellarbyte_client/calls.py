"""Every call of the API, as a request and a reader of its answer, for both clients. Sends nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from stellarbyte_client.answers import (
    Adapter,
    AdapterHistory,
    Health,
    LoadedAdapter,
    MetricSample,
    Model,
    Tokenized,
    UnloadedAdapter,
)
from stellarbyte_client.errors import UnexpectedAnswer, server_error

T = TypeVar("T")

Messages = Sequence[Mapping[str, Any]]
"""A chat in the form of /v1/chat/completions."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request; `read` turns the response into the result, or raises ServerError or UnexpectedAnswer."""

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    is_admin: bool = False


def list_adapters() -> Call[list[Adapter]]:
    return Call("GET", "/v1/adapters", _entries(_List[Adapter]))


def load_adapter(name: str, path: str, replace: bool, probe: bool) -> Call[LoadedAdapter]:
    body = {"lora_name": name, "lora_path": path, "load_inplace": replace} | ({} if probe else {"probe": False})
    return Call("POST", "/v1/load_lora_adapter", _json(LoadedAdapter), body, is_admin=True)


def unload_adapter(name: str) -> Call[UnloadedAdapter]:
    return Call("POST", "/v1/unload_lora_adapter", _json(UnloadedAdapter), {"lora_name": name}, is_admin=True)


def adapter_history(name: str) -> Call[AdapterHistory]:
    return Call("GET", f"/v1/adapters/{quote(name)}/versions", _json(AdapterHistory), is_admin=True)


def roll_back_adapter(name: str, version: int | str | None) -> Call[AdapterHistory]:
    path = f"/v1/adapters/{quote(name)}/rollback"
    return Call("POST", path, _json(AdapterHistory), {"version": version}, is_admin=True)


def split_adapter(name: str, shares: Mapping[str, float]) -> Call[AdapterHistory]:
    path = f"/v1/adapters/{quote(name)}/split"
    return Call("POST", path, _json(AdapterHistory), {"shares": dict(shares)}, is_admin=True)


def rate(
    answer_id: str, rating: Literal["good", "bad"], answer: str | None, comment: str | None, index: int | None
) -> Call[str]:
    body = {"id": answer_id, "rating": rating, "answer": answer, "comment": comment, "index": index}
    read = _json(_Rated)
    given = {name: value for name, value in body.items() if value is not None}
    return Call("POST", "/v1/feedback", lambda response: read(response).id, given)


def list_models() -> Call[list[Model]]:
    return Call("GET", "/v1/models", _entries(_List[Model]))


def tokenize(
    *,
    prompt: str | None,
    messages: Messages | None,
    model: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    add_special_tokens: bool | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    return_token_strs: bool | None,
) -> Call[Tokenized]:
    body = {
        "prompt": prompt,
        "messages": messages,
        "model": model,
        "tools": tools,
        "add_special_tokens": add_special_tokens,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "return_token_strs": return_token_strs,
    }
    given = {name: value for name, value in body.items() if value is not None}
    return Call("POST", "/tokenize", _json(Tokenized), given)


def detokenize(tokens: Sequence[int], model: str | None) -> Call[str]:
    body = {"tokens": list(tokens), "model": model}
    read = _json(_Detokenized)
    return Call("POST", "/detokenize", lambda response: read(response).prompt, body)


def replay(receipt: Mapping[str, Any]) -> Call[dict[str, Any]]:
    read = _json(_Answer)
    return Call("POST", receipt["path"], lambda response: read(response).receipt, receipt["body"])


def metrics() -> Call[list[MetricSample]]:
    return Call("GET", "/metrics", _read_metrics)


def health() -> Call[Health]:
    return Call("GET", "/health", _read_health)


def ready() -> Call[bool]:
    return Call("GET", "/ready", _read_ready)


def version() -> Call[str]:
    read = _json(_Version)
    return Call("GET", "/version", lambda response: read(response).version)


class _List(msgspec.Struct, Generic[T]):
    data: list[T]


class _Detokenized(msgspec.Struct):
    prompt: str


class _Answer(msgspec.Struct):
    receipt: dict[str, Any]


class _Rated(msgspec.Struct):
    id: str


class _Version(msgspec.Struct):
    version: str


class _State(msgspec.Struct):
    """The answer of /health and /ready with status 200."""

    status: str


def _json(kind: type[T]) -> Callable[[httpx.Response], T]:
    """Reads a JSON object; unknown fields, of a newer server, are ignored."""

    def read(response: httpx.Response) -> T:
        content = _good(response)
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise _unexpected(response, error) from error

    return read


def _entries(kind: type[_List[T]]) -> Callable[[httpx.Response], list[T]]:
    """Reads OpenAI's form of a list."""
    read = _json(kind)
    return lambda response: read(response).data


_read_state = _json(_State)


def _read_metrics(response: httpx.Response) -> list[MetricSample]:
    content = _good(response)
    try:
        return [
            MetricSample(name=sample.name, labels=sample.labels, value=sample.value)
            for family in text_string_to_metric_families(content.decode())
            for sample in family.samples
        ]
    except ValueError as error:
        raise _unexpected(response, error) from error


def _read_health(response: httpx.Response) -> Health:
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return Health(is_healthy=False, reason=server_error(response).message)
    _read_state(response)
    return Health(is_healthy=True, reason=None)


def _read_ready(response: httpx.Response) -> bool:
    """False also for a proxy's answer without a server."""
    if response.status_code in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT):
        return False
    _read_state(response)
    return True


def _good(response: httpx.Response) -> bytes:
    if not response.is_success:
        raise server_error(response)
    return response.content


def _unexpected(response: httpx.Response, error: Exception) -> UnexpectedAnswer:
    return UnexpectedAnswer(f"The answer from {response.url} is not that of a StellarByte server: {error}.")
