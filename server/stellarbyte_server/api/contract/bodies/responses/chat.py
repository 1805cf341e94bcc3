"""The chat that a request for a response asks for.

Its items become messages: consecutive items of one answer are one message of the assistant, with its text and its
calls. Errors name the chat's fields, and are renamed to those of the request.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stellarbyte_server.api.contract.bodies.chat import ChatBody, JsonSchema, Message, ResponseFormat
from stellarbyte_server.api.contract.bodies.generation import CommonFields
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody, TextFormat
from stellarbyte_server.api.contract.bodies.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
)
from stellarbyte_server.api.contract.bodies.responses.tools import AllowedFunctions, Choice, NamedFunction, ResponseTool
from stellarbyte_server.api.contract.bodies.tools import (
    FunctionCall,
    Schema,
    ToolCall,
)
from stellarbyte_server.api.contract.errors import ApiError, from_validation

# Fields of a chat under the names that they have here.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "context_overflow": "truncation",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_MESSAGE = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\])?(?:\.function)?(.*)")
_TOOL = re.compile(r"tools\[(\d+)\](?:\.function)?(.*)")
_OF_ITEMS = {".tool_call_id": ".call_id", ".id": ".call_id"}


@dataclass(kw_only=True)
class _Turn:
    """A message of the chat, and the items that it is made of."""

    role: str
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_id: str | None = None  # of a function's result
    place: int | None  # of the first item; None: the instructions
    call_places: list[int] = field(default_factory=list)

    def message(self) -> Message:
        return Message.model_validate(
            {
                "role": self.role,
                "content": "\n".join(self.texts) if self.texts else None,
                "tool_calls": self.calls if self.calls else None,
                "tool_call_id": self.call_id,
            }
        )


@dataclass(frozen=True, kw_only=True)
class ResponseChat:
    """A chat, and how the fields of the request are called that its fields were made of."""

    body: ChatBody
    turns: list[_Turn]

    @classmethod
    def of(cls, body: ResponsesBody) -> "ResponseChat":
        """ApiError when the fields do not fit each other."""
        turns = list(_turns(body))
        try:
            chat = ChatBody.model_validate(
                {
                    **{name: getattr(body, name) for name in CommonFields.model_fields},
                    "messages": [turn.message() for turn in turns],
                    "max_completion_tokens": body.max_output_tokens,
                    "presence_penalty": body.presence_penalty,
                    "frequency_penalty": body.frequency_penalty,
                    "response_format": _response_format(None if body.text is None else body.text.format),
                    "tools": None if body.tools is None else [_tool(tool) for tool in body.tools],
                    "tool_choice": _choice(body.tool_choice),
                    "parallel_tool_calls": body.parallel_tool_calls,
                    "reasoning_effort": body.effort,
                    "logprobs": body.with_logprobs,
                    "top_logprobs": body.top_logprobs if body.with_logprobs else None,
                    "context_overflow": {"auto": "slide", "disabled": "error", None: None}[body.truncation],
                }
            )
        except ValidationError as error:
            wrong = from_validation(error)
            raise ApiError(wrong.status, str(wrong).replace("'messages", "'input"), param="input") from None
        return cls(body=chat, turns=turns)

    def name_of(self, param: str | None) -> str | None:
        """What the request calls a field of the chat."""
        if param is None:
            return None
        if (found := _MESSAGE.fullmatch(param)) is not None:
            turn = self.turns[int(found[1])]
            place = turn.place if found[2] is None else turn.call_places[int(found[2])]
            return "instructions" if place is None else f"input[{place}]{_OF_ITEMS.get(found[3], found[3])}"
        if (found := _TOOL.fullmatch(param)) is not None:
            return f"tools[{found[1]}]{found[2]}"
        return _NAMES.get(param, param)

    def renamed(self, error: ApiError) -> ApiError:
        """An error of the chat, about the request's field."""
        name = self.name_of(error.param)
        message = str(error).replace(f"'{error.param}'", f"'{name}'")
        return ApiError(error.status, message, param=name, code=error.code, headers=error.headers)


def _turns(body: ResponsesBody) -> Iterator[_Turn]:
    if body.instructions is not None:
        yield _Turn(role="system", texts=[body.instructions], place=None)
    answer: _Turn | None = None  # of the assistant, as far as it has come
    for place, item in enumerate(body.input):
        if isinstance(item, ReasoningItem):
            continue
        if isinstance(item, FunctionCallItem):
            answer = _Turn(role="assistant", place=place) if answer is None else answer
            function = FunctionCall(name=item.name, arguments=item.arguments)
            answer.calls.append(ToolCall(id=item.call_id, type="function", function=function))
            answer.call_places.append(place)
            continue
        if isinstance(item, MessageItem) and item.role == "assistant" and answer is not None and answer.calls:
            answer.texts.append(item.text)
            continue
        if answer is not None:
            yield answer
            answer = None
        if isinstance(item, FunctionCallOutputItem):
            yield _Turn(role="tool", texts=[item.text], call_id=item.call_id, place=place)
        elif item.role == "assistant":
            answer = _Turn(role="assistant", texts=[item.text], place=place)
        else:
            yield _Turn(role=item.role, texts=[item.text], place=place)
    if answer is not None:
        yield answer


def _tool(tool: ResponseTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"})
    return {"type": "function", "function": function}


def _choice(choice: Choice | None) -> str | dict[str, Any] | None:
    if isinstance(choice, AllowedFunctions):
        named = [_named(tool) for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
    return _named(choice) if isinstance(choice, NamedFunction) else choice


def _named(choice: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else ResponseFormat(type=wanted.type)
    schema: Schema = {} if wanted.schema_ is None else wanted.schema_
    return ResponseFormat(
        type="json_schema", json_schema=JsonSchema.model_validate({"name": wanted.name, "schema": schema})
    )
