"""What one request may ask of all its answers together."""

from typing import Any

import pytest

from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.generation import MAX_BIASED_TOKENS
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.generation import MAX_BIASES_AT_ONCE, MAX_GRAMMARS_AT_ONCE, Prompt, _check_amounts


def check(num_prompts: int, grammar: str | None = None, **fields: Any) -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": ["a"] * num_prompts, **fields})
    _check_amounts(body, [Prompt(token_ids=[1], max_tokens=4)] * num_prompts, None, grammar)


BIASES = {str(token_id): 1.0 for token_id in range(MAX_BIASED_TOKENS)}


@pytest.mark.parametrize(
    ("fields", "most", "why"),
    [
        ({"logit_bias": BIASES}, MAX_BIASES_AT_ONCE // MAX_BIASED_TOKENS, "entries of logit_bias"),
        ({"grammar": "x" * 60_000}, MAX_GRAMMARS_AT_ONCE // 60_000, "characters of schemas"),
    ],
)
def test_what_each_answer_carries_is_bounded_over_all_answers(fields: dict[str, Any], most: int, why: str) -> None:
    check(1, n=most, **fields)
    for num_prompts, choices, param in [(1, most + 1, "n"), (most + 1, 1, "prompt"), (2, most, "n")]:
        with pytest.raises(ApiError, match=why) as refusal:
            check(num_prompts, n=choices, **fields)
        assert (refusal.value.status, refusal.value.param) == (400, param)
