"""Items of a request's `input`: messages, calls of functions, their results, and reasoning.

Clients send an answer's output back, sometimes with additional fields. So only the fields declared here are checked;
others are ignored.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stellarbyte_server.api.contract.bodies.bounds import AtMost, wrong
from stellarbyte_server.api.contract.bodies.chat import MAX_PARTS
from stellarbyte_server.api.contract.bodies.fields import OrText, optional, required
from stellarbyte_server.api.contract.bodies.tools import Name
from stellarbyte_server.api.contract.bodies.variants import by_type, type_of, variant

_TEXTS = ("input_text", "output_text", "text")
_KINDS = ("message", "function_call", "function_call_output", "reasoning")


class Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


# Parts of content


class TextPart(Item):
    type: Literal["input_text", "output_text", "text"] = required("All are texts.")
    text: str = required("The text.")


class RefusalPart(Item):
    type: Literal["refusal"] = required("A refusal by the assistant.")
    refusal: str = required("The text of the refusal.")

    @property
    def text(self) -> str:
        return self.refusal


class ReasoningPart(Item):
    type: Literal["reasoning_text", "summary_text"] = required("Both are texts.")
    text: str = required("The text.")


def _known_part(value: object) -> object:
    kind = type_of(value)
    if kind is not None and kind not in (*_TEXTS, "refusal"):
        raise wrong(f"parts of the type {kind!r:.40} are not supported; only text parts are")
    return value


def _known_result(value: object) -> object:
    if type_of(value) == "refusal":
        raise wrong("a function's result must consist of text parts")
    return _known_part(value)


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Part = Annotated[
    Annotated[TextPart, variant("text")] | Annotated[RefusalPart, variant("refusal")],
    by_type(otherwise="text", same=dict.fromkeys(_TEXTS, "text")),
    BeforeValidator(_known_part),
]


# Items


class MessageItem(Item):
    type: Literal["message"] | None = optional("Optional.")
    role: Literal["system", "developer", "user", "assistant"] = required("Who says it.")
    content: Annotated[list[Part], AtMost(MAX_PARTS), BeforeValidator(_as_parts), OrText()] = required(
        "A text, or parts of text, which are joined by newlines."
    )

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class FunctionCallItem(Item):
    """A call by the assistant."""

    type: Literal["function_call"] = required("A call of a function.")
    call_id: Annotated[str, Field(min_length=1, max_length=256)] = required("The id from the answer.")
    name: Name = required("The function's name.")
    arguments: str = required("JSON, as text.")


class FunctionCallOutputItem(Item):
    """The result of a call."""

    type: Literal["function_call_output"] = required("The result of a call.")
    call_id: Annotated[str, Field(min_length=1, max_length=256)] = required("The call_id of its call.")
    output: Annotated[
        list[Annotated[TextPart, BeforeValidator(_known_result)]],
        AtMost(MAX_PARTS),
        BeforeValidator(_as_parts),
        OrText(),
    ] = required("A text, or parts of text, which are joined by newlines.")

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.output)


class ReasoningItem(Item):
    """An answer's reasoning, which goes back to the chat template."""

    type: Literal["reasoning"] = required("An earlier answer's reasoning.")
    content: Annotated[list[ReasoningPart], AtMost(MAX_PARTS)] | None = optional(
        "The text, for chat templates that show it. Parts are joined by newlines."
    )
    summary: Annotated[list[ReasoningPart], AtMost(MAX_PARTS)] | None = optional("Used if it has no content.")

    @property
    def text(self) -> str:
        """The text; empty if another server has encrypted it."""
        parts = self.content if self.content else self.summary
        return "\n".join(part.text for part in parts or ())


def _known_item(value: object) -> object:
    kind = type_of(value)
    if kind == "item_reference":
        raise wrong("items are not stored, so it refers to none; send the item itself, as in the answer")
    if kind is not None and kind not in _KINDS:
        raise wrong(f"its type {kind!r:.40} is not supported; it must be one of {', '.join(_KINDS)}")
    return value


InputItem = Annotated[
    Annotated[MessageItem, variant("message")]
    | Annotated[FunctionCallItem, variant("function_call")]
    | Annotated[FunctionCallOutputItem, variant("function_call_output")]
    | Annotated[ReasoningItem, variant("reasoning")],
    by_type(otherwise="message"),
    BeforeValidator(_known_item),
]
