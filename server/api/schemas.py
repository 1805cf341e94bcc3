"""The bodies of requests: which fields there are, what they may hold, which are refused. Knows no engine.

No field is ignored: one that is known but not supported, and one that is unknown, is an error unless its value asks
for nothing. null means absent everywhere.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from server.api.errors import bad_request, from_validation
from server.engine.request import MAX_PRIORITY

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1000


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def _stop_strings(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong("it must be a string or a list of strings")
    if len(texts) > MAX_STOP_STRINGS:
        raise _wrong(f"there may be at most {MAX_STOP_STRINGS} stop strings")
    if not all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise _wrong(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(texts)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and {type(item) for item in value} == {int}


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and (isinstance(value[0], str) or _is_token_ids(value[0])):
        value = value[0]
    if isinstance(value, str):
        return value
    if _is_token_ids(value):
        assert isinstance(value, list)
        return value
    if value == [] or value == [[]]:
        raise _wrong("the prompt is empty")
    if isinstance(value, list) and all(isinstance(item, str) or _is_token_ids(item) for item in value):
        raise _wrong("several prompts in one request are not supported yet")
    raise _wrong("it must be a string or a list of token ids")


def _content(value: object) -> str | None:
    """A message's text; text parts are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("it must be a string or a list of text parts")
    for i, part in enumerate(value):
        if (
            not isinstance(part, dict)
            or part.get("type") not in ("text", None)
            or not isinstance(part.get("text"), str)
        ):
            raise _wrong(f"part {i} is not a text part, and only those are supported")
        unknown = part.keys() - {"type", "text"}
        if unknown:
            raise _wrong(f"part {i} has the unknown field {min(unknown)!r}")
    return "\n".join(part["text"] for part in value)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None


class GenerationBody(_Body):
    """What both ways to generate share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_stop_strings)] = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    context_overflow: Literal["error", "slide"] | None = None
    adapter_scale: Annotated[float, Field(ge=0, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and unused, whatever they hold.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(GenerationBody):
    prompt: Annotated[str | list[int], BeforeValidator(_prompt)]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = None


def _has_messages(messages: list[Message]) -> list[Message]:
    if not messages:
        raise _wrong("there must be at least one message")
    for i, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise _wrong(f"message {i} has no content")
    return messages


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], AfterValidator(_has_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None


def _equals(*neutral: object) -> Callable[[object], bool]:
    return lambda value: any(
        value == option and isinstance(value, bool) == isinstance(option, bool) for option in neutral
    )


# Fields of the API that are not supported yet, with the values that ask for nothing.
_NOT_SUPPORTED: dict[str, Callable[[object], bool]] = {
    "n": _equals(1),
    "presence_penalty": _equals(0),
    "frequency_penalty": _equals(0),
    "repetition_penalty": _equals(1),
    "logit_bias": _equals({}),
    "min_tokens": _equals(0),
    "stop_token_ids": _equals([]),
    "include_stop_str_in_output": _equals(False),
    "skip_special_tokens": _equals(True),
    "return_token_ids": _equals(False),
}
_NOT_SUPPORTED_COMPLETION = _NOT_SUPPORTED | {
    "best_of": _equals(1),
    "echo": _equals(False),
    "logprobs": _equals(False),
    "suffix": _equals(""),
    "add_special_tokens": _equals(True),
}
_NOT_SUPPORTED_CHAT = _NOT_SUPPORTED | {
    "logprobs": _equals(False),
    "top_logprobs": _equals(0),
    "response_format": _equals({"type": "text"}),
    "tools": _equals([]),
    "tool_choice": _equals("none", "auto"),
    "parallel_tool_calls": _equals(True, False),
    "functions": _equals([]),
    "function_call": _equals("none", "auto"),
    "modalities": _equals(["text"]),
    "audio": _equals(),
    "prediction": _equals(),
    "reasoning_effort": _equals("none"),
    "verbosity": _equals(),
    "web_search_options": _equals(),
    "prompt_cache_retention": _equals(),
    "add_generation_prompt": _equals(True),
    "continue_final_message": _equals(False),
    "add_special_tokens": _equals(False),
    "chat_template": _equals(),
    "chat_template_kwargs": _equals({}),
    "documents": _equals([]),
}
# What an answer of ours, or of others, carries when it is sent back as a message of the assistant.
_NOT_SUPPORTED_MESSAGE = {
    "refusal": _equals(""),
    "annotations": _equals([]),
    "audio": _equals(),
    "tool_calls": _equals([]),
    "function_call": _equals(),
    "tool_call_id": _equals(),
    "reasoning_content": _equals(""),
    "reasoning": _equals(""),
}
_NOT_SUPPORTED_STREAM_OPTIONS = {
    "include_obfuscation": _equals(False),
    "continuous_usage_stats": _equals(False),
}

BodyT = TypeVar("BodyT", bound=GenerationBody)
PlainBodyT = TypeVar("PlainBodyT", bound=BaseModel)


def parse_body(body_class: type[BodyT], body: bytes, *, warn_unknown: bool) -> tuple[BodyT, list[str]]:
    """A checked body, and the fields that were ignored (none unless `warn_unknown`); ApiError when it is refused."""
    try:
        parsed = body_class.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    refused = list(_refused_fields(parsed))
    if refused and not warn_unknown:
        path, known = refused[0]
        reason = "is not supported yet" if known else "is unknown"
        raise bad_request(f"The field '{path}' {reason}.", path)
    if parsed.stream_options is not None and not parsed.stream:
        raise bad_request("The field 'stream_options' is only allowed when 'stream' is true.", "stream_options")
    return parsed, [path for path, _ in refused]


def parse_plain_body(body_class: type[PlainBodyT], body: bytes) -> PlainBodyT:
    """A checked body of a class that forbids other fields; ApiError when it is refused."""
    try:
        return body_class.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def _refused_fields(body: GenerationBody) -> Iterator[tuple[str, bool]]:
    """Path of every field that asks for something we do not do, and whether it is a known one."""
    not_supported = _NOT_SUPPORTED_CHAT if isinstance(body, ChatBody) else _NOT_SUPPORTED_COMPLETION
    yield from _extra_fields(body, "", not_supported)
    if body.stream_options is not None:
        yield from _extra_fields(body.stream_options, "stream_options.", _NOT_SUPPORTED_STREAM_OPTIONS)
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages):
            yield from _extra_fields(message, f"messages[{i}].", _NOT_SUPPORTED_MESSAGE)


def _extra_fields(
    part: BaseModel, prefix: str, not_supported: dict[str, Callable[[object], bool]]
) -> Iterator[tuple[str, bool]]:
    for name, value in (part.model_extra or {}).items():
        is_neutral = not_supported.get(name)
        if value is None or (is_neutral is not None and is_neutral(value)):
            continue
        yield prefix + name, is_neutral is not None
