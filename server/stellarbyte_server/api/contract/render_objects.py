"""Models of rendered prompts, for the OpenAPI document and tests (see objects.py)."""

from typing import Annotated, Literal

from pydantic import Field, RootModel

from stellarbyte_server.api.contract.objects import AnswerObject, Count, TokenIds


class PromptStretch(AnswerObject):
    """Successive text of a prompt with one origin."""

    source: Annotated[
        Literal["message", "template", "prompt", "tokenizer", "unknown"],
        Field(
            description="message: a text of a message; template: all else that the chat template writes, such as tools"
            " and calls; prompt: of a completion; tokenizer: tokens that it adds; unknown: the template does not let"
            " the messages be found."
        ),
    ]
    message: Annotated[int | None, Field(description="The index of the message.")]
    role: Annotated[str | None, Field(description="The role of the message.")]
    text: str
    start: Annotated[Count, Field(description="Its first token: tokens count where they begin.")]
    end: Annotated[Count, Field(description="The token after its last one.")]


class RenderedPrompt(AnswerObject):
    """The prompt that the model would get."""

    model: str
    token_ids: TokenIds
    count: Annotated[Count, Field(description="The number of tokens.")]
    prompt: Annotated[str, Field(description="The text: all stretches, one after the other.")]
    stretches: list[PromptStretch]
    max_tokens: Annotated[Count, Field(description="Maximum tokens of each answer.")]
    max_model_len: Annotated[Count, Field(description="The model's context in tokens.")]


class RenderedPrompts(RootModel[list[RenderedPrompt]]):
    """One for each prompt."""
