"""Answers with drafts are those without, whatever is guessed and whatever else the requests ask for."""

import random
from functools import partial
from typing import Any

import pytest

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.protocol.messages import Delta
from tests.support.cases import SLOW
from tests.support.engines.drafting import Guesses, answers_of, compute_masks_apart, drafting_core, random_request
from tests.support.engines.engine import Backend, make_request
from tests.support.engines.engine_core import VOCABULARY
from tests.support.models.byte_transformer import make_model

OF_ONE_RUN = 10
NUM_RUNS = 200  # 2,000 requests
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 8, "sink_tokens": 2},
    {"sliding_window": 11, "sink_tokens": 5, "use_xpos": False},
    {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
)


def assert_same(found: Delta, expected: Delta) -> None:
    for field in (
        "token_ids",
        "text",
        "finish_reason",
        "stop_reason",
        "num_tokens",
        "offsets",
        "evicted_tokens",
        "error",
    ):
        assert getattr(found, field) == getattr(expected, field), field
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
        assert [len(entry.top) for entry in ours] == [len(entry.top) for entry in theirs]


@pytest.mark.parametrize("backend", [TorchModel, pytest.param(partial(CpuModel, quantization="none", num_threads=2))])
@pytest.mark.parametrize("run", [run if run < 3 else pytest.param(run, marks=SLOW) for run in range(NUM_RUNS // 2)])
def test_random_requests_get_the_same_answers(run: int, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(f"{run} {getattr(backend, '__name__', 'cpu')}")
    model = make_model(vocab_size=VOCABULARY, **SHAPES[run % len(SHAPES)])
    options: dict[str, Any] = {
        "num_blocks": chance.choice([26, 40, 120]),  # the longest request needs 18 of 4 tokens
        "max_num_seqs": chance.choice([2, 5, 16]),
        "max_num_batched_tokens": chance.choice([5, 16, 64]),
        "max_prefill_tokens": chance.choice([None, 3]),
        "prefix_caching": chance.random() < 0.7,
    }
    requests = [random_request(chance, str(number)) for number in range(OF_ONE_RUN)]
    arrivals = {request.request_id: number * chance.choice([0, 2, 4]) for number, request in enumerate(requests)}
    expected = answers_of(drafting_core(model, None, backend, **options), requests, arrivals, {})
    coming = {name: list(delta.token_ids) for name, delta in expected.items()}
    drafts = Guesses(coming, chance)
    aborts = {name: chance.randint(1, 30) for name in expected if chance.random() < 0.1}
    found = answers_of(drafting_core(model, drafts, backend, **options), requests, arrivals, aborts)
    assert drafts.totals.num_accepted_tokens > 0
    for name, delta in expected.items():
        if name in aborts:
            assert delta.token_ids[: len(found[name].token_ids)] == found[name].token_ids
        else:
            assert_same(found[name], delta)
    if run % 2:
        compute_masks_apart(monkeypatch)
    own = Drafts()  # its guesses, of repetitions, and what grammars force
    found = answers_of(drafting_core(model, own, backend, **options), requests, arrivals, {})
    for name, delta in expected.items():
        assert_same(found[name], delta)


@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=SLOW), pytest.param("int4", marks=SLOW)])
def test_with_deterministic_kernels_drafts_change_no_bit(quantization: str) -> None:
    """Of log-probabilities, in batches and chunks of any size."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = make_model(vocab_size=VOCABULARY, initializer_range=0.1, **sizes)
    backend = partial(CpuModel, quantization=quantization, num_threads=2, is_invariant=True)
    chance = random.Random(quantization)
    requests = [
        make_request(
            [chance.randrange(VOCABULARY) for _ in range(5 + 9 * (number % 4))],
            20 + number,
            str(number),
            seed=number,
            temperature=float(number % 2),
            logprobs=3,
            return_token_ids=True,
            adapter="a" if number % 3 == 0 else None,
        )
        for number in range(8)
    ]
    at_once = dict.fromkeys((request.request_id for request in requests), 0)
    options: dict[str, Any] = {"num_blocks": 200, "max_num_seqs": 5}
    limit_s = 900  # either run may compile kernels
    expected = answers_of(drafting_core(model, None, backend, **options), requests, at_once, {}, limit_s)
    drafts = Guesses({name: list(delta.token_ids) for name, delta in expected.items()}, chance)
    found = answers_of(
        drafting_core(model, drafts, backend, max_num_batched_tokens=40, **options), requests, at_once, {}, limit_s
    )
    assert drafts.totals.num_accepted_tokens > 50
    for name, delta in expected.items():
        assert found[name].logprobs == delta.logprobs
