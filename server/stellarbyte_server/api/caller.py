"""Permissions and limits of a request's key."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from fastapi import Request

from stellarbyte_server.access.keys import NO_OWNER, Key
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_engine
from stellarbyte_server.api.service import Service
from stellarbyte_server.config.settings import TUNED_PREFIX
from stellarbyte_server.protocol.adapter_reference import parse_references
from stellarbyte_server.protocol.messages import KeyLimits
from stellarbyte_server.protocol.request import BACKGROUND_PRIORITY, MAX_PRIORITY, GenerationRequest, model_not_found

REQUIRE_ADMIN = "require_admin"  # key in a scope's state of a check: ApiError unless operators' routes are permitted
BATCH = "batch"  # key of the `BatchCaller` in a scope's state, which only this server can set


@dataclass(frozen=True)
class BatchCaller:
    """The caller of a batch's request: the key that created the batch."""

    key: Key | None


def owner_id(http: Request) -> str:
    """The owner of the files and batches that the request creates and sees."""
    key = _key_of(http)
    return NO_OWNER if key is None else key.owner


def limits_of(http: Request) -> KeyLimits | None:
    """The key's limits, for the engine."""
    key = _key_of(http)
    return None if key is None else key.limits


def owner_of(http: Request) -> str:
    """The owner of the request's work in this process: its key's name, or "" without a key."""
    key = _key_of(http)
    return "" if key is None else key.name


def with_key(http: Request, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """The requests, with the fields set that depend on the caller's key."""
    key = _key_of(http)
    lowest, highest = (BACKGROUND_PRIORITY,) * 2 if BATCH in http.scope["state"] else _priorities(key)
    return [
        msgspec.structs.replace(
            request,
            cache_salt=_salt(key, request.cache_salt),
            caller="" if request.adapter is None else _caller(http, key, request.caller),
            priority=min(max(request.priority, lowest), highest),  # 0 by default
        )
        for request in requests
    ]


def _caller(http: Request, key: Key | None, user: str) -> str:
    """A hash of the request's user, else of its key, else of the request itself."""
    if user:
        who = ["user", user]
    elif key is not None:
        who = ["key", key.name]
    else:
        who = ["request", http.scope["state"]["record"].request_id]
    return hashlib.sha256(json.dumps(who).encode()).hexdigest()[:32]


def _salt(key: Key | None, given: str) -> str:
    """The salt of the prefix cache, different for each key or sharing group: otherwise `usage` would reveal whether
    another key has sent a text.

    As JSON, so that names and salts cannot imitate others.
    """
    if key is None:
        owner = ["", ""]
    else:
        owner = ["key", key.name] if key.share is None else ["share", key.share]
    return json.dumps([*owner, given])


def may_use(http: Request, service: Service, model: str) -> bool:
    """Whether the request may list and use a model: the served one, NAME or NAME@VERSION of an adapter, or a mix.

    Fine-tuned models belong to the key that made them; the admin key may use them, too. It alone may use one that no
    job has, such as while its job ends.
    """
    key = _key_of(http)
    if key is None:
        return True
    owners = _owners_of(service, model)
    is_own = all(owner == key.owner for owner in owners.values()) or key.is_admin
    return is_own and key.allows(model, service.settings.model_name, owners)


def _owners_of(service: Service, model: str) -> dict[str, str]:
    """The owners of the fine-tuned models that `model` names; NO_OWNER of one that no job has."""
    if service.tuning is None or TUNED_PREFIX not in model or model == service.settings.model_name:
        return {}
    names = [each.name for each in parse_references(model) if each.name.startswith(TUNED_PREFIX)]
    return {name: service.tuning.owner_of(name) or NO_OWNER for name in names}


def require_fine_tuning(http: Request) -> Key | None:
    """The request's key, which may make fine-tuning jobs; ApiError if it may not."""
    key = _key_of(http)
    if key is not None and not key.may_fine_tune:
        raise ApiError(403, f"The key {key.name!r} may not fine-tune models.", code="fine_tuning_not_allowed")
    return key


def require_publishing(http: Request) -> None:
    """ApiError unless the request may load adapters under names, by the rule of /v1/load_lora_adapter."""
    try:
        http.scope["state"][REQUIRE_ADMIN]()
    except ApiError as error:
        message = f"The field 'publish' needs the right to load adapters: {error}"
        raise ApiError(error.status, message, param="publish", headers=error.headers) from None


def require_permitted(http: Request, service: Service, body: Any) -> None:
    """ApiError unless the caller's key permits a checked body."""
    model, scale, priority = (getattr(body, name, None) for name in ("model", "adapter_scale", "priority"))
    if model is not None:
        require_model(http, service, model)
    base = service.settings.model_name
    # At a scale near 0 answers are nearly the base model's, and any other bound would be arbitrary.
    mixed = getattr(body, "adapters", None)
    scales = {"adapter_scale": [scale], "adapters": [] if mixed is None else [adapter.scale for adapter in mixed]}
    for param, given in scales.items():
        if model != base and any(each not in (None, 1) for each in given) and not may_use(http, service, base):
            scaled = "'adapter_scale'" if param == "adapter_scale" else "each 'scale' in 'adapters'"
            message = f"The key may not use the model {base!r:.200} without an adapter, so {scaled} must be 1."
            raise ApiError(403, message, param=param, code="model_not_allowed")
    lowest, highest = _priorities(_key_of(http))
    if priority is not None and not lowest <= priority <= highest:
        raise bad_request(f"The field 'priority' must be between {lowest} and {highest} here.", "priority")


def most_tokens(http: Request, service: Service) -> int | None:
    """The maximum number of tokens of one answer, by the server's settings and the caller's key; None: no limit."""
    key = _key_of(http)
    limits = (service.settings.max_tokens_per_request, None if key is None else key.max_tokens_per_request)
    return min((limit for limit in limits if limit is not None), default=None)


def overflow_for(http: Request, service: Service, given: Literal["error", "slide"] | None) -> Literal["error", "slide"]:
    """Behaviour at the end of the context, by request and defaults; ApiError if sliding is not permitted."""
    key = _key_of(http)
    if service.settings.allow_slide and (key is None or key.may_slide):
        return service.settings.context_overflow if given is None else given
    if given == "slide":
        who = "The server" if key is None or key.may_slide else f"The key {key.name!r}"
        raise ApiError(403, f"{who} does not let a context slide.", param="context_overflow")
    return "error"


def require_model(http: Request, service: Service, model: str) -> None:
    """ApiError unless the key permits a model, which need not exist."""
    if not may_use(http, service, model):
        if _owners_of(service, model):  # of another key, which nobody else can see
            raise from_engine(model_not_found(model))
        raise ApiError(403, f"The key may not use the model {model!r:.200}.", param="model", code="model_not_allowed")


def _priorities(key: Key | None) -> tuple[int, int]:
    return (0, MAX_PRIORITY) if key is None else (key.min_priority, key.max_priority)


def _key_of(http: Request) -> Key | None:
    """The request's key; None if none is needed."""
    key = http.scope["state"].get("key")
    assert key is None or isinstance(key, Key)
    return key
