"""The response format and the tools of a chat give the grammar of its answer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from fastapi import Request

from stellarbyte_server.api.caller import owner_of
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import ResponseFormat
from stellarbyte_server.api.contract.bodies.tools import Schema
from stellarbyte_server.api.generation import off_loop
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structured.grammars import checked, json_grammar, json_rule
from stellarbyte_server.api.submission import record_of


class ChatGrammar(NamedTuple):
    text: str | None = None  # in llguidance's Lark; None: the answer is free
    param: str | None = None  # the field that asks for it


async def chat_grammar(
    http: Request, service: Service, wanted: ResponseFormat | None, toolbox: Toolbox | None
) -> ChatGrammar:
    """ApiError when it cannot be enforced, which names the field."""
    schema = _schema(wanted)
    if toolbox is not None and toolbox.called:
        if schema is not None:  # by itself first: an error should name the field that it is in
            await _enforceable(http, service, partial(json_grammar, schema), "response_format")
        param = "functions" if toolbox.are_functions else "tools"
        return await _enforceable(http, service, partial(_tools_grammar, toolbox, schema, service), param)
    if schema is not None:
        return await _enforceable(http, service, partial(json_grammar, schema), "response_format")
    return ChatGrammar()


async def _enforceable(http: Request, service: Service, make: Callable[[], str], param: str) -> ChatGrammar:
    """What `make` makes, in a thread because schemas may be large, once it is known that the engine can use it."""
    text = await off_loop(http, service, make, record_of(http).body_bytes)
    return ChatGrammar(await checked(text, param, service.text_work, owner_of(http)), param)


def _tools_grammar(toolbox: Toolbox, schema: Schema | None, service: Service) -> str:
    special_ids = special_marks(toolbox, service)
    text = toolbox.grammar(special_ids, None if schema is None else json_rule("content", schema))
    assert text is not None, "there is a tool that may be called"
    return text


def special_marks(toolbox: Toolbox, service: Service) -> dict[str, int]:
    """The marks of a toolbox's calls that are special tokens of the tokenizer."""
    ids = {mark: service.tokenizer.special_token_id(mark) for mark in toolbox.format.marks}
    return {mark: token_id for mark, token_id in ids.items() if token_id is not None}


def _schema(wanted: ResponseFormat | None) -> Schema | None:
    """The JSON schema of the answer's text; None: any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return {"type": "object"}
    return {} if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
