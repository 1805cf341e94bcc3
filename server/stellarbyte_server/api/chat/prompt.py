"""Renders a chat with its template and tokenizes it, to generate an answer or to count tokens."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from stellarbyte_server.api.chat.messages import messages_for_template
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import Message
from stellarbyte_server.api.contract.bodies.tools import CustomTool, FunctionTool
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.service import Service


class ChatInput(Protocol):
    """The fields read from a body."""

    @property
    def messages(self) -> list[Message]: ...
    @property
    def tools(self) -> Sequence[FunctionTool | CustomTool] | None: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def add_special_tokens(self) -> bool | None: ...


def check_continuation(body: ChatInput) -> None:
    """ApiError if the final message is to be continued but cannot be."""
    if body.continue_final_message and body.add_generation_prompt:
        raise bad_request(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.", "continue_final_message"
        )
    if body.continue_final_message and body.messages[-1].role != "assistant":
        raise bad_request("'continue_final_message' needs a last message by the assistant.", "continue_final_message")


def content_characters(body: ChatInput) -> int:
    """The number of characters of all messages, for a lower bound on the prompt's tokens."""
    return sum(len(message.content) for message in body.messages if message.content is not None)


def chat_renderer(
    service: Service,
    toolbox: Toolbox | None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    *,
    may_end_open: bool = False,
) -> Callable[[ChatInput], str]:
    """A function that renders the prompt of a body with these tools, for a thread, because a template is a program. The
    function raises ApiError or ChatTemplateError.

    With `may_end_open`, or if the final message is continued, the last call may lack its result.
    """
    tokenizer = service.tokenizer

    def render(body: ChatInput) -> str:
        continues = bool(body.continue_final_message)
        return tokenizer.render_chat(
            messages_for_template(
                body.messages,
                toolbox,
                tokenizer.chat_template_source,
                takes_system=tokenizer.takes_system_messages,
                may_end_open=may_end_open or continues,
            ),
            tools=None if toolbox is None else toolbox.for_template,
            add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continues,
            variables=variables,
        )

    return render


def chat_encoder(
    body: ChatInput,
    service: Service,
    toolbox: Toolbox | None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    *,
    may_end_open: bool = False,
) -> Callable[[], list[int]]:
    """A function that makes the prompt's tokens; see `chat_renderer`."""
    render = chat_renderer(service, toolbox, variables, may_end_open=may_end_open)
    return lambda: service.tokenizer.encode(render(body), bool(body.add_special_tokens))
