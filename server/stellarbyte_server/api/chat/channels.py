"""Grammars, in llguidance's Lark, of answers in harmony's format. They begin with the header of the answer's message.

The reasoning before it, and comments to the user, are no part of them: see the engine's `ReasoningGrammar`.
"""

import json
import re
from collections.abc import Sequence

from stellarbyte_server.api.structured.offered_tools import OfferedTool
from stellarbyte_server.api.structured.tool_calls import with_calls
from stellarbyte_server.api.structured.tool_formats import HARMONY
from stellarbyte_server.protocol.request import Channels


def final_grammar(text_grammar: str, channels: Channels) -> str:
    """The grammar of a final message with a text in `text_grammar`, a grammar of its own."""
    is_json = text_grammar.startswith("{")  # llguidance's form of several grammars, the first of which is the whole
    first, *others = json.loads(text_grammar)["grammars"] if is_json else [{"lark_grammar": text_grammar}]
    message = {"lark_grammar": f"start: {_final(channels)} @answer\n"}
    return json.dumps({"grammars": [message, {**first, "name": "answer"}, *others]})


def calls_grammar(
    tools: Sequence[OfferedTool], channels: Channels, *, required: bool, content_rule: str | None = None
) -> str:
    """The grammar of one call of a tool, or of a final message unless a call is `required`.

    `content_rule` is a rule in Lark for the final message's text; None: any text. ApiError for a schema that cannot be
    enforced.
    """
    calls = " | ".join(f"tool_{i}" for i in range(len(tools)))
    rules = [f"start: {calls}"]
    if not required:
        name = "TEXT" if content_rule is None else content_rule.partition(":")[0].strip()
        rule = "TEXT: /(?s:.*)/" if content_rule is None else content_rule.strip()
        rules = [f"start: {_final(channels)} {name} | {calls}", rule]
    return with_calls(rules, tools, HARMONY, [[_header(tool.name, channels)] for tool in tools])


def _final(channels: Channels) -> str:
    return f'<[{channels.channel_id}]> "final" <[{channels.message_id}]>'


def _header(name: str, channels: Channels) -> str:
    """The lexemes of a call's header, whose recipient stands in the channel or before it."""
    to = rf"to=functions\.{re.escape(name)}"
    channel, end = f"<[{channels.channel_id}]>", f"<[{channels.message_id}]>"
    if channels.constrain_id is not None:
        end = f'(<[{channels.constrain_id}]> "json")? {end}'
    in_channel = f"{channel} /commentary {to}( (json)?)?/ {end}"
    return f"({in_channel} | / {to} ?/ {channel} /commentary( (json)?)?/ {end})"
