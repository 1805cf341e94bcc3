"""Answers with drafts on a GPU, by Triton's interpreter where there is none, are those without.

The interpreter takes milliseconds for every program of a kernel: models, batches and answers are tiny.
"""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte import ByteTransformer
from stellarbyte.backends.gpu import steps
from stellarbyte.backends.gpu.preparation import usual_programs
from stellarbyte.backends.gpu.prompts import verified_shapes
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.answers import assert_same
from tests.support.cases import SLOW_WITHOUT_GPU
from tests.support.engines.drafting import FORMS, Guesses, answers_of, compute_masks_here, random_request
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import VOCABULARY
from tests.support.gpu.gpu_engine import GpuEngine, gpu_drafting_core, own_stream
from tests.support.gpu.triton_dots import placeless_dots
from tests.support.models.byte_transformer import make_model

NUM_RUNS = 40
SHAPES: tuple[dict[str, Any], ...] = ({"sliding_window": 8, "sink_tokens": 2}, {}, {"qk_norm": True, "use_xpos": False})
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}


@pytest.fixture(autouse=True)
def small_card(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """A stream for each test. On a card of one multiprocessor four programs share a row, or have one of four each."""
    monkeypatch.setattr(steps, "num_multiprocessors_of", lambda _: 1)
    with own_stream(device):
        yield


def tiny_model(**overrides: Any) -> ByteTransformer:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(vocab_size=VOCABULARY, intermediate_size=32, **(shape | overrides))


def at_once(requests: list[GenerationRequest]) -> dict[str, int]:
    return dict.fromkeys((request.request_id for request in requests), 0)


def assert_all_same(found: dict[str, Delta], expected: dict[str, Delta]) -> None:
    for name, delta in expected.items():
        assert_same(found[name], delta)


@pytest.mark.parametrize(
    "run", [run if run < 2 else pytest.param(run, marks=SLOW_WITHOUT_GPU) for run in range(NUM_RUNS)]
)
def test_random_requests_get_the_same_answers(run: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_masks_here(monkeypatch)
    chance, model = random.Random(run), tiny_model(**SHAPES[run % len(SHAPES)])
    options: dict[str, Any] = {
        "num_blocks": chance.choice([26, 120]),
        "max_num_seqs": chance.choice([2, 5]),
        "max_num_batched_tokens": chance.choice([9, 40]),
    }
    requests = [random_request(chance, str(number), most_tokens=12) for number in range(5)]
    arrivals = {request.request_id: number * chance.choice([0, 2]) for number, request in enumerate(requests)}
    expected = answers_of(gpu_drafting_core(model, None, device, **options), requests, arrivals, {})
    coming = {name: list(delta.token_ids) for name, delta in expected.items()}
    drafts = Guesses(coming, chance, runs_ahead=True)
    found = answers_of(gpu_drafting_core(model, drafts, device, **options), requests, arrivals, {})
    assert drafts.totals.num_accepted_tokens > 0
    assert_all_same(found, expected)


WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9, "adapter": "a", "adapter_scale": 0.5},
    {"temperature": 1.0, "logprobs": 2, **PENALTIES},
    {"grammar": FORMS[2], "temperature": 1.0, "logprobs": 0},
    {"grammar": FORMS[2], "adapter": "b"},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "min_tokens": 3, "stop_token_ids": tuple(range(200))},
    {"prompt_logprobs": 1, "temperature": 0.8, "min_p": 0.05},
]


def test_each_kind_of_request_gets_the_same_answer_beside_the_others(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_masks_here(monkeypatch)
    model, chance = tiny_model(sliding_window=7, sink_tokens=2), random.Random(3)
    requests = [
        make_request([3 + i, 5, 7, 9][: 2 + i % 3], 7, str(i), seed=i, return_token_ids=True, **wish)
        for i, wish in enumerate(WISHES)
    ]
    expected = answers_of(gpu_drafting_core(model, None, device, max_num_seqs=8), requests, at_once(requests), {})
    drafts = Guesses({name: list(delta.token_ids) for name, delta in expected.items()}, chance, runs_ahead=True)
    core = gpu_drafting_core(model, drafts, device, max_num_seqs=8)
    assert_all_same(answers_of(core, requests, at_once(requests), {}), expected)
    assert drafts.totals.num_accepted_tokens >= 7


def test_penalties_count_the_tokens_of_the_draft_before(device: torch.device) -> None:
    """Each token of a draft is penalised for those before it: greedy answers that would repeat a token do not."""
    model = tiny_model()
    wish: dict[str, Any] = {"repetition_penalty": 5.0, "frequency_penalty": 2.0, "presence_penalty": 2.0}
    requests = [make_request([1, 2, 3, 4], 8, "0", return_token_ids=True, **wish)]
    free = [make_request([1, 2, 3, 4], 8, "0", return_token_ids=True)]
    without_penalty = answers_of(gpu_drafting_core(model, None, device), free, at_once(free), {})["0"].token_ids
    expected = answers_of(gpu_drafting_core(model, None, device), requests, at_once(requests), {})
    assert len(set(without_penalty)) < len(set(expected["0"].token_ids))
    drafts = Guesses({"0": list(expected["0"].token_ids)}, random.Random(1), runs_ahead=True)
    found = answers_of(gpu_drafting_core(model, drafts, device), requests, at_once(requests), {})
    assert drafts.totals.num_accepted_tokens >= 2
    assert_all_same(found, expected)


def test_deterministic_numbers_have_the_same_bits_with_drafts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_masks_here(monkeypatch)
    model = tiny_model(sliding_window=7, sink_tokens=2)
    wishes: list[dict[str, Any]] = [{}, {"adapter": "a"}, {"temperature": 1.0, "top_p": 0.9, **PENALTIES}]
    requests = [
        make_request([3 + i, 5, 7, 9][: 2 + i], 7, str(i), seed=i, logprobs=2, return_token_ids=True, **wish)
        for i, wish in enumerate(wishes)
    ]
    options: dict[str, Any] = {"max_num_seqs": 4, "is_invariant": True}
    with placeless_dots():
        expected = answers_of(gpu_drafting_core(model, None, device, **options), requests, at_once(requests), {})
        coming = {name: list(delta.token_ids) for name, delta in expected.items()}
        drafts = Guesses(coming, random.Random(3), runs_ahead=True)
        found = answers_of(gpu_drafting_core(model, drafts, device, **options), requests, at_once(requests), {})
    assert drafts.totals.num_accepted_tokens > 0
    assert {name: delta.logprobs for name, delta in found.items()} == {
        name: delta.logprobs for name, delta in expected.items()
    }
    assert all(delta.logprobs for delta in found.values())


def test_an_answer_that_repeats_itself_takes_fewer_steps(device: torch.device) -> None:
    """Guesses of `Drafts` itself; the request that wants none is computed a token a step, and a step ahead."""
    request = make_request([1, 2, 3] * 2, 20, logit_bias=((5, 100.0),), return_token_ids=True)
    num_steps = []
    for drafts in (None, Drafts(clock=lambda: 0.0, runs_ahead=True)):
        core = gpu_drafting_core(tiny_model(), drafts, device, max_num_seqs=2)
        (delta,) = answers_of(core, [request], {"r": 0}, {}).values()
        assert delta.token_ids == (5,) * 20
        num_steps.append(core.answers.num_steps)
    assert num_steps[0] == 20 and num_steps[1] < 16


def test_steps_without_drafts_stay_ahead(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a step with drafts is read before the next is started; the others run as without `Drafts`."""

    class Sometimes(Drafts):
        """A draft after the sixth token."""

        def may_draft(self, running: list[Sequence], *, is_ahead: bool = False) -> bool:
            del is_ahead
            return any(sequence.num_tokens - sequence.num_prompt == 6 for sequence in running)

        def _draft(self, sequence: Sequence, num_rows: int) -> tuple[int, ...]:
            del sequence, num_rows
            return (5, 5, 6)

    core = gpu_drafting_core(tiny_model(), Sometimes(runs_ahead=True), device, max_num_seqs=2)
    events: list[str] = []
    start, receive = core.runner.start, core._receive

    def noting_start(chunks: list[Chunk]) -> Any:
        events.append(f"start {len(chunks[0].draft)}")
        return start(chunks)

    def noting_receive(chunks: list[Chunk], *arguments: Any, **named: Any) -> list[Delta]:
        events.append(f"read {len(chunks[0].draft)}")
        return receive(chunks, *arguments, **named)

    monkeypatch.setattr(core.runner, "start", noting_start)
    monkeypatch.setattr(core, "_receive", noting_receive)
    request = make_request([1, 2, 3], 12, logit_bias=((5, 100.0),), return_token_ids=True)
    assert answers_of(core, [request], {"r": 0}, {})["r"].token_ids == (5,) * 12
    ahead = ["start 0", "read 0"]
    assert events == ["start 0", *ahead * 5, "read 0", "start 3", "read 3", "start 0", *ahead * 2, "read 0"]
    assert core.stats().accepted_tokens_total == 2


def test_a_step_with_drafts_that_fails_is_computed_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [make_request([i, 2, 3], 9, str(i), seed=i, temperature=1.0, return_token_ids=True) for i in range(2)]
    expected = answers_of(gpu_drafting_core(tiny_model(), None, device), requests, at_once(requests), {})
    coming = {name: list(delta.token_ids) for name, delta in expected.items()}
    core = gpu_drafting_core(tiny_model(), Guesses(coming, random.Random(1), runs_ahead=True), device)
    failed: list[int] = []
    settle = steps.Steps.settle

    def failing(self: steps.Steps, *arguments: Any) -> None:
        if not failed:
            failed.append(len(arguments[0]))
            raise RuntimeError("planted")
        settle(self, *arguments)

    monkeypatch.setattr(steps.Steps, "settle", failing)
    assert_all_same(answers_of(core, requests, at_once(requests), {}), expected)
    assert failed == [2]


@pytest.mark.parametrize("with_adapters", [False, True])
def test_programs_that_verify_can_be_prepared(device: torch.device, with_adapters: bool) -> None:
    """Without a sequence: all rows only fill the program up."""
    core = gpu_drafting_core(tiny_model(), Drafts(runs_ahead=True), device, max_num_seqs=2)
    assert isinstance(core.runner, PlanRunner) and isinstance(core.runner.executor, SlotExecutor)
    rehearsal = GpuEngine.rehearsal_of(core.runner.executor._steps)
    wanted = [key for key in usual_programs(rehearsal) if isinstance(key, steps.Prefill) and key.verifies]
    shapes = {key.shape for key in wanted}
    assert shapes == {*verified_shapes(with_adapters=False), *verified_shapes(with_adapters=True)}
    smallest = verified_shapes(with_adapters=with_adapters)[0]
    with torch.inference_mode():
        rehearsal.run_program(next(key for key in wanted if key.shape == smallest))


def test_without_drafts_nothing_is_prepared_or_kept_for_them(device: torch.device) -> None:
    core = gpu_drafting_core(tiny_model(), None, device, max_num_seqs=2)
    assert isinstance(core.runner, PlanRunner) and isinstance(core.runner.executor, SlotExecutor)
    assert not any(
        isinstance(key, steps.Prefill) and key.verifies for key in usual_programs(core.runner.executor._steps)
    )
