"""The reasoning of a chat: the variables for its template, and the marks or channels of its answer."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import THINKING_SWITCHES, Message, ReasoningEffort
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.protocol.request import Channels, Reasoning

_NUM_LAST_TOKENS = 64  # of a prompt: a mark and the white space after it
# Models with channels know three efforts; the others are given as the nearest. With none, no reasoning may begin.
_EFFORTS_IN_CHANNELS: Mapping[str, str] = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


class TemplateVariables(NamedTuple):
    """The variables of a chat template other than its messages."""

    values: Mapping[str, Any]
    ignored: tuple[str, ...]  # paths of fields that the template does not read


class ReasoningInput(Protocol):
    """The fields read from a body."""

    @property
    def messages(self) -> list[Message]: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def max_reasoning_tokens(self) -> int | None: ...
    @property
    def reasoning_effort(self) -> ReasoningEffort | None: ...


def template_variables(
    arguments: Mapping[str, Any] | None,
    effort: ReasoningEffort | None,
    service: Service,
    toolbox: Toolbox | None = None,
) -> TemplateVariables:
    """The variables set by `chat_template_kwargs` and `reasoning_effort`; the former override the latter."""
    has_tools = toolbox is not None and toolbox.for_template is not None
    known = service.tokenizer.template_variables(has_tools=has_tools)
    given = {} if arguments is None else arguments
    values = {name: value for name, value in given.items() if name in known}
    ignored = [f"chat_template_kwargs.{name}" for name in given if name not in known]
    if effort is not None:
        shown = effort if service.channels is None else _EFFORTS_IN_CHANNELS.get(effort, effort)
        of_effort: dict[str, Any] = {"reasoning_effort": shown}
        if effort == "none":
            of_effort |= dict.fromkeys(THINKING_SWITCHES, False)
        read = {name: value for name, value in of_effort.items() if name in known}
        values = {**read, **values}
        if not read and (effort != "none" or service.reasoning is not None):
            ignored.append("reasoning_effort")
    return TemplateVariables(values, tuple(ignored))


def reasoning_of(body: ReasoningInput, prompt_token_ids: list[int], service: Service) -> Reasoning | Channels | None:
    """The marks or channels, and the limit, of the answer's reasoning; None: no reasoning is possible. ApiError if the
    limit cannot be enforced."""
    marks = service.reasoning
    if marks is None:
        if body.max_reasoning_tokens is not None:
            raise bad_request(
                "The field 'max_reasoning_tokens' needs a model that marks its reasoning; omit it for this model.",
                "max_reasoning_tokens",
            )
        return None
    if isinstance(marks, Channels):
        limit = 0 if body.reasoning_effort == "none" else body.max_reasoning_tokens
        return msgspec.structs.replace(marks, begun=_begun(prompt_token_ids, marks), max_tokens=limit)
    is_open = _is_open(body, prompt_token_ids, marks, service)
    if is_open is None:
        return None
    return msgspec.structs.replace(marks, is_open=is_open, max_tokens=body.max_reasoning_tokens)


def _is_open(body: ReasoningInput, prompt_token_ids: list[int], marks: Reasoning, service: Service) -> bool | None:
    """Whether the prompt has begun the reasoning; None: the prompt has also ended it, or begun the answer."""
    final = body.messages[-1].content
    if body.continue_final_message and final:
        return True if final.rfind(marks.start) > final.rfind(marks.end) else None
    end = service.tokenizer.decode(prompt_token_ids[-_NUM_LAST_TOKENS:], skip_special_tokens=False).rstrip()
    if end.endswith(marks.end):
        return None
    return end.endswith(marks.start)


def _begun(prompt_token_ids: list[int], channels: Channels) -> tuple[int, ...]:
    """The message that the prompt has begun, up to the mark before its text; (): it has ended all messages."""
    header: list[int] = []
    for token_id in reversed(prompt_token_ids):
        if token_id == channels.end_id or token_id in channels.final_ids:
            break
        if token_id == channels.message_id:
            header.clear()
        header.append(token_id)
        if token_id == channels.start_id:
            return tuple(reversed(header))
    return ()
