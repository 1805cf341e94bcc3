"""The engine's requests that a body becomes, and what it may ask of all its answers together."""

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stellarbyte_server.api.contract.bodies.body import parse_body
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.generation import MAX_BIASED_TOKENS
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.generation import (
    MAX_BIASES_AT_ONCE,
    MAX_GRAMMARS_AT_ONCE,
    Bounds,
    Prompt,
    _check_amounts,
    make_requests,
    with_adapter_as_model,
)
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.request import GenerationRequest


def check(num_prompts: int, grammar: str | None = None, **fields: Any) -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": ["a"] * num_prompts, **fields})
    _check_amounts(body, [Prompt(token_ids=[1], max_tokens=4)] * num_prompts, None, None, grammar)


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


def requests_for(num_prompts: int = 1, **fields: Any) -> tuple[GenerationRequest, ...]:
    content = {"model": "base", "prompt": ["a"] * num_prompts, **fields}
    body, _ = parse_body(CompletionBody, json.dumps(content).encode(), warn_unknown=False)
    body = with_adapter_as_model(body, "base")
    service = SimpleNamespace(
        settings=SimpleNamespace(model_name="base"), info=SimpleNamespace(vocab_size=100), sampling_defaults={}
    )
    prompts = [Prompt(token_ids=[number], max_tokens=4) for number in range(num_prompts)]
    return make_requests(body, service, prompts, Bounds(overflow="error", context=100, answer=None))


def test_what_is_computed_from_fields_reaches_the_engine() -> None:
    (request,) = requests_for(
        logit_bias={"7": 2, "1": -0.5}, stop="x", stop_token_ids=[3, 4], include_stop_str_in_output=True, seed=-1
    )
    sampling = request.sampling
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == (((7, 2.0), (1, -0.5)), ("x",), (3, 4))
    assert (sampling.include_stop, sampling.seed, sampling.max_tokens) == (True, 2**64 - 1, 4)
    assert request.adapter is None and request.adapter_scale == 1


def test_answers_to_one_prompt_differ_in_their_numbers_only_and_share_its_computation() -> None:
    requests = requests_for(num_prompts=2, n=2, seed=5, model="a@01234567", adapter_scale=2)
    assert [(request.prompt_token_ids, request.sampling.choice) for request in requests] == [
        ((0,), 0), ((0,), 1), ((1,), 0), ((1,), 1)
    ]  # fmt: skip
    assert {request.sampling.seed for request in requests} == {5}
    assert [request.follows for request in requests] == [None, requests[0].request_id, None, requests[2].request_id]
    assert {(request.adapter, request.adapter_scale) for request in requests} == {
        (AdapterReference("a", "01234567"), 2.0)
    }


A, B = AdapterReference("a"), AdapterReference("b", "01234567")


@pytest.mark.parametrize(
    ("fields", "adapter", "scale"),
    [
        ({"model": "a+b@01234567"}, AdapterMix(((A, 1.0), (B, 1.0))), 1.0),
        ({"model": "b@01234567+a", "adapter_scale": 2}, AdapterMix(((A, 1.0), (B, 1.0))), 2.0),
        ({"adapters": [{"name": "b@01234567", "scale": 0.5}, {"name": "a"}]}, AdapterMix(((A, 1.0), (B, 0.5))), 1.0),
        ({"model": "a", "adapters": [{"name": "a", "scale": 0.5}], "adapter_scale": 3}, A, 1.5),
        ({"model": "a+b", "adapter_id": "a+b"}, AdapterMix(((A, 1.0), (AdapterReference("b"), 1.0))), 1.0),
    ],
)
def test_a_mix_reaches_the_engine_with_its_scales_in_the_order_of_names(
    fields: dict[str, Any], adapter: AdapterReference | AdapterMix, scale: float
) -> None:
    (request,) = requests_for(**fields)
    assert (request.adapter, request.adapter_scale) == (adapter, scale)
    encoded = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(encoded, type=GenerationRequest).adapter == adapter


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": "a+b+c+d+e"}, "model", "'model' mixes 5 adapters; at most 4 are allowed"),
        ({"model": "a+b+a@01234567"}, "model", "'model' names the adapter 'a' twice"),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters", "'adapters' names the adapter 'a' twice"),
        ({"model": "c", "adapters": [{"name": "a"}]}, "adapters", "'adapters' and 'model' name two adapters"),
        ({"adapter_id": "a", "adapters": [{"name": "a"}]}, "adapters", "either the field 'adapter_id' or"),
        ({"adapters": []}, "adapters", "adapters"),
        ({"adapters": [{"name": str(i)} for i in range(5)]}, "adapters", "4"),
        ({"adapters": [{"name": "a+b"}]}, "adapters[0].name", "name"),
        ({"adapters": [{"name": "a", "scale": 9}]}, "adapters[0].scale", "scale"),
        ({"adapters": [{"name": "a", "weight": 1}]}, "adapters[0].weight", "is unknown"),
    ],
)
def test_a_mix_that_cannot_be_is_named(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refusal:
        requests_for(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"adapter_scale": 2}, "adapter_scale"),
    ],
)
def test_a_field_that_does_not_fit_the_model_or_the_answer_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        requests_for(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)
