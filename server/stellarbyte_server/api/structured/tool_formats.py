"""The formats in which models write tool calls, and their detection in a chat template.

A call is BEGIN, the tool's name, NAME_END, its arguments, END. Calls follow a trigger, which ends free text.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """A format. Marks may be special tokens of a tokenizer; everything else is text."""

    trigger: str = ""  # a mark; "": a call is the whole answer
    prefix: str = ""  # an optional mark before a call that is the whole answer
    opening: str = ""  # after the trigger, before the first of a list of calls
    begin: str
    name_end: str  # from the name to the arguments
    name_end_marks: tuple[str, ...] = ()  # the marks in `name_end`
    arguments: Literal["json", "tags"] = "json"
    end: str
    separator: str | None  # between calls; None: at most one call
    closing: str = ""  # after the last of a list of calls
    short_ids: bool = False  # the template requires ids of nine letters and digits
    in_channels: bool = (
        False  # a call is a message to its tool, whose text is the arguments; the engine reads its header
    )

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self.trigger, self.prefix, *self.name_end_marks) if mark)

    @property
    def is_list(self) -> bool:
        """Whether one trigger precedes all calls; otherwise a trigger precedes each call."""
        return bool(self.closing)


HERMES = ToolFormat(  # Qwen 2.5 and 3, Hermes
    trigger="<tool_call>",
    begin='\n{"name": "',
    name_end='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
QWEN_CODER = ToolFormat(  # Qwen 3 Coder, Qwen 3.5
    trigger="<tool_call>",
    begin="\n<function=",
    name_end=">\n",
    arguments="tags",
    end="</function>\n</tool_call>",
    separator="\n",
)
LLAMA = ToolFormat(  # Llama 3.1 and later
    prefix="<|python_tag|>", begin='{"name": "', name_end='", "parameters": ', end="}", separator=None
)
MISTRAL_LIST = ToolFormat(  # Mistral up to Small 3.1
    trigger="[TOOL_CALLS]",
    opening="[",
    begin='{"name": "',
    name_end='", "arguments": ',
    end="}",
    separator=", ",
    closing="]",
    short_ids=True,
)
MISTRAL = ToolFormat(  # later Mistral models
    trigger="[TOOL_CALLS]",
    begin="",
    name_end="[ARGS]",
    name_end_marks=("[ARGS]",),
    end="",
    separator="",
    short_ids=True,
)
CALL_ID = "123456789"  # placeholder for the id in a `name_end`
MISTRAL_WITH_IDS = replace(MISTRAL, name_end=f"[CALL_ID]{CALL_ID}[ARGS]", name_end_marks=("[CALL_ID]", "[ARGS]"))

HARMONY = ToolFormat(begin="", name_end="", end="", separator=None, in_channels=True)  # gpt-oss


def shown_format(template_source: str | None) -> ToolFormat | None:
    """The format of calls in a chat template; None: no known format."""
    source = "" if template_source is None else template_source.replace('\\"', '"')
    if "<|channel|>commentary" in source and "functions." in source:
        return HARMONY
    if HERMES.trigger in source:
        if QWEN_CODER.begin.strip() in source:
            return QWEN_CODER if "<parameter=" in source else None
        return HERMES if '"arguments":' in source else None
    if MISTRAL.trigger in source:
        if "[ARGS]" in source:
            return MISTRAL_WITH_IDS if "[CALL_ID]" in source else MISTRAL
        if f"{MISTRAL.trigger} [" in source:
            return replace(MISTRAL_LIST, opening=" [")
        return MISTRAL_LIST if f"{MISTRAL.trigger}[" in source else None
    return LLAMA if '{"name": ' in source and '"parameters":' in source else None
