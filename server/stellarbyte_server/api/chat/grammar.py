"""Makes the grammar of a chat's answer from its response format and tools."""

from functools import partial

from fastapi import Request

from stellarbyte_server.api.chat.channels import calls_grammar, final_grammar
from stellarbyte_server.api.chat.tools import Toolbox
from stellarbyte_server.api.contract.bodies.chat import ChatBody, ResponseFormat
from stellarbyte_server.api.contract.errors import bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.api.structure import (
    Grammar,
    Structure,
    enforceable,
    only_one,
    requested_structure,
    text_grammar,
)
from stellarbyte_server.api.structured.answer_check import AnswerCheck
from stellarbyte_server.api.structured.grammars import json_rule


def chat_structure(body: ChatBody) -> Structure | None:
    """The required form of an answer's text, from any field that sets it; ApiError if several do."""
    return only_one(_of_format(body.response_format), requested_structure(body))


async def chat_grammar(
    http: Request, service: Service, structure: Structure | None, toolbox: Toolbox | None
) -> Grammar:
    """The grammar of an answer; ApiError naming the field if it cannot be enforced."""
    if toolbox is None or not toolbox.called:
        return _in_channel(await text_grammar(http, service, structure), service)
    if structure is not None:  # checked alone first, so that an error names its field
        if structure.schema is None:
            raise bad_request(f"'{structure.param}' cannot be combined with tools that may be called.", structure.param)
        await text_grammar(http, service, structure)
    param = "functions" if toolbox.are_functions else "tools"
    grammar = await enforceable(http, service, partial(_tools_grammar, toolbox, structure, service), param)
    content = None if structure is None or structure.strict else structure.schema
    grammar = grammar._replace(check=AnswerCheck.of(content, toolbox.called))
    return grammar if toolbox.format.in_channels else _in_channel(grammar, service)


def _in_channel(grammar: Grammar, service: Service) -> Grammar:
    """The grammar of a text, as that of the message that has it, if the model writes messages in channels."""
    channels = service.channels
    if channels is None or grammar.text is None:
        return grammar
    return grammar._replace(text=final_grammar(grammar.text, channels))


def _tools_grammar(toolbox: Toolbox, structure: Structure | None, service: Service) -> str:
    rule = None
    if structure is not None and structure.schema is not None:
        rule = json_rule("content", structure.schema, structure.param, strict=structure.strict)
    if toolbox.format.in_channels:
        channels = service.channels
        assert channels is not None, "checked with the body"
        return calls_grammar(toolbox.called, channels, required=toolbox.requires_call, content_rule=rule)
    text = toolbox.grammar(special_marks(toolbox, service), rule)
    assert text is not None, "there is a tool that may be called"
    return text


def special_marks(toolbox: Toolbox, service: Service) -> dict[str, int]:
    """The marks of the toolbox's call format that are special tokens, with their ids."""
    ids = {mark: service.tokenizer.special_token_id(mark) for mark in toolbox.format.marks}
    return {mark: token_id for mark, token_id in ids.items() if token_id is not None}


def _of_format(wanted: ResponseFormat | None) -> Structure | None:
    """The JSON schema of the answer's text; None: any text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return Structure("response_format", {"type": "object"})
    schema = {} if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
    return Structure("response_format", schema, strict=bool(wanted.json_schema.strict))
