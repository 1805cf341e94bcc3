"""Why requests and calls for adapters are refused."""

from collections.abc import Collection

from stellarbyte_server.config.setting_values import ADAPTER_NAME_RULE, is_adapter_name
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.messages import CallFailed
from stellarbyte_server.protocol.request import (
    ADAPTER_FAILED,
    ADAPTER_NOT_FOUND,
    INTERNAL_ERROR,
    MODEL_NOT_ALLOWED,
    GenerationRequest,
    RequestRejected,
    model_not_found,
)


def refusal_of(version: AdapterVersion, reference: AdapterReference | AdapterMix) -> RequestRejected | None:
    """Why a version does not serve requests for a reference, if known; None: it does, or may.

    A mix does not need its parts once it is put together, so a part that has failed since then does not matter.
    """
    if isinstance(reference, AdapterMix):
        for (part, _), (asked, _) in zip(version.parts, reference.parts, strict=True):
            if (part.state == "failed" and part.files is None) or not asked.selects(part.content_hash):
                return model_not_found(asked)
        return _failure(version) if version.state == "failed" else None
    if version.state == "failed":
        return model_not_found(reference) if version.files is None else _failure(version)
    return None if reference.selects(version.content_hash) else model_not_found(reference)


def _failure(version: AdapterVersion) -> RequestRejected:
    return RequestRejected(version.error, INTERNAL_ERROR if version.is_fault else ADAPTER_FAILED, "model")


def not_invoked(version: AdapterVersion, request: GenerationRequest) -> RequestRejected | None:
    """Why a request is refused that would get an answer, log-probabilities or a mean embedding of the model alone.

    None: its key may use the model, it would not, or the adapter has not been read.
    """
    start = 0 if request.may_use_base else version.start_in(request.prompt_token_ids)
    shows_prompt = request.sampling.prompt_logprobs is not None or request.pooling == "mean"
    if start == 0 or (start is not None and not shows_prompt):
        return None
    if start is not None:
        message = (
            f"The prompt has tokens before the invocation of the adapter {version.name!r}; their log-probabilities and"
            " mean embeddings are those of the model without an adapter, which the key may not use."
        )
        return RequestRejected(message, MODEL_NOT_ALLOWED, "model")
    message = (
        f"The prompt does not contain the invocation of the adapter {version.name!r} (invocation_tokens in"
        " /v1/adapters), and the key may not use the model without an adapter."
    )
    return RequestRejected(message, MODEL_NOT_ALLOWED, "model")


def files_changed(version: AdapterVersion) -> str:
    """Why requests are refused whose version is no longer what its files hold."""
    return f"The files of the adapter {version.name!r} have changed; send the request again."


def files_damaged(version: AdapterVersion) -> str:
    """Why requests are refused whose version's files in --data-dir are not those that were stored."""
    return f"The stored files of the adapter {version.name!r} are damaged; load it again."


def changes_nothing(version: AdapterVersion) -> RequestRejected:
    """Why a version is refused that has no effect."""
    message = f"The adapter {version.name!r} changes no logit of the model; set 'probe' to false to load it anyway."
    return RequestRejected(message, ADAPTER_FAILED, "lora_path")


def no_version(call_id: str, name: str) -> CallFailed:
    return CallFailed(call_id, f"The adapter {name!r} has no such version loaded.", code=ADAPTER_NOT_FOUND)


def no_adapter(call_id: str, name: str) -> CallFailed:
    return CallFailed(call_id, f"There is no adapter {name!r}.", code=ADAPTER_NOT_FOUND, param="lora_name")


def of_load(call_id: str, name: str, current: AdapterVersion | None, in_place: bool) -> CallFailed | None:
    """Why nothing can be loaded under a name with this current version; None: it can, or may."""
    if not is_adapter_name(name):
        return CallFailed(call_id, f"lora_name must be {ADAPTER_NAME_RULE}; {name!r:.200} is not.", param="lora_name")
    if current is None or current.files is None or current.state == "failed" or in_place:
        return None
    message = f"The adapter {name!r} is already loaded; set load_inplace to replace it."
    return CallFailed(call_id, message, param="lora_name")


def too_many_pinned(call_id: str, pinned: Collection[str], num_slots: int) -> CallFailed:
    """`pinned`: the names of the others."""
    most = max(0, num_slots - 1)
    others = f"; {', '.join(sorted(pinned))} are" if pinned else ""
    message = f"At most {most} adapters can be pinned, one fewer than --max-loras{others}."
    return CallFailed(call_id, message, param="pinned")


def no_files(call_id: str, path: str) -> CallFailed:
    message = f"There is no adapter {path!r:.300} in --adapter-dir or among --lora-modules."
    return CallFailed(call_id, message, code=ADAPTER_NOT_FOUND, param="lora_path")


def not_read(call_id: str, error: str, *, is_fault: bool) -> CallFailed:
    return CallFailed(call_id, error, code=INTERNAL_ERROR if is_fault else ADAPTER_FAILED, param="lora_path")


def unloaded_meanwhile(call_id: str, name: str) -> CallFailed:
    return CallFailed(call_id, f"The adapter {name!r} was unloaded before it had been read.", code=ADAPTER_NOT_FOUND)


def is_pickle(call_id: str, path: str) -> CallFailed:
    """Why files that may be located cannot be loaded; see `stellarbyte.lora.peft_format`."""
    message = (
        f"The adapter {path!r:.300} is a pickle, which can run code when it is read; convert it to safetensors first"
        " (PEFT: load the adapter where you trust it, then save_pretrained)."
    )
    return CallFailed(call_id, message, code=ADAPTER_FAILED, param="lora_path")
