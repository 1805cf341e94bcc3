"""The body of POST /v1/embeddings."""

from typing import Annotated, Literal

from pydantic import Field

from stellarbyte_server.api.contract.bodies.fields import optional, required
from stellarbyte_server.api.contract.bodies.generation import ModelFields
from stellarbyte_server.api.contract.bodies.prompt_input import PromptInput, prompts_at_most

MAX_INPUTS = 2048


class PoolingFields(ModelFields):
    """Fields common to requests for vectors."""

    pooling: Literal["last", "mean"] | None = optional(
        "The state after the last token, or the mean over all tokens. Default: last."
    )
    add_special_tokens: bool | None = optional(
        "Add the tokenizer's special tokens, such as a first token. Default: true."
    )


class EmbeddingsBody(PoolingFields):
    input: Annotated[list[PromptInput], *prompts_at_most(MAX_INPUTS)] = required(
        "One text or a list of up to 2048, each a text or token ids."
    )
    encoding_format: Literal["float", "base64"] | None = optional(
        "Numbers, or float32, little-endian, in base64. Default: float."
    )
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = optional("Must equal the size of the model's vectors.")
