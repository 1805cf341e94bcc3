"""Converts a request for a response to a chat.

Items become messages: consecutive items of one answer are one message by the assistant, with its reasoning, text and
calls. The field names in the chat's errors are converted to those of the request.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from stellarbyte_server.api.contract.bodies.chat import ChatBody, JsonSchema, Message, ReasoningFields, ResponseFormat
from stellarbyte_server.api.contract.bodies.generation import CommonFields
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody, TextFormat
from stellarbyte_server.api.contract.bodies.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
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

_SAME = (*CommonFields.model_fields, *ReasoningFields.model_fields)
# Fields of a chat → their names in /v1/responses.
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
    """A message of the chat, and the items from which it is made."""

    role: str
    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    call_id: str | None = None  # of a result: its call
    place: int | None  # of the first item; None: the instructions
    call_places: list[int] = field(default_factory=list)

    def message(self) -> Message:
        return Message.model_validate(
            {
                "role": self.role,
                "content": "\n".join(self.texts) if self.texts else None,
                "reasoning_content": "\n".join(self.reasoning) if self.reasoning else None,
                "tool_calls": self.calls if self.calls else None,
                "tool_call_id": self.call_id,
            }
        )


@dataclass(frozen=True, kw_only=True)
class ResponseChat:
    """A chat, and the request's names of its fields."""

    body: ChatBody
    turns: list[_Turn]

    @classmethod
    def of(cls, body: ResponsesBody) -> "ResponseChat":
        """ApiError if the fields contradict each other."""
        turns = _turns(body)
        try:
            chat = ChatBody.model_validate(
                {
                    **{name: getattr(body, name) for name in _SAME},
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
        """The request's name of a field of the chat."""
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
        """An error of the chat, with the name of the request's field."""
        name = self.name_of(error.param)
        message = str(error).replace(f"'{error.param}'", f"'{name}'")
        return ApiError(error.status, message, param=name, code=error.code, headers=error.headers)


class _Turns:
    """The turns of a conversation. Reasoning belongs to the text or the call that follows it."""

    def __init__(self, instructions: str | None) -> None:
        self.turns: list[_Turn] = []
        if instructions is not None:
            self.turns.append(_Turn(role="system", texts=[instructions], place=None))
        self._answer: _Turn | None = None  # the last turn, if it is the assistant's
        self._reasoning: list[str] = []  # not yet part of a turn

    def add(self, place: int, item: InputItem) -> None:
        if isinstance(item, ReasoningItem):
            if item.text:
                self._reasoning.append(item.text)
        elif isinstance(item, FunctionCallItem):
            answer = self._of_assistant(place, goes_on=True)
            function = FunctionCall(name=item.name, arguments=item.arguments)
            answer.calls.append(ToolCall(id=item.call_id, type="function", function=function))
            answer.call_places.append(place)
        elif isinstance(item, MessageItem) and item.role == "assistant":
            self._of_assistant(place, goes_on=self._has_called).texts.append(item.text)
        else:
            self.end_answer(place - 1)
            self.turns.append(_turn_of_others(item, place))

    def end_answer(self, place: int) -> None:
        """End the current answer at an item; reasoning without text or calls becomes a separate turn."""
        if self._reasoning:
            self._of_assistant(place, goes_on=self._has_called)
        self._answer = None

    @property
    def _has_called(self) -> bool:
        return self._answer is not None and bool(self._answer.calls)

    def _of_assistant(self, place: int, *, goes_on: bool) -> _Turn:
        if self._answer is None or not goes_on:
            self._answer = _Turn(role="assistant", place=place)
            self.turns.append(self._answer)
        self._answer.reasoning += self._reasoning
        self._reasoning = []
        return self._answer


def _turn_of_others(item: MessageItem | FunctionCallOutputItem, place: int) -> _Turn:
    if isinstance(item, FunctionCallOutputItem):
        return _Turn(role="tool", texts=[item.text], call_id=item.call_id, place=place)
    return _Turn(role=item.role, texts=[item.text], place=place)


def _turns(body: ResponsesBody) -> list[_Turn]:
    found = _Turns(body.instructions)
    for place, item in enumerate(body.input):
        found.add(place, item)
    found.end_answer(len(body.input) - 1)
    return found.turns


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
    described = {"name": wanted.name, "schema": schema, "strict": wanted.strict}
    return ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate(described))
