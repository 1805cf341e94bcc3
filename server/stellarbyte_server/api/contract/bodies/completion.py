"""The body of POST /v1/completions."""

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from stellarbyte_server.api.contract.bodies import unsupported
from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.generation import MAX_CHOICES, GenerationBody
from stellarbyte_server.api.contract.bodies.prompt_input import PromptInput, prompts_at_most


def _false_is_none(value: object) -> object:
    return None if value is False else value


class CompletionBody(GenerationBody):
    not_supported: ClassVar = unsupported.OF_COMPLETIONS

    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = optional(
        "Maximum tokens of the answer; 0 needs echo or prompt_logprobs. Default: 16."
    )
    prompt: Annotated[list[PromptInput], *prompts_at_most(MAX_CHOICES)] = required(
        "One prompt or a list of them, each a text or token ids."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = optional(
        "Answers to generate; those n with the highest mean log-probability are returned. Default: n."
    )
    echo: bool | None = optional(
        "Begin each answer with its prompt. With max_tokens 0, return only the prompt. Default: false."
    )
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, BeforeValidator(_false_is_none)] = optional(
        "Log-probabilities, with this number of likeliest tokens. Default: none."
    )

    @property
    def num_candidates(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of
