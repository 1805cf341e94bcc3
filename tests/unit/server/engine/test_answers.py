"""What a request may ask of its answer, over the real scheduler and, where numbers matter, a real model."""

from typing import Any

import numpy as np
import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.protocol.messages import Accepted, Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import BACKENDS, Backend, make_request
from tests.support.engines.engine_core import END, Script, make_core, model_core
from tests.support.models import oracle
from tests.support.models.byte_transformer import make_model, random_tokens


def final_hidden(model: ByteTransformer, tokens: list[int]) -> torch.Tensor:
    """[T, C], from the model's own forward pass."""
    seen: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(torch.tensor([tokens]))
    hook.remove()
    return seen[0][0]


def answers(core: EngineCore, *requests: GenerationRequest) -> dict[str, Delta]:
    """Each request's answer as one delta."""
    for request in requests:
        core.submit(request)
    deltas: dict[str, list[Delta]] = {}
    while core.has_work:
        for item in core.step():
            if not isinstance(item, Accepted):
                deltas.setdefault(item.request_id, []).append(item)
    assert core.scheduler.pool.num_used == 0
    return {request_id: merged(parts) for request_id, parts in deltas.items()}


def answer(core: EngineCore, **fields: Any) -> tuple[str, str | None, int]:
    found = answers(core, make_request([1, 2, 3], **fields))["r"]
    return found.text, found.finish_reason, found.num_tokens


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("ab", "stop", 3)),
        ({"ignore_eos": True}, ("abab", "length", 6)),
        ({"stop_token_ids": (ord("b"),)}, ("a", "stop", 2)),
        ({"stop_token_ids": (ord("b"),), "ignore_eos": True}, ("a", "stop", 2)),
        ({"stop_token_ids": (ord("b"),), "include_stop": True}, ("ab", "stop", 2)),
        ({"stop": ("ba",), "ignore_eos": True}, ("a", "stop", 4)),
        ({"stop": ("ba",), "ignore_eos": True, "include_stop": True}, ("aba", "stop", 4)),
        ({"stop": ("b",), "min_tokens": 2}, ("ab", "stop", 3)),
        ({"stop": ("b",), "min_tokens": 2, "ignore_eos": True}, ("aba", "stop", 5)),
        ({"stop_token_ids": (ord("b"),), "stop": ("ax",), "include_stop": True}, ("ab", "stop", 2)),
        ({"skip_special_tokens": False, "ignore_eos": True}, ("ab<|end|>ab<|end|>", "length", 6)),
    ],
)
def test_an_answer_ends_where_the_request_says(fields: dict[str, Any], expected: tuple[str, str, int]) -> None:
    assert answer(make_core(Script("ab$")), max_tokens=6, **fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"ignore_eos": True}, None),
        ({"stop_token_ids": (ord("b"),)}, ord("b")),
        ({"stop": ("ba", "x"), "ignore_eos": True}, "ba"),
        ({"stop": ("ba", "aba"), "ignore_eos": True}, "aba"),
        ({"stop": ("b",), "stop_token_ids": (ord("b"),)}, ord("b")),
    ],
)
def test_an_answer_says_what_ended_it(fields: dict[str, Any], expected: str | int | None) -> None:
    found = answers(make_core(Script("ab$")), make_request([1, 2, 3], max_tokens=6, **fields))["r"]
    assert found.stop_reason == expected


def test_token_ids_come_back_if_asked_for() -> None:
    core = make_core(Script("ab$"))
    assert answers(core, make_request([1], return_token_ids=True))["r"].token_ids == (ord("a"), ord("b"), END)
    assert answers(core, make_request([1]))["r"].token_ids == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_tokens_bans_the_end_and_a_bias_moves_the_choice(backend: Backend) -> None:
    model = make_model()
    core = model_core(model, backend)
    prompt = random_tokens(9)
    first = answers(core, make_request(prompt, 1, return_token_ids=True))["r"].token_ids[0]
    fields: dict[str, Any] = {"max_tokens": 8, "return_token_ids": True, "stop_token_ids": (first,)}
    assert answers(core, make_request(prompt, **fields))["r"].num_tokens == 1
    found = answers(core, make_request(prompt, min_tokens=4, **fields))["r"]
    assert first not in found.token_ids[:4] and found.num_tokens > 4
    found = answers(core, make_request(prompt, logit_bias=((5, 100.0),), **fields))["r"]
    assert found.token_ids == (5,) * 8
    found = answers(core, make_request(prompt, logit_bias=((5, 20.0),), frequency_penalty=2.0, **fields))["r"]
    assert len(set(found.token_ids)) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_blocks", [64, 13])
def test_logprobs_of_prompt_and_answer_equal_the_oracle(backend: Backend, num_blocks: int) -> None:
    """Prompts in chunks of 7 tokens, several requests at once, on a cold and a warm cache, and while some are preempted
    (with 13 blocks of 4 tokens): the distribution is the model's own, whatever temperature and penalties say."""
    model = make_model()
    core = model_core(model, backend, max_num_batched_tokens=7, num_blocks=num_blocks)
    for turn in range(2):
        prompts = [random_tokens(11 + 3 * i, seed=i) for i in range(3)]
        fields: dict[str, Any] = {"logprobs": 3, "return_token_ids": True, "temperature": 1.7, "presence_penalty": 1.0}
        requests = [
            make_request(prompt, 6, str(i), seed=i, prompt_logprobs=None if i == 1 else 2, **fields)
            for i, prompt in enumerate(prompts)
        ]
        found = answers(core, *requests)
        for i, prompt in enumerate(prompts):
            tokens = prompt + list(found[str(i)].token_ids)
            expected = oracle.logprobs(model.state_dict(), model.config, tokens)
            given = [*found[str(i)].prompt_logprobs, *found[str(i)].logprobs]
            first = 1 if i != 1 else len(prompt)
            assert [entry.token_id for entry in given] == tokens[first:]
            for position, entry in enumerate(given, first):
                row = expected[position - 1]
                assert abs(entry.logprob - row[entry.token_id].item()) <= 1e-4
                assert len(entry.top) == (3 if position >= len(prompt) else 2)
                assert entry.top[0][1] == pytest.approx(row.max().item(), abs=1e-4)
        assert turn == 0 or found["1"].cached_tokens > 0
    assert (core.stats().num_preemptions_total > 0) == (num_blocks == 13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_alone_is_scored_without_an_answer(backend: Backend) -> None:
    model, prompt = make_model(), random_tokens(30)
    core = model_core(model, backend, max_num_batched_tokens=8)
    found = answers(core, make_request(prompt, 0, prompt_logprobs=0))["r"]
    assert (found.text, found.num_tokens, found.finish_reason) == ("", 0, "length")
    expected = oracle.logprobs(model.state_dict(), model.config, prompt)
    total = sum(expected[i, token].item() for i, token in enumerate(prompt[1:]))
    assert sum(entry.logprob for entry in found.prompt_logprobs) == pytest.approx(total, abs=1e-3)
    assert core.stats().generation_tokens_total == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_embedding_is_the_pooled_hidden_state_at_length_one(backend: Backend, pooling: str) -> None:
    model = make_model()
    core = model_core(model, backend, max_num_batched_tokens=7)
    prompts = [random_tokens(5 + 8 * i, seed=i) for i in range(4)]
    for _ in range(2):  # the second time much of it is in the cache
        found = answers(core, *(make_request(prompt, 0, str(i), pooling=pooling) for i, prompt in enumerate(prompts)))
        for i, prompt in enumerate(prompts):
            hidden_TC = final_hidden(model, prompt)
            pooled_C = hidden_TC[-1] if pooling == "last" else hidden_TC.mean(dim=0)
            expected = pooled_C / pooled_C.norm()
            vector = np.frombuffer(found[str(i)].embedding or b"", np.float32)
            np.testing.assert_allclose(vector, expected.detach().numpy(), atol=1e-4)


def test_choices_of_one_prompt_compute_it_once() -> None:
    core = make_core(Script("abcdefgh"), max_num_batched_tokens=1000)
    prompt = list(range(40))
    requests = [
        make_request(prompt, 3, str(choice), choice=choice, follows="0" if choice else None) for choice in range(4)
    ]
    found = answers(core, *requests)
    assert [found[str(i)].text for i in range(4)] == ["abc"] * 4
    assert [found[str(i)].cached_tokens for i in range(4)] == [0, 36, 36, 36]  # all blocks of 4 but the last, begun one


def test_a_choice_goes_on_when_the_one_it_follows_is_gone() -> None:
    core = make_core(Script("ab"), max_num_batched_tokens=8)
    core.submit(make_request(list(range(40)), 3, "first"))
    core.submit(make_request(list(range(40)), 3, "second", follows="first"))
    core.step()
    core.abort("first")
    assert answers(core)["second"].text == "aba"


def test_choices_have_random_numbers_of_their_own_and_repeat_with_the_seed() -> None:
    model, prompt = make_model(), random_tokens(9)

    def choices() -> list[tuple[int, ...]]:
        core = model_core(model, BACKENDS[0].values[0])
        fields: dict[str, Any] = {"temperature": 1.0, "seed": 5, "return_token_ids": True}
        requests = [make_request(prompt, 8, str(i), choice=i, **fields) for i in range(4)]
        found = answers(core, *requests)
        return [found[str(i)].token_ids for i in range(4)]

    first = choices()
    assert len(set(first)) == 4
    assert choices() == first
