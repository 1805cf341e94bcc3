"""The bodies of POST /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from stellarbyte_server.api.contract.bodies.body import Body
from stellarbyte_server.api.contract.bodies.bounds import AtMost
from stellarbyte_server.api.contract.bodies.chat import MESSAGES, TOOLS, Messages
from stellarbyte_server.api.contract.bodies.fields import MAX_TOKEN_ID, TemplateArguments, TokenId, optional, required
from stellarbyte_server.api.contract.bodies.tools import MAX_TOOLS, Tool
from stellarbyte_server.api.contract.errors import bad_request

MAX_TOKENS = 2**20
MAX_CHARACTERS = 2**22

_MODEL = "The model or an adapter; all share one tokenizer. Default: the served model."
_ABSENT = "Must be absent: a body has either a prompt or messages."


class TokenizeBody(Body):
    """Fields common to both kinds of body."""

    model: str | None = optional(_MODEL)
    return_token_strs: bool | None = optional("Also return each token's text. Default: false.")

    @classmethod
    def class_for(cls, content: dict[str, Any]) -> type[Any]:
        if content.get("messages") is None:
            return TokenizePromptBody
        if content.get("prompt") is not None:
            raise bad_request("Give 'prompt' or 'messages', not both.", "messages")
        return TokenizeChatBody


class TokenizePromptBody(TokenizeBody):
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)] = required("The text.")
    messages: None = optional(_ABSENT)
    add_special_tokens: bool | None = optional(
        "Add the tokenizer's special tokens, such as a first token. Default: true."
    )


class TokenizeChatBody(TokenizeBody):
    prompt: None = optional(_ABSENT)
    messages: Messages = required(MESSAGES)
    tools: Annotated[list[Tool], AtMost(MAX_TOOLS)] | None = optional(TOOLS)
    add_generation_prompt: bool | None = optional("As for chats. Default: true, unless the last message is continued.")
    continue_final_message: bool | None = optional("As for chats. Default: false.")
    add_special_tokens: bool | None = optional("As for chats. Default: false.")
    chat_template_kwargs: TemplateArguments | None = optional("As for chats.")


def _fast(value: Any, slow: ValidatorFunctionWrapHandler) -> Any:
    """Checks token ids at once. If that fails, `slow` checks them one by one, three times slower, to name the error."""
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_TOKENS
    is_right = is_list and {*map(type, value)} == {int} and 0 <= min(value) and max(value) <= MAX_TOKEN_ID
    return value if is_right else slow(value)


class DetokenizeBody(Body):
    model: str | None = optional(_MODEL)
    tokens: Annotated[list[TokenId], AtMost(MAX_TOKENS), WrapValidator(_fast)] = required("Token ids.")
