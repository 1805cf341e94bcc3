"""Converts an Anthropic request to a chat, and the field names in the chat's errors back to those of the request."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from stellarbyte_server.api.contract.bodies.anthropic.content import (
    Blocks,
    TextBlock,
    Texts,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from stellarbyte_server.api.contract.bodies.anthropic.messages import CountTokensBody, MessagesBody, ToolUseChoice
from stellarbyte_server.api.contract.bodies.chat import THINKING_SWITCHES, ChatBody
from stellarbyte_server.api.contract.bodies.generation import ModelFields
from stellarbyte_server.api.contract.errors import ApiError, bad_request, from_validation

# Fields of a chat → their names in Anthropic's API.
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "tool_call_id": "tool_use_id",
    "tool_calls": "tool_use",
    "reasoning_effort": "output_config.effort",
    "max_reasoning_tokens": "thinking.budget_tokens",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stream", "context_overflow")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL_FIELDS = {"parameters": "input_schema"}
_MESSAGE = re.compile(r"messages\[(\d+)\](?:[.\w]|\[\d+\])*")
_TOOL_FIELD = re.compile(r"(tools\[\d+\])\.function\.(\w+)")


@dataclass
class Turn:
    """A message of the chat."""

    role: str
    place: str  # the field of the request from which the message is made, or the first of several
    thoughts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    call_id: str | None = None  # of a result: its call

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": None if self.is_only_calls else "\n".join(self.texts)}
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        return message

    @property
    def is_only_calls(self) -> bool:
        return bool(self.calls) and not self.texts


class Chat:
    """The turns of a chat. Consecutive thoughts, texts and calls of one role are one turn."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def add(self, place: str, role: str, content: Blocks | Texts) -> None:
        """Add a message of the request. Its results precede its text, because they answer the previous turn."""
        for i, block in enumerate(content):
            if isinstance(block, ToolResultBlock):
                result = Turn("tool", f"{place}.content[{i}]", texts=[_result(block)], call_id=block.tool_use_id)
                self.turns.append(result)
        texts = [block.text for block in content if isinstance(block, TextBlock)]
        calls = [_call(block) for block in content if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in content if isinstance(block, ThinkingBlock) and block.thinking]
        if not texts and not calls and any(isinstance(block, ToolResultBlock) for block in content):
            return
        if not self.turns or self.turns[-1].role != role:
            self.turns.append(Turn(role, place))
        self.turns[-1].thoughts += thoughts
        self.turns[-1].texts += texts
        self.turns[-1].calls += calls

    def in_terms_of_request(self, error: ApiError) -> ApiError:
        """An error of the chat, with the names of the request's fields."""
        rename = self._rename
        return ApiError(
            error.status,
            rename(str(error)),
            param=None if error.param is None else rename(f"'{error.param}'").strip("'"),
            code=error.code,
            headers=error.headers,
        )

    def _rename(self, text: str) -> str:
        text = _MESSAGE.sub(self._place, text)
        text = _TOOL_FIELD.sub(lambda found: f"{found[1]}.{_TOOL_FIELDS.get(found[2], found[2])}", text)
        for chats, ours in _NAMES.items():
            text = text.replace(f"'{chats}'", f"'{ours}'")
        return text

    def _place(self, found: re.Match[str]) -> str:
        number = found[1]
        return self.turns[int(number)].place if len(number) < 9 and int(number) < len(self.turns) else found[0]


def as_chat(body: CountTokensBody) -> tuple[ChatBody, Callable[[ApiError], ApiError]]:
    """The chat, and a function that renames the fields in its errors; ApiError if the body has no valid chat."""
    chat = Chat()
    if body.system is not None:
        chat.add("system", "system", body.system)
    for i, message in enumerate(body.messages):
        chat.add(f"messages[{i}]", message.role, message.content)
    content = {name: getattr(body, name) for name in ModelFields.model_fields}
    content |= _sampling(body) | _tools(body) | _thinking(body) | {"messages": [turn.message() for turn in chat.turns]}
    if chat.turns[-1].role == "assistant":
        _check_prefill(body, chat.turns[-1])
        content["continue_final_message"] = True
    wanted = None if body.output_config is None else body.output_config.format
    if wanted is not None:
        schema = {"name": "answer", "schema": wanted.schema_}
        content["response_format"] = {"type": "json_schema", "json_schema": schema}
    try:
        return ChatBody.model_validate(content), chat.in_terms_of_request
    except ValidationError as error:
        raise chat.in_terms_of_request(from_validation(error)) from None


def _check_prefill(body: CountTokensBody, last: Turn) -> None:
    """ApiError if the last turn, which is the assistant's, cannot be continued."""
    if last.calls:
        raise bad_request(
            f"The calls in '{last.place}' have no results; give them in a message by the user.", last.place
        )
    if last.thoughts and not last.texts:
        raise bad_request(
            f"'{last.place}' has only thinking, so it cannot be continued; add a text, or a message by the user after"
            " it.",
            last.place,
        )
    if body.output_config is not None and body.output_config.format is not None:
        raise bad_request(
            f"'output_config.format' cannot be combined with the begun answer in '{last.place}'.",
            "output_config.format",
        )


def _sampling(body: CountTokensBody) -> dict[str, Any]:
    if not isinstance(body, MessagesBody):
        return {}
    fields = {name: getattr(body, name) for name in _SAMPLING}
    return fields | {"max_tokens": body.max_tokens, "stop": body.stop_sequences}


def _thinking(body: CountTokensBody) -> dict[str, Any]:
    thinking = body.thinking
    switch = None if thinking is None else thinking.switch
    return {
        "include_reasoning": thinking is not None and thinking.is_shown,
        "max_reasoning_tokens": None if thinking is None else thinking.budget_tokens,
        "chat_template_kwargs": None if switch is None else dict.fromkeys(THINKING_SWITCHES, switch),
        "reasoning_effort": None if body.output_config is None else body.output_config.effort,
    }


def without_effect(body: CountTokensBody, ignored: Collection[str], *, thinks: bool) -> list[str]:
    """Paths of ignored fields, from the chat's `ignored` ones; `thinks`: the model marks its reasoning."""
    names = ["output_config.effort"] if "reasoning_effort" in ignored else []
    switch = None if body.thinking is None else body.thinking.switch
    is_read = any(f"chat_template_kwargs.{name}" not in ignored for name in THINKING_SWITCHES)
    return names if switch is None or is_read or switch == thinks else ["thinking", *names]


def _tools(body: CountTokensBody) -> dict[str, Any]:
    if body.tools is None:
        return {} if body.tool_choice is None else {"tool_choice": _choice(body.tool_choice)}
    functions = [
        {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
        for tool in body.tools
    ]
    content: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in functions]}
    if (choice := body.tool_choice) is not None:
        content["tool_choice"] = _choice(choice)
        content["parallel_tool_calls"] = choice.type != "tool" and not choice.disable_parallel_tool_use
    return content


def _choice(choice: ToolUseChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type]


def _text(blocks: Texts) -> str:
    return "\n".join(block.text for block in blocks)


def _result(block: ToolResultBlock) -> str:
    text = "" if block.content is None else _text(block.content)
    return f"Error: {text}" if block.is_error else text


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = to_json(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}
