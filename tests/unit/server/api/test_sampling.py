"""A request's sampling fields reach the engine: as given, else as the model's file says, else neutral."""

import json
from pathlib import Path
from typing import Any

import pytest

from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.generation import GenerationBody
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.bodies.responses.chat import ResponseChat
from stellarbyte_server.api.sampling import read_defaults, sampling_params
from stellarbyte_server.protocol.request import SamplingParams

FIELDS = {
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "min_tokens": 3,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
}
OF_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
ELSEWHERE = {
    "max_tokens",
    "seed",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "prompt_logprobs",
}  # see the tests of what computes them
NEUTRAL = SamplingParams(max_tokens=9, seed=5)


def sampled(defaults: dict[str, Any] | None = None, **fields: Any) -> SamplingParams:
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    return sampling_params(body, {} if defaults is None else defaults, max_tokens=9, seed=5)


def test_every_field_that_a_body_and_the_engine_share_is_seen_here() -> None:
    shared = {name for name in SamplingParams.__struct_fields__ if name in GenerationBody.model_fields}
    assert shared == FIELDS.keys() | ELSEWHERE


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_arrives_under_its_name_and_only_there(field: str) -> None:
    found, expected = sampled(**{field: FIELDS[field]}), {field: FIELDS[field]}
    assert {name: getattr(found, name) for name in NEUTRAL.__struct_fields__} == {
        name: expected.get(name, getattr(NEUTRAL, name)) for name in NEUTRAL.__struct_fields__
    }
    assert type(getattr(found, field)) is type(getattr(NEUTRAL, field))


def test_a_whole_number_is_sampled_with_as_a_number_and_every_way_to_say_all_tokens_is_one() -> None:
    assert sampled(temperature=1) == sampled(temperature=1.0) == NEUTRAL
    assert type(sampled(temperature=1).temperature) is float
    assert sampled(top_k=-1) == sampled(top_k=0) == sampled()


def test_the_models_file_counts_where_the_request_does_not_say(tmp_path: Path) -> None:
    config = {name: FIELDS[name] for name in OF_MODEL} | {"presence_penalty": 2, "eos_token_id": 1, "top_k": 5.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    defaults = read_defaults(tmp_path)
    assert defaults == {name: config[name] for name in OF_MODEL} and type(defaults["top_k"]) is int
    assert sampled(defaults) == sampled(**{name: FIELDS[name] for name in OF_MODEL} | {"top_k": 5})
    assert sampled(defaults, top_p=1.0, top_k=0).top_p == 1.0 and sampled(defaults, top_k=0).top_k == 0
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": None}))
    assert read_defaults(tmp_path) == read_defaults(tmp_path / "absent") == {}


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("top_k", 0), ("top_p", 1), ("top_p", 1.5), ("min_p", -1)])
def test_a_value_of_the_models_file_that_keeps_all_tokens_is_none(tmp_path: Path, name: str, value: float) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    assert sampled(read_defaults(tmp_path)) == NEUTRAL


def test_a_model_that_does_not_sample_is_greedy_unless_the_request_says_otherwise(tmp_path: Path) -> None:
    config = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    defaults = read_defaults(tmp_path)
    assert defaults == {"temperature": 0.0, "repetition_penalty": 1.5}
    assert sampled(defaults, temperature=0.7).temperature == 0.7
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"do_sample": None}))
    assert read_defaults(tmp_path)["temperature"] == 0.6


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_k", True), ("min_p", "0.1"), ("repetition_penalty", 0), ("top_p", [1])],
)
def test_a_value_of_the_models_file_that_makes_no_sense_is_named(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"generation_config.json: {name} must be"):
        read_defaults(tmp_path)


def test_a_response_is_the_chat_with_its_fields() -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
    fields = {name: FIELDS[name] for name in names}
    fields |= {"seed": 3, "stop": ["x", "y"], "priority": 4, "cache_salt": "s", "adapter_scale": 2.0, "stream": True}
    chat = ResponseChat.of(ResponsesBody.model_validate({"model": "m", "input": "hi", **fields})).body
    assert {name: getattr(chat, name) for name in fields} == fields | {"stop": ("x", "y")}
    assert (chat.model, chat.messages[0].content) == ("m", "hi")
