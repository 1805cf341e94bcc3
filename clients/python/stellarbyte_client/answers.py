"""What the server answers, as typed, frozen objects. Fields have the API's own names; knows no HTTP."""

from typing import Literal, TypeAlias

import msgspec


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter as it is now. While a name is replaced, its old version drains beside the new one."""

    id: str  # the name that requests give as `model`
    state: Literal["loading", "ready", "draining", "failed"]
    error: str | None  # one sentence, when failed
    tier: Literal["gpu", "slot", "cpu", "disk"]  # the fastest memory it lies in; slot: where a CPU computes it
    content_hash: str | None  # None: not read yet
    root: str  # where it was read from
    rank: int | None
    bytes: int
    refcount: int  # requests that need this version: running and waiting
    running: int
    waiting: int
    requests: int  # all there were
    tokens: int  # that they generated


AdapterList: TypeAlias = list[Adapter]  # for classes in which `list` is a method


class LoadedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str
    content_hash: str
    rank: int
    bytes: int
    matched: tuple[str, ...]  # modules it changes
    unmatched: tuple[str, ...]  # targets its configuration names that it has no weights for


class UnloadedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str
    freed_bytes: int


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The served model, or an adapter that can be asked for."""

    id: str
    created: int  # Unix seconds
    owned_by: str
    root: str
    parent: str | None  # the model that an adapter belongs to
    max_model_len: int
    content_hash: str | None  # of the weights; None while an adapter is unread


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | None  # None unless asked for


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the engine makes progress, and if not, why."""

    is_healthy: bool
    reason: str | None


class MetricSample(msgspec.Struct, frozen=True, kw_only=True):
    """One line of /metrics."""

    name: str
    labels: dict[str, str]
    value: float
